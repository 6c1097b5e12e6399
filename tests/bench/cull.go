package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/daemon"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const (
	cullImages    = 5
	cullLayers    = 20 // of an image, in no other
	cullLayerSize = 2 << 20
	cullDomain    = "culled"
	cullMounts    = 50                    // of the fleet that is read meanwhile
	cullPace      = 20 * time.Millisecond // between two reads that miss
	cullPoll      = 3 * time.Second       // between two looks at the status, which takes some of a processor with so many objects
)

// culling has the daemon cull 100 objects of a domain that is over its quota, while a reader of other mounts reads what is missing and what is
// cached in turns, and compares the 99th percentile of its reads with what it is when nothing is culled, for as long: what the reader itself has
// written comes to the disk every few seconds.
func culling(ctx context.Context, b *bench) (_ []result, err error) {
	f, err := b.newFleet(ctx, cullMounts, true, "--domain-quota", cullDomain+"=0")
	defer func() { err = errors.Join(err, f.close()) }()
	if err != nil {
		return nil, err
	}
	refs, err := b.unshared(ctx)
	if err != nil {
		return nil, err
	}
	client := f.Client()
	defer client.Close()
	r := &oneReader{f: f}
	var during, without, took []float64
	reads := 0
	for range b.rounds {
		dirs, err := fill100(ctx, f, client, refs)
		if err != nil {
			return nil, err
		}
		unix.Sync() // what was written is not the reader's to wait for, in neither turn
		began := time.Now()
		busy, err := r.while(func() error { return awaitCulled(ctx, client, dirs) })
		if err != nil {
			return nil, err
		}
		culled := time.Since(began)
		unix.Sync()
		quiet, err := r.while(func() error { return sleep(ctx, culled) })
		if err != nil {
			return nil, err
		}
		took = append(took, culled.Seconds()*1e3)
		during, without = append(during, percentile(busy, 99)), append(without, percentile(quiet, 99))
		reads += len(busy)
	}
	fmt.Printf("  %d objects of 2 MiB in %.0f ms, %d reads meanwhile\n", cullImages*cullLayers, median(took), reads/b.rounds)
	return []result{compare("read beside the culling of 100 objects, p99", "ms", during, without, 1.2, true)}, nil
}

// awaitCulled unmounts images, and waits until all of their objects are culled.
func awaitCulled(ctx context.Context, client *daemon.Client, dirs []string) error {
	s, err := client.Status(ctx)
	if err != nil {
		return err
	}
	want := s.Space.Culled + cullImages*cullLayers
	for _, dir := range dirs {
		if err := client.Umount(ctx, dir); err != nil {
			return err
		}
	}
	for s.Space.Culled < want {
		if err := sleep(ctx, cullPoll); err != nil {
			return err
		}
		if s, err = client.Status(ctx); err != nil {
			return err
		}
	}
	return nil
}

// unshared makes images that have no layer in common.
func (b *bench) unshared(ctx context.Context) (refs []string, err error) {
	dir := filepath.Join(b.dir, "unshared")
	path, err := newLayout(dir)
	if err != nil {
		return nil, err
	}
	r := rand.New(rand.NewPCG(7, 8))
	for i := range cullImages {
		var layers []v1.Layer
		for l := range cullLayers {
			layer, err := newLayer(fmt.Sprintf("layer%d-%d", i, l), 1, cullLayerSize, letters(r, cullLayerSize))
			if err != nil {
				return nil, err
			}
			layers = append(layers, layer)
		}
		tag := fmt.Sprint(i)
		if err := writeImage(path, tag, layers...); err != nil {
			return nil, err
		}
		ref := "oci:" + dir + "-lazy:" + tag
		if err := timed(ctx, nil, b.bin, "convert", "oci:"+dir+":"+tag, ref); err != nil {
			return nil, err
		}
		refs = append(refs, ref)
	}
	return refs, nil
}

// fill100 mounts images and brings them in.
func fill100(ctx context.Context, f *fleet, client *daemon.Client, refs []string) (dirs []string, err error) {
	for i, ref := range refs {
		dir := filepath.Join(f.Dir, fmt.Sprint("unshared", i))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		if _, err := client.Mount(ctx, daemon.MountRequest{Image: ref, Dir: dir, Domain: cullDomain}); err != nil {
			return nil, err
		}
		if _, err := f.Run("prefetch", "--wait", dir); err != nil {
			return nil, err
		}
		dirs = append(dirs, dir)
	}
	return dirs, nil
}

// A oneReader reads the files of a fleet, each once as what is missing, and the first ones over and over as what is cached.
type oneReader struct {
	f    *fleet
	next int
}

// while returns how long reads took while during ran, in ms.
func (r *oneReader) while(during func() error) (all []float64, err error) {
	done := make(chan error, 1)
	go func() { done <- during() }() // waited for below
	tick := time.NewTicker(cullPace)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			return all, err
		case <-tick.C:
		}
		files := []int{r.next, r.next % (r.next/2 + 1)}
		r.next++
		if r.next >= len(r.f.mounts)*fleetLayers*fleetRead {
			return nil, errors.Join(errors.New("nothing is missing any more"), <-done)
		}
		for _, n := range files {
			began := time.Now()
			if _, err := readCold(r.f.file(n)); err != nil {
				return nil, errors.Join(err, <-done)
			}
			all = append(all, time.Since(began).Seconds()*1e3)
		}
	}
}
