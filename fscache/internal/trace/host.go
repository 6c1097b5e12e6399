package trace

import (
	"context"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/enginetest"
	"holdfast/fscache/internal/erofs"
)

// patience bounds waits for what must happen, shortly those for what must not.
const (
	patience = 20 * time.Second
	shortly  = 50 * time.Millisecond
)

// A Host does the steps of a trace that are the same on every real kernel: mounts and readers.
type Host struct {
	t       testing.TB
	mount   func(bootstrap []byte, boot fscache.Object, blobs []fscache.Object) (fd int, err error)
	mounts  map[string]chan error
	dirs    map[string]string
	readers map[string]*process
}

// A process is a reader.
type process struct {
	end    chan string
	victim enginetest.Process // nil: a goroutine
}

// NewHost makes one. mount makes a mount that is attached nowhere.
func NewHost(t testing.TB, mount func(bootstrap []byte, boot fscache.Object, blobs []fscache.Object) (fd int, err error)) *Host {
	return &Host{t: t, mount: mount, mounts: make(map[string]chan error), dirs: make(map[string]string), readers: make(map[string]*process)}
}

// Do does a step that is one of these; ok is false for others.
func (h *Host) Do(s Step) (result string, ok bool) {
	switch s.Verb {
	case "mount":
		h.startMount(s.Args)
		return "ok", true
	case "made":
		select {
		case err := <-h.mounts[s.Args[0]]:
			if err != nil {
				h.t.Logf("mount: %v", err)
				return "failed", true
			}
			return "ok", true
		case <-time.After(patience):
			return "waits", true
		}
	case "unmount":
		return ErrnoName(erofs.Unmount(h.dirs[s.Args[0]])), true
	case "reader", "victim":
		off, n := Range(s.Args[3])
		h.readers[s.Args[0]] = h.read(s.Verb == "victim", h.dirs[s.Args[1]], Key(s.Args[2]), off, n)
		return "ok", true
	case "kill":
		return ErrnoName(h.readers[s.Args[0]].victim.Kill()), true
	case "asleep", "end":
		return h.end(h.readers[s.Args[0]], s.Verb == "asleep"), true
	}
	return "", false
}

func (h *Host) startMount(args []string) {
	var blobs []fscache.Object
	for _, b := range args[2:] {
		blobs = append(blobs, Blob(b))
	}
	boot := Bootstrap(h.t, args[2:])
	dir, done := h.t.TempDir(), make(chan error, 1)
	h.dirs[args[0]], h.mounts[args[0]] = dir, done
	h.t.Cleanup(func() { enginetest.DetachMount(dir) })
	go func() { // ends when the kernel's requests are answered, or its interface is gone
		fd, err := h.mount(boot, fscache.Object{Key: Key(args[1]), Size: int64(len(boot))}, blobs)
		if err == nil {
			err = erofs.Attach(fd, dir)
			_ = unix.Close(fd)
		}
		done <- err
	}()
}

func (h *Host) read(victim bool, dir string, k fscache.Key, off, n int64) *process {
	p := &process{end: make(chan string, 1)}
	if victim {
		var err error
		if p.victim, err = (enginetest.RealReaders{}).Start(dir, k, off, n); err != nil {
			h.t.Fatal(err)
		}
		p.end <- "killed"
		return p
	}
	go func() { // ends with the read
		b := make([]byte, n)
		err := (enginetest.RealReaders{}).Read(dir, k, b, off)
		p.end <- Outcome(b, err)
	}()
	return p
}

func (h *Host) end(p *process, early bool) string {
	if early {
		select {
		case result := <-p.end:
			p.end <- result
			return strconv.FormatBool(false)
		case <-time.After(shortly):
			return strconv.FormatBool(true)
		}
	}
	select {
	case result := <-p.end:
		return result
	case <-time.After(patience):
		return "asleep"
	}
}

// Data is n bytes, aligned, none of them zero.
func Data(n int64) []byte {
	p := fscache.AlignedBuffer(int(n))
	for i := range p {
		p[i] = 1
	}
	return p
}

// Eventually tries until something is there.
func Eventually(ctx context.Context, try func() bool) bool {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for !try() {
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// Bootstrap is the bootstrap of an image of blobs.
func Bootstrap(t testing.TB, blobs []string) []byte {
	var objects []fscache.Object
	for _, b := range blobs {
		objects = append(objects, Blob(b))
	}
	p, err := enginetest.Bootstrap(objects)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
