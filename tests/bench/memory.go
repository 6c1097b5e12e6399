package main

import (
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"holdfast/tests/host"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const (
	memoryLayers  = 20
	memoryReaders = 16
	layerFiles    = 8
	layerFileSize = 2 << 20
)

// residentMemory takes the daemon's largest resident set while 16 readers read an image of 20 layers from an empty cache,
// with the background prefetch on.
func residentMemory(ctx context.Context, b *bench) ([]result, error) {
	src := filepath.Join(b.dir, "layers")
	if err := layeredImage(src); err != nil {
		return nil, fmt.Errorf("make an image of %d layers: %w", memoryLayers, err)
	}
	p := &prepared{ref: "oci:" + filepath.Join(b.dir, "memory") + ":bench"}
	if err := timed(ctx, nil, b.bin, "convert", "oci:"+src+":layers", p.ref); err != nil {
		return nil, err
	}
	var peak []float64
	for range b.rounds {
		err := b.withHoldfast(p, nil, func(h *host.Host, dir string) error {
			if err := readInParallel(dir); err != nil {
				return err
			}
			s, err := h.Status()
			if err != nil {
				return err
			}
			mib, err := peakResident(s.PID)
			peak = append(peak, mib)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	m := median(peak)
	return []result{{Name: "resident memory, 20 layers, 16 readers, peak", Unit: "MiB", Ours: m, Ratio: m, Target: 96, AtMost: true}}, nil
}

func layeredImage(dir string) error {
	r := rand.New(rand.NewPCG(3, 4))
	var layers []v1.Layer
	for l := range memoryLayers {
		layer, err := newLayer(fmt.Sprintf("layer%d", l), layerFiles, layerFileSize, letters(r, layerFileSize))
		if err != nil {
			return err
		}
		layers = append(layers, layer)
	}
	path, err := newLayout(dir)
	if err != nil {
		return err
	}
	return writeImage(path, "layers", layers...)
}

// readInParallel reads all files with memoryReaders readers, each starting somewhere else.
func readInParallel(dir string) error {
	var files []string
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			files = append(files, p)
		}
		return err
	})
	if err != nil {
		return err
	}
	errs := make(chan error, memoryReaders)
	var wg sync.WaitGroup
	for i := range memoryReaders {
		wg.Add(1)
		go func() { // ends when all files are read or one fails; waited for below
			defer wg.Done()
			for j := range files {
				if _, err := os.ReadFile(files[(i*len(files)/memoryReaders+j)%len(files)]); err != nil {
					errs <- err
					return
				}
			}
		}()
	}
	wg.Wait()
	close(errs)
	return <-errs
}

// peakResident is VmHWM of a process, in MiB.
func peakResident(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmHWM:" {
			kib, err := strconv.ParseFloat(f[1], 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("no VmHWM in /proc/%d/status", pid)
}
