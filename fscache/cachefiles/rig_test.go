package cachefiles

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/enginetest"
)

// patience bounds waits for what must happen.
const patience = 30 * time.Second

const blobSize = 1 << 20

// needDevice skips where the kernel has no cachefiles. With HOLDFAST_ENGINE=cachefiles it must have it, and TMPDIR must be
// on a file system that can hold a cache.
func needDevice(t testing.TB) {
	t.Helper()
	_, err := os.Stat(devicePath)
	if err != nil && os.Getenv("HOLDFAST_ENGINE") != Name {
		t.Skipf("no cachefiles in this kernel: %v (the virtual machine of the tests has it)", err)
	}
}

// hasRestore says whether the kernel delivers requests again. The test machine's 6.12 does, its 6.1 does not.
func hasRestore(t testing.TB) bool {
	t.Helper()
	f, err := openDevice()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := bind(f, Config{Dir: t.TempDir(), Tag: "probe"}); err != nil {
		t.Fatal(err)
	}
	err = command(f, "restore")
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		t.Fatal(err)
	}
	return err == nil
}

// needRestore skips on kernels that have none.
func needRestore(t testing.TB) {
	t.Helper()
	needDevice(t)
	if !hasRestore(t) {
		t.Skip("the kernel has no restore")
	}
}

// An image is a bootstrap with one blob, both in one domain.
type image struct {
	boot, blob fscache.Object
	bytes      []byte // the bootstrap
}

func newImage(t testing.TB, domain, boot, blob string) image {
	t.Helper()
	im := image{blob: fscache.Object{Key: fscache.Key{Domain: domain, ID: blob}, Size: blobSize}}
	b, err := enginetest.Bootstrap([]fscache.Object{im.blob})
	if err != nil {
		t.Fatal(err)
	}
	im.bytes = fscache.AlignedBuffer(len(b))
	copy(im.bytes, b)
	im.boot = fscache.Object{Key: fscache.Key{Domain: domain, ID: boot}, Size: int64(len(b))}
	return im
}

func (im image) mount(dir string) fscache.Mount {
	return fscache.Mount{Dir: dir, Bootstrap: im.boot, Blobs: []fscache.Object{im.blob}}
}

// add adds an image's objects.
func add(t testing.TB, e *Engine, images ...image) {
	t.Helper()
	for _, im := range images {
		if err := errors.Join(e.Add(context.Background(), im.boot), e.Add(context.Background(), im.blob)); err != nil {
			t.Fatal(err)
		}
	}
}

// openEngine opens an engine on dir; it is closed at the end.
func openEngine(t testing.TB, dir string, device *os.File) *Engine {
	t.Helper()
	return openWith(t, Config{Dir: dir, Inherited: fscache.Inherited{Lifeline: device}})
}

func openWith(t testing.TB, c Config) *Engine {
	t.Helper()
	if c.Log == nil {
		c.Log = zaptest.NewLogger(t)
	}
	var e *Engine
	var err error
	soon(t, "the device is free: of an engine that was closed, the last answer has returned", func() bool {
		e, err = Open(c)
		return !errors.Is(err, unix.EBUSY)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return e
}

// A policy answers one request, or returns false: then serve does.
type policy func(r fscache.Request) bool

// serve answers everything until the engine is closed: opens with OK, reads of bootstraps with their bytes, other reads by
// writing content. It ends with the engine.
func serve(t testing.TB, e *Engine, first policy, images ...image) {
	boots := make(map[fscache.Key][]byte)
	for _, im := range images {
		boots[im.boot.Key] = im.bytes
	}
	done := make(chan struct{})
	t.Cleanup(func() { // runs before openEngine's
		_ = e.Freeze()
		<-done
	})
	go func() { // ends when the engine is frozen or closed
		defer close(done)
		for {
			r, err := e.Next()
			if err != nil {
				if !errors.Is(err, fscache.ErrClosed) {
					t.Errorf("Next: %v", err)
				}
				return
			}
			if first != nil && first(r) {
				continue
			}
			fill(t, e, r, boots[r.Object])
		}
	}()
}

// fill writes what a request asks for, from boot or else content, and answers it.
func fill(t testing.TB, e *Engine, r fscache.Request, boot []byte) {
	t.Helper()
	if r.Op == fscache.OpRead {
		p, off := boot, int64(0)
		if p == nil {
			p, off = content(r.Object, r.Off, r.Len), r.Off
		}
		if err := e.WriteAt(r.Object, p, off); err != nil {
			t.Errorf("WriteAt for %v: %v", r, err)
		}
	}
	if err := e.Answer(r, fscache.OK); err != nil && !errors.Is(err, fscache.ErrGone) && !errors.Is(err, fscache.ErrClosed) {
		t.Errorf("Answer(%v): %v", r, err)
	}
}

// content is what a blob holds: its own name over and over.
func content(k fscache.Key, off, n int64) []byte {
	name := k.String() + "\n"
	p := fscache.AlignedBuffer(int(n))
	for i := range p {
		p[i] = name[(off+int64(i))%int64(len(name))]
	}
	return p
}

// mount mounts an image on a new directory, and unmounts it at the end if it is still there.
func mount(t testing.TB, e *Engine, im image) string {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	if err := e.Mount(context.Background(), im.mount(dir)); err != nil {
		t.Fatalf("Mount: %v", err)
	}
	return dir
}

// readPage reads one page of the file named k.ID, without read-ahead.
func readPage(dir string, k fscache.Key, page int64) ([]byte, error) {
	f, err := os.Open(filepath.Join(dir, k.ID))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		return nil, err
	}
	p := make([]byte, fscache.BlockSize)
	_, err = f.ReadAt(p, page*fscache.BlockSize)
	return p, err
}

// checkPage reads one page and compares it.
func checkPage(t testing.TB, dir string, k fscache.Key, page int64) {
	t.Helper()
	p, err := readPage(dir, k, page)
	if err != nil || !bytes.Equal(p, content(k, page*fscache.BlockSize, fscache.BlockSize)) {
		t.Errorf("page %d of %s: %v, right bytes: false", page, k, err)
	}
}

// soon waits for a condition that the kernel brings about in its own time.
func soon(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// dup copies a descriptor.
func dup(t testing.TB, f *os.File) *os.File {
	t.Helper()
	d, err := enginetest.Dup(f)
	if err != nil {
		t.Fatal(err)
	}
	return d
}
