package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"holdfast/daemon"
	"holdfast/tests/host"
	"holdfast/tests/registry"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const (
	secondLayers = 20 // of an image, all alike
	secondShared = 18 // of these, layers of the first image
	secondFiles  = 4  // of a layer
	secondSize   = 256 << 10
)

// A pair is a host with an image that is mounted and complete, and a registry with it and others that share 90 % of its layers.
type pair struct {
	*host.Host
	client *daemon.Client
	reg    *registry.Registry
	dir    string // where the others are mounted, one at a time
}

// secondImage mounts images that share 90 % of their layers with one that is mounted and complete. The bytes are all that the registry
// sends until the image is complete too. The time is from the request to mount to the first byte of a file: of a layer that is there, and
// of one that has to be fetched. Beside it is what the same image takes when it is mounted once more, complete by then.
func secondImage(ctx context.Context, b *bench) (_ []result, err error) {
	p := &pair{dir: filepath.Join(b.dir, "second", "mnt")}
	defer func() { err = errors.Join(err, p.close()) }()
	if err := p.start(ctx, b); err != nil {
		return nil, err
	}
	if err := os.Mkdir(p.dir, 0o755); err != nil {
		return nil, err
	}
	first := filepath.Join(b.dir, "second", "first")
	if err := os.Mkdir(first, 0o755); err != nil {
		return nil, err
	}
	if _, err := p.mount(ctx, 0, first, "layer0-0"); err != nil {
		return nil, err
	}
	if err := p.complete(ctx, first); err != nil {
		return nil, err
	}
	whole := float64(p.reg.Served())
	var share []float64
	var ours, floor [2][]float64
	for i := range 4 * b.rounds {
		file := []string{"layer0-0", fmt.Sprintf("own%d-%d-0", i+1, secondShared)}[i%2]
		before := p.reg.Served()
		t, err := p.mount(ctx, i+1, p.dir, file)
		if err != nil {
			return nil, err
		}
		if err := p.complete(ctx, p.dir); err != nil {
			return nil, err
		}
		share = append(share, 100*float64(p.reg.Served()-before)/whole)
		if err := p.client.Umount(ctx, p.dir); err != nil {
			return nil, err
		}
		again, err := p.mount(ctx, i+1, p.dir, file)
		if err != nil {
			return nil, err
		}
		if err := p.client.Umount(ctx, p.dir); err != nil {
			return nil, err
		}
		ours[i%2], floor[i%2] = append(ours[i%2], t), append(floor[i%2], again)
	}
	m := median(share)
	return []result{
		{Name: "second image, 90 % shared, bytes fetched", Unit: "%", Ours: m, Ratio: m, Target: 12, AtMost: true},
		compare("second image, mount to first byte / complete", "ms", ours[0], floor[0], 1.2, true),
		compare("second image, the same, of a layer not there", "ms", ours[1], floor[1], 1.2, true),
	}, nil
}

// start pushes as many images as the rounds need, and starts a host that prefetches only what it is asked for.
func (p *pair) start(ctx context.Context, b *bench) (err error) {
	dir := filepath.Dir(p.dir)
	if p.reg, err = registry.Start(filepath.Join(dir, "registry")); err != nil {
		return err
	}
	src := filepath.Join(dir, "layers")
	path, err := newLayout(src)
	if err != nil {
		return err
	}
	r := rand.New(rand.NewPCG(5, 6))
	layer := func(name string) (v1.Layer, error) {
		return newLayer(name, secondFiles, secondSize, letters(r, secondSize))
	}
	layers := make([]v1.Layer, secondLayers)
	for i := range 1 + 4*b.rounds {
		for l := range layers {
			name := fmt.Sprintf("layer%d", l)
			if i > 0 && l < secondShared {
				continue
			}
			if i > 0 {
				name = fmt.Sprintf("own%d-%d", i, l)
			}
			if layers[l], err = layer(name); err != nil {
				return err
			}
		}
		tag := fmt.Sprint(i)
		if err := writeImage(path, tag, layers...); err != nil {
			return err
		}
		if err := timed(ctx, nil, b.bin, "convert", "oci:"+src+":"+tag, p.ref(i)); err != nil {
			return err
		}
	}
	if p.Host, err = host.Start(b.bin, dir, "--prefetch", "off"); err != nil {
		return err
	}
	p.client = p.Client()
	return nil
}

func (p *pair) close() (err error) {
	if p.client != nil {
		p.client.Close()
	}
	if p.Host != nil {
		err = p.Stop()
	}
	if p.reg != nil {
		err = errors.Join(err, p.reg.Close())
	}
	return err
}

func (p *pair) ref(i int) string { return fmt.Sprintf("docker://%s/second:%d", p.reg.Addr(), i) }

// mount mounts image i, and returns the milliseconds until the first byte of a file is there.
func (p *pair) mount(ctx context.Context, i int, dir, file string) (float64, error) {
	began := time.Now()
	if _, err := p.client.Mount(ctx, daemon.MountRequest{Image: p.ref(i), Dir: dir}); err != nil {
		return 0, err
	}
	f, err := os.Open(filepath.Join(dir, file))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	_, err = io.ReadFull(f, make([]byte, 1))
	return time.Since(began).Seconds() * 1e3, err
}

// complete brings all of the image on dir in.
func (p *pair) complete(ctx context.Context, dir string) error {
	_, err := p.Run("prefetch", "--wait", dir)
	return err
}
