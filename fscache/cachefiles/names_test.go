package cachefiles

import (
	"errors"
	"strings"
	"testing"

	"holdfast/fscache"
	"holdfast/fscache/internal/erofs"
)

func TestNamesInTheKernelAreShortAndOfOneDomainEach(t *testing.T) {
	long := strings.Repeat("d", maxVolume)
	seen := map[string]string{}
	for _, d := range []string{"a", long, long + "d", long + "e", strings.Repeat("x", maxDomain), volumeOf(long + "d")} {
		v := volumeOf(d)
		if other, ok := seen[v]; ok {
			t.Errorf("domains %q and %q are both %q", d, other, v)
		}
		seen[v] = d
		if name := mountName(fscache.Key{Domain: d, ID: strings.Repeat("m", 16)}); len(name) > erofs.MaxName {
			t.Errorf("mount name %q has %d bytes, the kernel keeps %d", name, len(name), erofs.MaxName)
		}
	}
	if volumeOf(long) != long {
		t.Errorf("domain %q is %q: it needs no other name", long, volumeOf(long))
	}
}

func TestMountsOfLongDomainsDoNotCollide(t *testing.T) {
	needDevice(t)
	domain := strings.Repeat("long-", 12)
	one, two := newImage(t, domain, "m111111111111111", "blob"), newImage(t, domain, "m111111111111112", "blob")
	other := newImage(t, domain+"2", "m111111111111111", "blob")
	e := openEngine(t, t.TempDir(), nil)
	add(t, e, one, two, other)
	serve(t, e, nil, one, two, other)
	for _, im := range []image{one, two, other} {
		checkPage(t, mount(t, e, im), im.blob.Key, 1)
	}
}

func TestRemoveOfAMountedBootstrapIsBusyAfterATakeoverToo(t *testing.T) {
	needDevice(t)
	im := newImage(t, "mounted", "m111111111111111", "blob")
	e := openEngine(t, t.TempDir(), nil)
	add(t, e, im)
	serve(t, e, nil, im)
	dir := mount(t, e, im)
	// What a successor knows: the objects, and none of them open.
	s := &Engine{objects: map[fscache.Key]*object{im.boot.Key: {key: im.boot.Key, size: im.boot.Size, added: true}}}
	if err := s.Remove(im.boot.Key); !errors.Is(err, fscache.ErrBusy) {
		t.Errorf("Remove of a mounted bootstrap: %v, want ErrBusy", err)
	}
	if err := e.Unmount(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	for _, k := range []fscache.Key{im.boot.Key, im.blob.Key} {
		if err := e.Remove(k); err != nil {
			t.Errorf("Remove right after the unmount: %v", err)
		}
	}
}
