package drill

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"holdfast/daemon"
	"holdfast/daemon/drill/inject"
	"holdfast/rafs"
	"holdfast/rafs/convert"
)

// What the drill makes for itself: one image, mounted this often, in domains of their own, from a source that takes its time, so that there is
// something to wait for. Chunks are small, so that many requests are under way at a time.
const (
	madeMounts = 2
	madeChunk  = 64 << 10
	enough     = 85 // per cent of an image that are in the cache when it is mounted anew
)

var madePace = pace{latency: 5 * time.Millisecond, rate: 8 << 20}

// made is an image and its mounts that the drill made.
type made struct {
	dir     string // holds all of it
	client  *daemon.Client
	root    string
	source  *registry
	targets []*target
	domains []string
	size    int64
	serial  int
	c       *collector
}

// make generates an image of size bytes below work, serves it, and mounts it. After an error nothing is left but what close removes.
func (m *made) make(ctx context.Context, work string, seed uint64, size int64) error {
	var err error
	if m.dir, err = os.MkdirTemp(work, "holdfast-drill-"); err != nil {
		return fmt.Errorf("make a directory for the drill: %w", err)
	}
	m.size = size
	tree, layout := filepath.Join(m.dir, "tree"), filepath.Join(m.dir, "image")
	files, err := generate(tree, seed, size)
	if err != nil {
		return err
	}
	o := convert.Options{Source: "dir:" + tree, Dest: "oci:" + layout + ":drill", ChunkSize: madeChunk, Codec: rafs.CodecNone}
	if _, err := convert.Run(ctx, o); err != nil {
		return fmt.Errorf("make an image for the drill: %w", err)
	}
	if err := os.RemoveAll(tree); err != nil {
		return err
	}
	if m.source, err = startRegistry(layout, madePace); err != nil {
		return err
	}
	for range madeMounts {
		t := &target{image: m.source.ref()}
		for path, g := range files {
			t.add(file{path: path, size: g.size, content: &g})
		}
		m.targets, m.domains = append(m.targets, t), append(m.domains, "")
		if err := m.mount(ctx, len(m.targets)-1); err != nil {
			return err
		}
	}
	return nil
}

// mount mounts the image for a target on a new directory, in a new domain: with nothing in the cache.
func (m *made) mount(ctx context.Context, i int) error {
	m.serial++
	dir := filepath.Join(m.dir, fmt.Sprintf("mnt%d", m.serial))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("make a mount point for the drill: %w", err)
	}
	off := false
	domain := fmt.Sprintf("drill-%d-%d", os.Getpid(), m.serial)
	r := daemon.MountRequest{Image: m.source.ref(), Dir: dir, Domain: domain, Prefetch: &off}
	if _, err := m.client.Mount(ctx, r); err != nil {
		return fmt.Errorf("mount the drill's image: %w", err)
	}
	m.targets[i].dir, m.domains[i] = dir, domain
	return nil
}

// renewEvery is how often renew looks.
const renewEvery = 300 * time.Millisecond

// renew mounts each image anew when most of it is in the cache, for as long as there is room, until ctx ends. What is in the cache of the old mount
// stays there: the daemon keeps what it has. It calls note with what goes wrong.
func (m *made) renew(ctx context.Context, note func(string)) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(renewEvery):
		}
		s, err := m.client.Status(ctx)
		if err != nil {
			continue // killed, for example
		}
		for i, domain := range m.domains {
			if !m.targets[i].broken && m.filled(s, domain) && m.room() {
				if err := m.again(ctx, i); err != nil && ctx.Err() == nil {
					note(err.Error())
				}
			}
		}
	}
}

func (m *made) filled(s daemon.Status, domain string) bool {
	var size, present int64
	for _, o := range s.Objects {
		if o.Domain == domain {
			size, present = size+o.Size, present+o.Present
		}
	}
	return size > 0 && present > size/100*enough
}

// room reports whether another copy of the image fits into the cache with as much again to spare, and a tenth of the disk.
func (m *made) room() bool {
	free, size, err := inject.Space(m.root)
	return err == nil && free > 2*m.size+size/10
}

// patience is how long the daemon is asked again to mount or unmount: meanwhile it may be killed any number of times.
const patience = time.Minute

// again unmounts a target's image and mounts it anew. Reads of it end first.
func (m *made) again(ctx context.Context, i int) error {
	t := m.targets[i]
	t.renewing.Store(true)
	defer t.renewing.Store(false)
	for !t.lock.TryLock() { // not Lock, which would wait for a read that is never answered
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pollEvery):
		}
	}
	defer t.lock.Unlock()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	dir, since := t.dir, m.c.now()
	err := m.unmount(ctx, dir)
	for err == nil {
		if err = m.mount(ctx, i); err == nil {
			t.rounds.Add(1)
			return os.Remove(dir)
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
			err = nil
		}
	}
	t.broken = true
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		m.c.unanswered(m.c.touched(since, m.c.now()), "could not be mounted anew: "+err.Error(), dir, since)
	}
	return fmt.Errorf("mount the drill's image anew: %w", err)
}

// unmount unmounts a directory, however often it takes. One on which nothing is mounted any more is fine: the daemon may have been killed after it
// had unmounted it.
func (m *made) unmount(ctx context.Context, dir string) error {
	for {
		err := m.client.Umount(ctx, dir)
		if err != nil && !inject.IsMountPoint(dir) {
			err = nil
		}
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("unmount the drill's image: %w", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// close unmounts and removes everything.
func (m *made) close() error {
	var errs []error
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	entries, _ := os.ReadDir(m.dir) // what cannot be listed cannot be removed below
	for _, e := range entries {
		if dir := filepath.Join(m.dir, e.Name()); inject.IsMountPoint(dir) {
			errs = append(errs, m.unmount(ctx, dir))
		}
	}
	if m.source != nil {
		errs = append(errs, m.source.close())
	}
	if errors.Join(errs...) == nil && m.dir != "" {
		errs = append(errs, os.RemoveAll(m.dir))
	}
	return errors.Join(errs...)
}
