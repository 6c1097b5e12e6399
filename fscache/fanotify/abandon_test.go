package fanotify

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/enginetest"
	"holdfast/fscache/internal/erofs"
)

// imageOf makes an image of objects, to be mounted.
func imageOf(t *testing.T, objects ...fscache.Object) fscache.Mount {
	t.Helper()
	boot, err := enginetest.Bootstrap(objects)
	if err != nil {
		t.Fatal(err)
	}
	m := fscache.Mount{Dir: t.TempDir(), BootstrapPath: filepath.Join(t.TempDir(), "bootstrap"), Blobs: objects}
	if err := os.WriteFile(m.BootstrapPath, boot, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { enginetest.DetachMount(m.Dir) })
	return m
}

// lose mounts an image of objects and loses the group, with a file of each object open.
func lose(t *testing.T, objects ...fscache.Object) (p *past, m fscache.Mount, files map[string]*os.File) {
	t.Helper()
	p = begin(t, objects...)
	m = imageOf(t, objects...)
	if err := p.e.Mount(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	files = make(map[string]*os.File)
	for _, o := range objects {
		f, err := os.Open(filepath.Join(m.Dir, o.Key.ID))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		files[o.Key.ID] = f
		if err := control(f, func(fd int) error { return unix.Fadvise(fd, 0, 0, unix.FADV_RANDOM) }); err != nil {
			t.Fatal(err)
		}
		if o.Key.ID == "full" {
			for off := int64(0); off < o.Size; off += page {
				p.fill(fscache.Request{Object: o.Key, Off: off})
			}
			if err := p.e.Complete(o.Key); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := p.e.Close(); err != nil { // nobody holds the group
		t.Fatal(err)
	}
	return p, m, files
}

func TestAbandonedMountIsUnreadable(t *testing.T) {
	a, full := blobOf("a", 16), blobOf("full", 16)
	p, m, files := lose(t, a, full)
	b := make([]byte, page)
	if _, err := files["a"].ReadAt(b, 0); err != nil || !bytes.Equal(b, make([]byte, page)) {
		t.Fatalf("a read without the group: %v, %.20q; the kernel was known to give zeros", err, b)
	}
	p.open(fscache.Inherited{})
	go func() { _, _ = p.e.Next() }() // ends with Close
	if err := p.e.Abandon(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, page, 9 * page} { // also what was in the page cache
		if _, err := files["a"].ReadAt(b, off); !errors.Is(err, unix.EIO) {
			t.Errorf("read of the abandoned mount at %d: %v, %.20q, want EIO", off, err, b)
		}
	}
	if _, err := files["full"].ReadAt(b, page); err != nil || !bytes.Equal(b, pageOf(full.Key, page)) {
		t.Errorf("read of a complete blob: %v, %.20q", err, b)
	}
	if mounted, err := erofs.Mounted(m.Dir); err != nil || mounted {
		t.Errorf("still mounted: %v, %v", mounted, err)
	}

	// What is mounted anew does not meet what was.
	for _, o := range m.Blobs {
		add(t, p.e, o)
	}
	if have, err := p.e.Present(full.Key); err != nil || len(have) != 1 || have[0].Len != full.Size {
		t.Errorf("the complete blob has %v, %v", have, err)
	}
	if err := errors.Join(p.e.Complete(full.Key), p.e.Mount(t.Context(), m)); err != nil {
		t.Fatal(err)
	}
	if _, err := files["a"].ReadAt(b, 0); !errors.Is(err, unix.EIO) {
		t.Errorf("read of the abandoned mount when the image is mounted anew: %v, %.20q, want EIO", err, b)
	}
	if err := p.e.Unmount(t.Context(), m.Dir); err != nil {
		t.Error(err)
	}
	for _, f := range files {
		f.Close()
	}
	// Nothing is left of it: its marks go with the last descriptor.
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		_ = os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0)
		marks, err := markedInodes(p.e.group)
		if err != nil {
			t.Fatal(err)
		}
		if len(marks) == 1 { // of a as it was added anew
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("marks: %v, want one", marks)
		}
	}
}

func TestAbandonSaysWhatItCouldNotDoAndDoesTheRest(t *testing.T) {
	a, b := blobOf("a", 16), blobOf("b", 16)
	p, m, files := lose(t, a, b)
	p.open(fscache.Inherited{}, a)    // too early
	go func() { _, _ = p.e.Next() }() // ends with Close
	m.Blobs = append(m.Blobs, blobOf("missing", 1))
	err := p.e.Abandon(t.Context(), m)
	if err == nil || !strings.Contains(err.Error(), m.Dir) || !strings.Contains(err.Error(), "missing") || !strings.Contains(err.Error(), a.Key.String()) {
		t.Errorf("Abandon: %v", err)
	}
	if _, err := files["b"].ReadAt(make([]byte, page), 0); !errors.Is(err, unix.EIO) {
		t.Errorf("read of a blob that could be denied: %v, want EIO", err)
	}
	if mounted, err := erofs.Mounted(m.Dir); err != nil || mounted {
		t.Errorf("still mounted: %v, %v", mounted, err)
	}
}

func TestAbandonOfWhatIsNotMountedIsNoError(t *testing.T) {
	a := blobOf("a", 16)
	p, m, _ := lose(t, a)
	if err := erofs.Detach(m.Dir); err != nil {
		t.Fatal(err)
	}
	p.open(fscache.Inherited{})
	if err := p.e.Abandon(t.Context(), m); err != nil {
		t.Error(err)
	}
}
