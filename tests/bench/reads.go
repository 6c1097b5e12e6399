package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"

	"holdfast/tests/host"

	"golang.org/x/sys/unix"
)

// withHoldfast mounts p on a fresh installation with an empty cache, calls fn with the mount and takes all down again.
func (b *bench) withHoldfast(p *prepared, mountFlags []string, fn func(h *host.Host, dir string) error) (err error) {
	dir, err := os.MkdirTemp(b.dir, "host-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	h, err := host.Start(b.bin, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.Stop()) }()
	mnt := filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		return err
	}
	if _, err := h.Run(append(append([]string{"mount"}, mountFlags...), p.ref, mnt)...); err != nil {
		return err
	}
	return fn(h, mnt)
}

// withBare mounts p over a sparse file that a bare handler fills, calls fn and takes all down again.
func (b *bench) withBare(p *prepared, do fill, fn func(dir string) error) (err error) {
	dir, err := os.MkdirTemp(b.dir, "bare-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	cache, mnt := filepath.Join(dir, "cache"), filepath.Join(dir, "mnt")
	if err := errors.Join(p.sparse(cache), os.Mkdir(mnt, 0o755)); err != nil {
		return err
	}
	handler, err := startBare(cache, do)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, handler.Close()) }()
	if err := mountBare(p.bootstrap, cache, mnt); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Unmount(mnt, 0)) }()
	return fn(mnt)
}

// cacheHit reads a complete image with and without holdfast beside it.
func cacheHit(ctx context.Context, b *bench) (_ []result, err error) {
	p, err := b.prepare(ctx, "hit", b.demo.Tar)
	if err != nil {
		return nil, err
	}
	defer p.close()
	bare := filepath.Join(b.dir, "hit-bare")
	if err := os.Mkdir(bare, 0o755); err != nil {
		return nil, err
	}
	if err := mountBare(p.bootstrap, p.raw, bare); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unix.Unmount(bare, 0)) }()
	var ours, floor []float64
	err = b.withHoldfast(p, nil, func(h *host.Host, dir string) error {
		if err := h.WaitComplete(dir); err != nil {
			return err
		}
		for range 2 * b.rounds {
			for _, side := range []struct {
				dir string
				out *[]float64
			}{{dir, &ours}, {bare, &floor}} {
				if err := host.DropCaches(); err != nil {
					return err
				}
				n, s, err := readAll(side.dir)
				if err != nil {
					return err
				}
				*side.out = append(*side.out, float64(n)/1e6/s)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return []result{compare("cache hit, all files, page cache dropped", "MB/s", ours, floor, 0.97, false)}, nil
}

// coldLocal reads all files once through an empty cache.
func coldLocal(ctx context.Context, b *bench) ([]result, error) {
	p, err := b.prepare(ctx, "cold", b.demo.Tar)
	if err != nil {
		return nil, err
	}
	defer p.close()
	raw, err := os.Open(p.raw)
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	buf := make([]byte, 1<<20)
	copyRange := func(f int, off, n int64) error {
		for end := min(off+n, int64(p.table.Size())); off < end; {
			k, err := unix.Pread(int(raw.Fd()), buf[:min(int64(len(buf)), end-off)], off)
			if err != nil || k == 0 {
				return fmt.Errorf("read the uncompressed file at %d: %d, %w", off, k, err)
			}
			if _, err := unix.Pwrite(f, buf[:k], off); err != nil {
				return err
			}
			off += int64(k)
		}
		return nil
	}
	var ours, floor []float64
	for range b.rounds {
		err := b.withHoldfast(p, nil, func(_ *host.Host, dir string) error {
			_, s, err := readAll(dir)
			ours = append(ours, s)
			return err
		})
		if err != nil {
			return nil, err
		}
		err = b.withBare(p, copyRange, func(dir string) error {
			_, s, err := readAll(dir)
			floor = append(floor, s)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return []result{compare("cold, local source, all files once", "s", ours, floor, 1.25, true)}, nil
}

const missSize = 512 << 20 // bytes of the file that the miss measurements read

// missFile makes a tar with one file of missSize bytes that compress to about half.
func (b *bench) missFile() (string, error) {
	path := filepath.Join(b.dir, "miss.tar")
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	if err := w.WriteHeader(&tar.Header{Name: "file", Mode: 0o644, Size: missSize}); err != nil {
		return "", err
	}
	r := rand.New(rand.NewPCG(1, 2))
	piece := make([]byte, 1<<20)
	for range missSize / len(piece) {
		for i := range piece {
			piece[i] = byte(r.Uint32()) & 0x0f
		}
		if _, err := w.Write(piece); err != nil {
			return "", err
		}
	}
	return path, w.Close()
}

// missChunk reads 4 KiB from chunks of 1 MiB that are not there yet.
func missChunk(ctx context.Context, b *bench) ([]result, error) {
	tarball, err := b.missFile()
	if err != nil {
		return nil, err
	}
	p, err := b.prepare(ctx, "miss", tarball)
	if err != nil {
		return nil, err
	}
	defer p.close()
	var stored, plain []byte
	oneChunk := func(f int, off, n int64) error {
		first, last := p.table.Range(uint64(off), uint64(n))
		for i := first; i < last; i++ {
			c := p.table.At(i)
			var err error
			if stored, plain, err = p.decode(c, stored, plain); err != nil {
				return err
			}
			if _, err := unix.Pwrite(f, plain, int64(c.Offset)); err != nil {
				return err
			}
		}
		return nil
	}
	return b.misses(p, "4 KiB cold miss, zstd chunks of 1 MiB", oneChunk)
}

// missPage reads 4 KiB from uncompressed chunks of 4 KiB that are not there yet.
func missPage(ctx context.Context, b *bench) ([]result, error) {
	tarball, err := b.missFile()
	if err != nil {
		return nil, err
	}
	p, err := b.prepare(ctx, "miss4k", tarball, "--compression", "none", "--chunk-size", "4KiB")
	if err != nil {
		return nil, err
	}
	defer p.close()
	raw, err := os.Open(p.raw)
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	page := make([]byte, 4096)
	copyPage := func(f int, off, _ int64) error {
		if _, err := unix.Pread(int(raw.Fd()), page, off); err != nil {
			return err
		}
		_, err := unix.Pwrite(f, page, off)
		return err
	}
	return b.misses(p, "4 KiB cold miss, uncompressed chunks of 4 KiB", copyPage)
}

// misses compares the median latency of misses that are 1 MiB apart.
func (b *bench) misses(p *prepared, name string, do fill) ([]result, error) {
	var ours, floor []float64
	for i := range b.rounds {
		seed := uint64(i)
		err := b.withHoldfast(p, []string{"--prefetch=off"}, func(_ *host.Host, dir string) error {
			l, err := missLatencies(filepath.Join(dir, "file"), missSize>>20, 1<<20, seed)
			if err == nil {
				ours = append(ours, median(l))
			}
			return err
		})
		if err != nil {
			return nil, err
		}
		err = b.withBare(p, do, func(dir string) error {
			l, err := missLatencies(filepath.Join(dir, "file"), missSize>>20, 1<<20, seed)
			if err == nil {
				floor = append(floor, median(l))
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return []result{compare(name+", median", "us", ours, floor, 1.5, true)}, nil
}
