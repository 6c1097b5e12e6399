package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"holdfast/tests/host"
	"holdfast/tests/registry"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// prefetchDemo brings the demo image in from a registry on loopback with `prefetch --wait`, whose end means that all of it is checked by
// digest, written and synced, against curl of the same data piped through zstd -d to a file, which is neither checked nor synced.
//
// The floor cannot be curl of the very blob: chunks that do not compress are stored as they are, and zstd stops there. So the chunks'
// bytes are pushed a second time, as one stream of zstd -3, which is smaller than the blob.
func prefetchDemo(ctx context.Context, b *bench) (_ []result, err error) {
	p, err := b.prepare(ctx, "prefetch", b.demo.Tar)
	if err != nil {
		return nil, err
	}
	defer p.close()
	reg, err := registry.Start(filepath.Join(b.dir, "prefetch-registry"))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, reg.Close()) }()
	lazy := &prepared{ref: "docker://" + reg.Addr() + "/demo:lazy"}
	if err := timed(ctx, nil, b.bin, "convert", "tar:"+b.demo.Tar, lazy.ref); err != nil {
		return nil, err
	}
	stream, size, err := p.pushStream(ctx, reg.Addr()+"/demo")
	if err != nil {
		return nil, err
	}
	fetch := fmt.Sprintf("set -o pipefail; curl -fsS http://%s/v2/demo/blobs/%s | zstd -d -q -f -o %s", reg.Addr(), stream, filepath.Join(b.dir, "stream"))
	var ours, floor, synced []float64
	for i := range b.rounds + 1 { // the first pass warms the page cache and is not counted
		var a, f, s float64
		err := b.withHoldfast(lazy, []string{"--prefetch=off"}, func(h *host.Host, dir string) error {
			return timed(ctx, &a, b.bin, "--run", filepath.Join(h.Dir, "run"), "prefetch", "--wait", dir)
		})
		if err != nil {
			return nil, err
		}
		if err := timed(ctx, &f, "bash", "-c", fetch); err != nil {
			return nil, err
		}
		s = f
		if err := timed(ctx, &s, "sync", filepath.Join(b.dir, "stream")); err != nil {
			return nil, err
		}
		if err := os.Remove(filepath.Join(b.dir, "stream")); err != nil {
			return nil, err
		}
		if i > 0 {
			ours, floor, synced = append(ours, size/1e6/a), append(floor, size/1e6/f), append(synced, size/1e6/s)
		}
	}
	fmt.Printf("  %.0f MB; the floor with sync of its file: %.0f MB/s\n", size/1e6, median(synced))
	return []result{compare("prefetch --wait demo image / curl | zstd -d", "MB/s", ours, floor, 0.8, false)}, nil
}

// pushStream pushes the bytes of all chunks as one zstd stream to a repository, and returns its digest and the bytes' number.
func (p *prepared) pushStream(ctx context.Context, repo string) (digest v1.Hash, size float64, err error) {
	raw, err := os.ReadFile(p.raw)
	if err != nil {
		return digest, 0, err
	}
	var plain bytes.Buffer
	for i := range p.table.Len() {
		c := p.table.At(i)
		plain.Write(raw[c.Offset : c.Offset+uint64(c.Size)])
	}
	size = float64(plain.Len())
	zstd := exec.CommandContext(ctx, "zstd", "-3", "-q", "-c")
	zstd.Stdin = &plain
	stream, err := zstd.Output()
	if err != nil {
		return digest, 0, fmt.Errorf("zstd: %w", err)
	}
	to, err := name.NewRepository(repo)
	if err != nil {
		return digest, 0, err
	}
	layer := static.NewLayer(stream, types.OCILayerZStd)
	if err := remote.WriteLayer(to, layer, remote.WithContext(ctx)); err != nil {
		return digest, 0, err
	}
	digest, err = layer.Digest()
	return digest, size, err
}
