package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/daemon"
	"holdfast/fscache"
)

// smallDisk starts a host whose root, state and cache, is on a file system of its own that can be filled: a small ext4 in a file, or, in
// the test machine, its disk.
func smallDisk(t *testing.T, serve ...string) (h *testHost, root string) {
	t.Helper()
	if os.Getenv("HOLDFAST_VM") == "" {
		return diskHost(t, "192M", []string{"mkfs.ext4", "-q", "-F", "-m", "0"}, serve...)
	}
	return diskHost(t, "", nil, serve...)
}

// diskHost starts a host whose root is on a new file system in a file of a size, or, without one, in the working directory.
func diskHost(t *testing.T, size string, mkfs []string, serve ...string) (h *testHost, root string) {
	t.Helper()
	dir, engine := workDir(t)
	root = filepath.Join(dir, "root")
	if err := os.Mkdir(root, 0o700); err != nil {
		t.Fatal(err)
	}
	if mkfs != nil {
		disk := filepath.Join(dir, "disk")
		for _, c := range [][]string{{"truncate", "-s", size, disk}, append(mkfs, disk), {"mount", "-o", "loop", disk, root}} {
			if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %v: %s", c, err, out)
			}
		}
		t.Cleanup(func() {
			if err := unix.Unmount(root, 0); err != nil {
				t.Errorf("umount %s: %v", root, err)
			}
		})
	}
	return startHost(t, bin, dir, append([]string{"--engine", engine, "--prefetch", "off"}, serve...)...), root
}

// fill is fillDisk, until the daemon knows of it.
func (h *testHost) fill(dir string, culled int64) (giveBack func()) {
	h.t.Helper()
	giveBack = fillDisk(h.t, dir, culled)
	h.until("the daemon knows that its disk is full", func() bool { return h.fullStatus().Space.Stopped })
	return giveBack
}

// fillDisk takes what is free on the file system of dir, but for less than the cache may be left with, and gives it back when it is called.
// culled is how much culling must free for something to be written again.
func fillDisk(t *testing.T, dir string, culled int64) (giveBack func()) {
	t.Helper()
	path := filepath.Join(dir, "ballast")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	stop := int64(fscache.DefaultLimits.Space.Stop)
	for size, step := int64(0), int64(1<<40); step >= 4096; {
		s, err := fscache.SpaceOf(dir)
		if err != nil {
			t.Fatal(err)
		}
		step = min(step, s.Free-max(0, s.Total/100*stop-culled/2))
		switch err := unix.Fallocate(int(f.Fd()), 0, size, max(step, 1)); {
		case err == nil:
			size += step
		case errors.Is(err, unix.ENOSPC):
			step /= 2
		default:
			t.Fatal(err)
		}
	}
	done := false
	giveBack = func() {
		if done {
			return
		}
		done = true
		if err := errors.Join(f.Close(), os.Remove(path)); err != nil {
			t.Error(err)
		}
		unix.Sync() // ext4 frees blocks with its journal's commit
	}
	t.Cleanup(giveBack)
	return giveBack
}

func (h *testHost) fullStatus() daemon.Status {
	h.t.Helper()
	c := h.Client()
	defer c.Close()
	s, err := c.Status(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	return s
}

// beginRead begins to read a file; how it ended comes through the channel.
func beginRead(path string) <-chan fileRead {
	done := make(chan fileRead, 1)
	go func() { // ends with the read
		b, err := os.ReadFile(path)
		done <- fileRead{b, err}
	}()
	return done
}

type fileRead struct {
	b   []byte
	err error
}

func (h *testHost) wantFile(m model, name string, r fileRead) {
	h.t.Helper()
	if r.err != nil || !slices.Equal(r.b, m[name].content) {
		h.t.Fatalf("read of %s: %d bytes, %v\nthe daemon's log:\n%s", name, len(r.b), r.err, h.Log())
	}
}

// image converts a tree of n files of 1 MiB. Reading one of them brings in no more than the next.
func (h *testHost) image(name string, n int) (ref string, m model) {
	h.t.Helper()
	m = bigFiles(n)
	tarball := filepath.Join(h.Dir, name+".tar")
	m.writeTar(h.t, tarball)
	ref = "oci:" + filepath.Join(h.Dir, name) + ":v1"
	h.must("convert", "tar:"+tarball, ref)
	return ref, m
}

func TestReaderOnAFullDiskWaitsAndGetsItsBytesWhenThereIsRoom(t *testing.T) {
	h, root := smallDisk(t, "--space-deadline", "10m")
	ref, m := h.image("a", 8)
	dir := h.mount(ref)
	h.wantFile(m, "f0", <-beginRead(filepath.Join(dir, "f0")))
	giveBack := h.fill(root, 1<<20)
	done := beginRead(filepath.Join(dir, "f4"))
	h.until("the reader waits", func() bool { return h.fullStatus().Pending > 0 })
	h.wantFile(m, "f0", <-beginRead(filepath.Join(dir, "f0"))) // what is cached is read
	select {
	case r := <-done:
		t.Fatalf("the reader was let go with the disk full: %v\n%s", r.err, h.Log())
	default:
	}
	giveBack()
	h.wantFile(m, "f4", <-done)
	m.compare(t, dir)
	if s := h.fullStatus(); s.Refused != 0 {
		t.Errorf("%d requests were refused", s.Refused)
	}
}

func TestUnmountedImageMakesRoomForTheReaderOfAnother(t *testing.T) {
	h, root := smallDisk(t, "--space-deadline", "10m")
	old, oldModel := h.image("old", 24)
	ref, m := h.image("a", 8)
	oldDir := h.mount(old, "--domain", "old")
	oldModel.compare(t, oldDir)
	dir := h.mount(ref)
	h.must("umount", oldDir)
	fillDisk(t, root, 24<<20)
	m.compare(t, dir)
	if s := h.fullStatus(); s.Space.Culled == 0 || s.Refused != 0 {
		t.Errorf("%d objects culled, %d requests refused: want some and none", s.Space.Culled, s.Refused)
	}
	dropCaches(t)
	m.compare(t, dir)
	h.must("umount", dir)
}

func TestFullDiskIsAnErrorAfterTheDeadlineAndNothingElseBreaks(t *testing.T) {
	h, root := smallDisk(t, "--space-deadline", "1s")
	whole, wholeModel := h.image("whole", 2)
	ref, m := h.image("a", 8)
	wholeDir := h.mount(whole, "--domain", "whole")
	wholeModel.compare(t, wholeDir)
	dir := h.mount(ref)
	giveBack := h.fill(root, 1<<20)
	if r := <-beginRead(filepath.Join(dir, "f4")); !errors.Is(r.err, unix.EIO) && !errors.Is(r.err, unix.ENOSPC) {
		t.Fatalf("read with the disk full: %d bytes, %v, want EIO or ENOSPC", len(r.b), r.err)
	}
	dropCaches(t)
	wholeModel.compare(t, wholeDir)
	// A daemon that is started with the disk full serves what is cached.
	pid := h.fullStatus().PID
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.until("another daemon serves", func() bool {
		c := h.Client()
		defer c.Close()
		s, err := c.Status(t.Context())
		return err == nil && s.PID != pid && s.Mounts == 2
	})
	dropCaches(t)
	wholeModel.compare(t, wholeDir)
	if r := <-beginRead(filepath.Join(dir, "f6")); r.err == nil {
		t.Error("a read that there is no room for succeeded")
	}
	h.must("umount", wholeDir)
	giveBack()
	m.compare(t, dir)
	m.compare(t, h.mount(ref, "--domain", "another"))
}
