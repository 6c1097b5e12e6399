package cachefiles

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// filled returns a cache directory in which the first pages of a blob are cached and nobody uses it, as after a boot, and the
// path of the blob's cache file.
func filled(t *testing.T, im image, pages int64) (cache, path string) {
	t.Helper()
	needDevice(t)
	cache = t.TempDir()
	e, err := Open(Config{Dir: cache})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	add(t, e, im)
	serve(t, e, nil, im)
	dir := mount(t, e, im)
	if err := e.WriteAt(im.blob.Key, content(im.blob.Key, 0, pages*fscache.BlockSize), 0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(e.Sync(im.blob.Key), e.Unmount(t.Context(), dir), e.Close()); err != nil {
		t.Fatal(err)
	}
	names := filepath.Join(cache, "cache", "I"+volumePrefix+volumeOf(im.blob.Key.Domain), "@*", "D"+im.blob.Key.ID)
	var found []string
	soon(t, "the kernel gave the cache file its name", func() bool {
		found, err = filepath.Glob(names)
		return err != nil || len(found) == 1
	})
	if err != nil {
		t.Fatal(err)
	}
	return cache, found[0]
}

func TestWrongBytesInACacheFileAreFoundBeforeItsFirstOpen(t *testing.T) {
	im := newImage(t, "reboot", "boot", "blob")
	cache, path := filled(t, im, 16)
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{'X'}, 5*fscache.BlockSize+7); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}

	e := openEngine(t, cache, nil)
	add(t, e, im)
	have, err := e.Present(im.blob.Key)
	if err != nil || !slices.Equal(have, []fscache.Extent{{Off: 0, Len: 16 * fscache.BlockSize}}) {
		t.Fatalf("Present: %v, %v, want the 16 pages", have, err)
	}
	p := make([]byte, fscache.BlockSize)
	for page := range int64(16) {
		if err := e.ReadAt(im.blob.Key, p, page*fscache.BlockSize); err != nil {
			t.Fatal(err)
		}
		right := bytes.Equal(p, content(im.blob.Key, page*fscache.BlockSize, fscache.BlockSize))
		if right != (page != 5) {
			t.Errorf("page %d was read back right: %v", page, right)
		}
	}
	if err := e.Drop(im.blob.Key, fscache.Extent{Off: 5 * fscache.BlockSize, Len: fscache.BlockSize}); err != nil {
		t.Fatal(err)
	}
	if err := e.ReadAt(im.blob.Key, p, 5*fscache.BlockSize); err != nil || !bytes.Equal(p, make([]byte, len(p))) {
		t.Errorf("what was dropped reads as %.8q, %v, want zeros", p, err)
	}
	var asked []int64
	serve(t, e, func(r fscache.Request) bool {
		if r.Op == fscache.OpRead && r.Object == im.blob.Key {
			asked = append(asked, r.Off/fscache.BlockSize)
		}
		return false
	}, im)
	dir := mount(t, e, im)
	for page := range int64(16) {
		checkPage(t, dir, im.blob.Key, page)
	}
	if err := e.Freeze(); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(asked, []int64{5}) {
		t.Errorf("the kernel asked for pages %v, want 5 alone", asked)
	}
}

