package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// convertDemo times the conversion of the demo image's tar as a whole process, against zstd and sha256sum of the same tar,
// and against mkfs.erofs of the tree and zstd of the result.
func convertDemo(ctx context.Context, b *bench) ([]result, error) {
	tree := filepath.Join(b.dir, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return nil, err
	}
	if err := timed(ctx, nil, "tar", "-xf", b.demo.Tar, "-C", tree); err != nil {
		return nil, err
	}
	layout := filepath.Join(b.dir, "convert")
	var ours, sums, mkfs []float64
	for i := range b.rounds + 1 { // the first pass warms the page cache and is not counted
		var a, s, m float64
		if err := os.RemoveAll(layout); err != nil {
			return nil, err
		}
		if err := timed(ctx, &a, b.bin, "convert", "tar:"+b.demo.Tar, "oci:"+layout+":bench"); err != nil {
			return nil, err
		}
		if err := timed(ctx, &s, "zstd", "-3", "-T0", "-q", "-f", b.demo.Tar, "-o", filepath.Join(b.dir, "tar.zst")); err != nil {
			return nil, err
		}
		if err := timed(ctx, &s, "sha256sum", b.demo.Tar); err != nil {
			return nil, err
		}
		erofs := filepath.Join(b.dir, "tree.erofs")
		if err := timed(ctx, &m, "mkfs.erofs", erofs, tree); err != nil {
			return nil, err
		}
		if err := timed(ctx, &m, "zstd", "-3", "-q", "-f", erofs, "-o", erofs+".zst"); err != nil {
			return nil, err
		}
		if i > 0 {
			ours, sums, mkfs = append(ours, a), append(sums, s), append(mkfs, m)
		}
	}
	return []result{
		compare("convert demo tar / zstd -3 -T0 + sha256sum", "s", ours, sums, 1.3, true),
		compare("convert demo tar / mkfs.erofs + zstd -3", "s", ours, mkfs, 1, true),
	}, nil
}

// timed runs a command and adds its wall-clock seconds to *s.
func timed(ctx context.Context, s *float64, name string, args ...string) error {
	start := time.Now()
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out)
	}
	if s != nil {
		*s += time.Since(start).Seconds()
	}
	return nil
}
