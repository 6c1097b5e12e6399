package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"holdfast/daemon"
	"holdfast/tests/host"
	"holdfast/tests/registry"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const (
	hundredsImages = 200
	hundredsLayers = 20 // of an image
	hundredsShared = 10 // of these, layers that every image has
	hundredsFiles  = 8  // of a layer
	hundredsSize   = 8 << 10
	hundredsTail   = 10 // mounts at either end whose median counts
	statusCalls    = 20
)

// hundredsOfImages mounts 200 images of 20 layers from a registry on loopback in one domain, and compares the last mounts with the first.
// Then it asks the daemon for its status, as a client and as the command, and looks at its largest resident set so far. Nothing is
// prefetched: what is measured is what mounts cost, and objects that stay open.
func hundredsOfImages(ctx context.Context, b *bench) (_ []result, err error) {
	dir := filepath.Join(b.dir, "hundreds")
	reg, err := registry.Start(filepath.Join(dir, "registry"))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, reg.Close()) }()
	if err := b.pushHundreds(ctx, filepath.Join(dir, "layers"), reg.Addr()); err != nil {
		return nil, err
	}
	h, err := host.Start(b.bin, dir, "--prefetch", "off")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, h.Stop()) }()
	client := h.Client()
	defer client.Close()
	var mounts []float64
	for i := range hundredsImages {
		r := daemon.MountRequest{Image: hundredsRef(reg.Addr(), i), Dir: filepath.Join(dir, fmt.Sprintf("mnt%d", i))}
		if err := os.Mkdir(r.Dir, 0o755); err != nil {
			return nil, err
		}
		began := time.Now()
		if _, err := client.Mount(ctx, r); err != nil {
			return nil, err
		}
		mounts = append(mounts, time.Since(began).Seconds()*1e3)
		if _, err := os.ReadFile(filepath.Join(r.Dir, fmt.Sprintf("own%d-%d-0", i, hundredsShared))); err != nil {
			return nil, err
		}
	}
	first, last := mounts[:hundredsTail], mounts[hundredsImages-hundredsTail:]
	fmt.Printf("  mounts: the very first %.1f ms, median of all %.1f ms\n", mounts[0], median(mounts))
	call, command, pid, err := statusTimes(ctx, h, client)
	if err != nil {
		return nil, err
	}
	mib, err := peakResident(pid)
	if err != nil {
		return nil, err
	}
	what := fmt.Sprintf("%d images x %d layers", hundredsImages, hundredsLayers)
	return []result{
		{Name: what + ", mount, last / first", Unit: "ms", Ours: median(last), Floor: median(first), Ratio: median(last) / median(first), Target: 1.5, AtMost: true},
		{Name: what + ", resident memory, peak", Unit: "MiB", Ours: mib, Ratio: mib, Target: 160, AtMost: true},
		{Name: what + ", status, call", Unit: "ms", Ours: call, Ratio: call, Target: 100, AtMost: true},
		{Name: what + ", status, command", Unit: "ms", Ours: command, Ratio: command, Target: 100, AtMost: true},
	}, nil
}

func hundredsRef(registry string, i int) string {
	return fmt.Sprintf("docker://%s/hundreds:%d", registry, i)
}

// pushHundreds makes the images in a layout in dir, and converts them to the registry.
func (b *bench) pushHundreds(ctx context.Context, dir, registry string) error {
	layer := func(name string) (v1.Layer, error) {
		return newLayer(name, hundredsFiles, hundredsSize, repeated(hundredsSize))
	}
	var shared []v1.Layer
	for l := range hundredsShared {
		s, err := layer(fmt.Sprintf("shared%d", l))
		if err != nil {
			return err
		}
		shared = append(shared, s)
	}
	for i := range hundredsImages {
		layers := shared
		for l := hundredsShared; l < hundredsLayers; l++ {
			own, err := layer(fmt.Sprintf("own%d-%d", i, l))
			if err != nil {
				return err
			}
			layers = append(layers[:l:l], own)
		}
		src := filepath.Join(dir, fmt.Sprint(i))
		path, err := newLayout(src)
		if err != nil {
			return err
		}
		if err := writeImage(path, "plain", layers...); err != nil {
			return err
		}
		if err := timed(ctx, nil, b.bin, "convert", "oci:"+src+":plain", hundredsRef(registry, i)); err != nil {
			return err
		}
		if err := os.RemoveAll(src); err != nil {
			return err
		}
	}
	return nil
}

// statusTimes are the medians, in ms, of what the status takes as a call and as a command.
func statusTimes(ctx context.Context, h *host.Host, client *daemon.Client) (call, command float64, pid int, err error) {
	var calls, commands []float64
	for range statusCalls {
		began := time.Now()
		s, err := client.Status(ctx)
		if err != nil {
			return 0, 0, 0, err
		}
		calls, pid = append(calls, time.Since(began).Seconds()*1e3), s.PID
		began = time.Now()
		if _, err := h.Run("status"); err != nil {
			return 0, 0, 0, err
		}
		commands = append(commands, time.Since(began).Seconds()*1e3)
	}
	return median(calls), median(commands), pid, nil
}