func TestFileOfAnObjectTheKernelOpenedIsNotTouched(t *testing.T) {
	im := newImage(t, "opened", "boot", "blob")
	cache, _ := filled(t, im, 4)
	e := openEngine(t, cache, nil)
	add(t, e, im)
	serve(t, e, nil, im)
	refused := func(when string) {
		t.Helper()
		read := e.ReadAt(im.blob.Key, make([]byte, fscache.BlockSize), 0)
		drop := e.Drop(im.blob.Key, fscache.Extent{Off: 0, Len: fscache.BlockSize})
		if !errors.Is(read, errors.ErrUnsupported) || !errors.Is(drop, errors.ErrUnsupported) {
			t.Errorf("%s: ReadAt: %v, Drop: %v, want that they are not supported", when, read, drop)
		}
	}
	dir := mount(t, e, im)
	refused("while it is open")
	if err := e.Unmount(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	soon(t, "the object is closed", func() bool {
		_, err := e.Present(im.blob.Key)
		return errors.Is(err, fscache.ErrNotOpen)
	})
	refused("when it is closed, and the kernel may still be at its file")
	if err := e.Remove(im.blob.Key); err != nil {
		t.Fatal(err)
	}
	add(t, e, im)
	refused("when it was added anew")
}

func TestObjectWithoutACacheFileHoldsNothing(t *testing.T) {
	needDevice(t)
	im := newImage(t, "absent", "boot", "blob")
	e := openEngine(t, t.TempDir(), nil)
	add(t, e, im)
	p := bytes.Repeat([]byte{1}, fscache.BlockSize)
	have, err := e.Present(im.blob.Key)
	readErr := e.ReadAt(im.blob.Key, p, 0)
	dropErr := e.Drop(im.blob.Key, fscache.Extent{Off: 0, Len: fscache.BlockSize})
	if err != nil || readErr != nil || dropErr != nil || len(have) != 0 || !bytes.Equal(p, make([]byte, len(p))) {
		t.Errorf("Present: %v, %v; ReadAt: %.8q, %v; Drop: %v", have, err, p, readErr, dropErr)
	}
}

func TestCacheFileThatIsALinkIsNotFollowed(t *testing.T) {
	im := newImage(t, "link", "boot", "blob")
	cache, path := filled(t, im, 1)
	if err := errors.Join(os.Rename(path, path+"~"), os.Symlink(path+"~", path)); err != nil {
		t.Fatal(err)
	}
	e := openEngine(t, cache, nil)
	add(t, e, im)
	if _, err := e.Present(im.blob.Key); !errors.Is(err, unix.ELOOP) {
		t.Errorf("Present through a symbolic link: %v, want ELOOP", err)
	}
}

func TestFilesOfATakenOverCacheAreTheKernels(t *testing.T) {
	im, dir := newImage(t, "taken", "boot", "blob"), t.TempDir()
	s := newSupervisor(t, im)
	s.start("", 0)
	if err := <-startReader(t, im, dir); err != nil {
		t.Fatal(err)
	}
	s.kill()
	e := openWith(t, Config{Dir: s.cache, Inherited: s.left(), Holder: s})
	other := newImage(t, "taken", "boot2", "blob2")
	add(t, e, im, other)
	for _, k := range []fscache.Key{im.blob.Key, other.blob.Key} { // one that is open, and one that may be
		if err := e.ReadAt(k, make([]byte, fscache.BlockSize), 0); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("ReadAt of %s: %v, want that it is not supported", k, err)
		}
	}
	if _, err := e.Present(im.blob.Key); err != nil {
		t.Errorf("Present of an inherited object: %v", err)
	}
	if _, err := e.Present(other.blob.Key); !errors.Is(err, fscache.ErrNotOpen) {
		t.Errorf("Present of one that was not inherited: %v, want ErrNotOpen", err)
	}
}

func TestWhatAFileHoldsIsKnownOnceItsOpenIsAnswered(t *testing.T) {
	im := newImage(t, "open", "boot", "blob")
	cache, _ := filled(t, im, 16)
	e := openEngine(t, cache, nil)
	add(t, e, im)
	found := make(chan error, 1)
	serve(t, e, func(r fscache.Request) bool {
		if r.Op != fscache.OpOpen || r.Object != im.blob.Key {
			return false
		}
		err := e.Answer(r, fscache.OK)
		have, presentErr := e.Present(im.blob.Key)
		if !slices.Equal(have, []fscache.Extent{{Off: 0, Len: 16 * fscache.BlockSize}}) {
			err = fmt.Errorf("Present: %v, %w, want the 16 pages", have, presentErr)
		}
		found <- err
		return true
	}, im)
	mount(t, e, im)
	if err := <-found; err != nil {
		t.Error(err)
	}
}
