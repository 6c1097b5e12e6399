package cachefiles

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/fscache"
)

// names lists the files that the cache has for an object, in whatever directory.
func names(t *testing.T, cache string, k fscache.Key) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(cache, "cache", "I"+volumePrefix+volumeOf(k.Domain), "@*", "D"+k.ID))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestHashIsTheKernels(t *testing.T) {
	for _, tt := range []struct {
		k   fscache.Key
		fan int
	}{
		{fscache.Key{Domain: "a", ID: "b"}, 0x84},
		{fscache.Key{Domain: "name", ID: "blob"}, 0x38},
		{fscache.Key{Domain: "longer-name", ID: "b"}, 0xf9},
		{fscache.Key{Domain: "name", ID: strings.Repeat("0123456789abcdef", 4)}, 0x15},
		{fscache.Key{Domain: strings.Repeat("long-", 12), ID: "blob"}, 0x13},
	} {
		if got := fanOf(tt.k); got != tt.fan {
			t.Errorf("%s is in @%02x, want @%02x, where Linux 6.12 had it", tt.k, got, tt.fan)
		}
	}
}

func TestBlobHasANamedFileWhileItIsMounted(t *testing.T) {
	needDevice(t)
	for _, domain := range []string{"a", "name", "longer-name", strings.Repeat("long-", 12)} {
		for _, blob := range []string{"b", "blob", strings.Repeat("0123456789abcdef", 4)} {
			t.Run(domain+" "+blob, func(t *testing.T) {
				im, cache := newImage(t, domain, "boot", blob), t.TempDir()
				e := openEngine(t, cache, nil)
				add(t, e, im)
				serve(t, e, nil, im)
				dir := mount(t, e, im)
				checkPage(t, dir, im.blob.Key, 3)
				found := names(t, cache, im.blob.Key)
				if len(found) != 1 {
					t.Fatalf("files of the blob: %v, want one", found)
				}
				b, err := os.ReadFile(found[0])
				if err != nil {
					t.Fatal(err)
				}
				const off = 3 * fscache.BlockSize
				if len(b) != blobSize || !bytes.Equal(b[off:off+fscache.BlockSize], content(im.blob.Key, off, fscache.BlockSize)) {
					t.Errorf("it has %d bytes, want %d, and that it holds what was read", len(b), blobSize)
				}
				if err := e.Unmount(t.Context(), dir); err != nil {
					t.Fatal(err)
				}
				soon(t, "the object can be removed", func() bool { return e.Remove(im.blob.Key) == nil })
				if after := names(t, cache, im.blob.Key); len(after) != 1 || after[0] != found[0] {
					t.Errorf("after the unmount: %v, want %v", after, found)
				}
			})
		}
	}
}

func TestUnnamedFileOfTheKernelsTakesThePlaceOfOneThatHasTheName(t *testing.T) {
	needDevice(t)
	im, cache := newImage(t, "late", "boot", "blob"), t.TempDir()
	e := openEngine(t, cache, nil)
	// The kernel does not take a file that says another size, and makes one of its own.
	other := im
	other.blob.Size += fscache.BlockSize
	if err := e.nameFile(&object{key: other.blob.Key, size: other.blob.Size}); err != nil {
		t.Fatal(err)
	}
	add(t, e, im)
	serve(t, e, nil, im)
	dir := mount(t, e, im)
	checkPage(t, dir, im.blob.Key, 1)
	path := pathIn(cache, im.blob.Key, fanOf(im.blob.Key))
	if fi, err := os.Stat(path); err != nil || fi.Size() != other.blob.Size {
		t.Fatalf("while it is mounted: %v, %v, want the file of another size", fi, err)
	}
	if err := e.Unmount(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	soon(t, "the kernel's file has the name", func() bool {
		fi, err := os.Stat(path)
		return err == nil && fi.Size() == blobSize
	})
	if found := names(t, cache, im.blob.Key); len(found) != 1 {
		t.Errorf("files of the blob: %v, want one", found)
	}
}

func TestVolumeWhoseAttributeAPowerFailureTookIsOfUseAgain(t *testing.T) {
	needDevice(t)
	im, cache := newImage(t, "bare", "boot", "blob"), t.TempDir()
	if err := os.MkdirAll(filepath.Join(cache, "cache", "I"+volumePrefix+"bare"), 0o700); err != nil {
		t.Fatal(err)
	}
	e := openEngine(t, cache, nil)
	add(t, e, im)
	serve(t, e, nil, im)
	checkPage(t, mount(t, e, im), im.blob.Key, 1)
}
