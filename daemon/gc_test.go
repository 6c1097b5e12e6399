package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
	"holdfast/rafs/image"
	"holdfast/state"
)

// A collector is a daemon over a simulated kernel on which images come and go.
type collector struct {
	*testing.T
	*Daemon
	kernel *simkernel.Kernel
}

func newCollector(t *testing.T, k *simkernel.Kernel, root string) *collector {
	t.Helper()
	d, _ := newTestDaemon(t, k, root, func(o *Options) { o.Prefetch = true })
	d.pump.start()
	return &collector{t, d, k}
}

// mounted mounts an image until the returned function is called, which waits for all of it to be cached.
func (c *collector) mounted(im simImage, domain string) (dir string, unmount func()) {
	c.Helper()
	dir = c.TempDir()
	m, err := c.mount(c.Context(), MountRequest{Image: im.ref, Dir: dir, Domain: domain})
	if err != nil {
		c.Fatal(err)
	}
	return dir, func() {
		c.Helper()
		for id, want := range im.blobs {
			p := make([]byte, len(want))
			if err := c.kernel.Read(c.Context(), dir, fscache.Key{Domain: domain, ID: id}, p, 0); err != nil {
				c.Fatal(err)
			}
		}
		if err := c.unmount(c.Context(), m.record.Dir); err != nil {
			c.Fatal(err)
		}
	}
}

func (c *collector) cached(domain, id string) bool {
	c.Helper()
	n, err := c.engine.Usage(fscache.Key{Domain: domain, ID: id})
	if err != nil {
		c.Fatal(err)
	}
	return n > 0
}

func (c *collector) saved(im simImage) bool {
	dir, err := c.imageDir(im.digest)
	return err == nil && isDir(dir)
}

// decision finds the one about a thing.
func decision(t *testing.T, r GCReport, what, name string) Decision {
	t.Helper()
	i := slices.IndexFunc(r.Decisions, func(x Decision) bool { return x.What == what && x.Name == name })
	if i < 0 {
		t.Fatalf("nothing is decided about %s %s: %+v", what, name, r.Decisions)
	}
	return r.Decisions[i]
}

func TestOnlyTheReferenceGraphDecidesWhatIsRemoved(t *testing.T) {
	images := layeredImages(t, []int{1, 2}, []int{2, 3})
	c := newCollector(t, simkernel.New(simkernel.Fanotify), t.TempDir())
	defer c.close()
	own, shared := images[0].ids[0], images[0].ids[1]
	dir, unmount := c.mounted(images[0], "d")
	_, unmountOther := c.mounted(images[1], "d")

	var e *Error
	if _, err := c.removeImages(t.Context(), []string{images[1].ref, images[0].digest}); !errors.As(err, &e) || e.Code != CodeConflict || !strings.Contains(e.Message, "is mounted on") {
		t.Errorf("removing mounted images: %v, want a conflict that says where", err)
	}
	r, err := c.gc(t.Context(), false)
	if x := decision(t, r, WhatImage, images[0].digest); err != nil || x.Remove || !strings.Contains(x.Why, dir) {
		t.Errorf("gc (%v) of a mounted image: %+v", err, x)
	}
	if x := decision(t, r, WhatObject, "d/"+shared); x.Remove || !strings.Contains(x.Why, images[0].ref) || !strings.Contains(x.Why, images[1].ref) {
		t.Errorf("gc of a shared blob: %+v, want both images named", x)
	}
	unmount()
	unmountOther()
	if r, err = c.gc(t.Context(), false); err != nil || slices.ContainsFunc(r.Decisions, func(x Decision) bool { return x.Remove }) || r.Freed != 0 {
		t.Errorf("gc of what is on record and not mounted: %+v, %v", r, err)
	}
	if !c.cached("d", own) || !c.cached("d", shared) {
		t.Fatal("nothing is cached")
	}

	r, err = c.removeImages(t.Context(), []string{images[0].ref})
	if err != nil || c.cached("d", own) || !c.cached("d", shared) || c.saved(images[0]) || !c.saved(images[1]) {
		t.Errorf("after the removal (%v): %+v; cached are its own blob: %v, the shared one: %v", err, r, c.cached("d", own), c.cached("d", shared))
	}
	if x := decision(t, r, WhatObject, "d/"+own); !x.Remove || x.Bytes == 0 || r.Freed < x.Bytes {
		t.Errorf("the blob that is freed: %+v of %d", x, r.Freed)
	}
	if _, err := c.removeImages(t.Context(), []string{images[0].ref}); !errors.As(err, &e) || e.Code != CodeNotFound {
		t.Errorf("removing it again: %v", err)
	}
}

func TestDryRunSaysWhatGCDoesAndDoesNothing(t *testing.T) {
	im := layeredImages(t, []int{1, 2})[0]
	c := newCollector(t, simkernel.New(simkernel.Fanotify), t.TempDir())
	defer c.close()
	_, unmount := c.mounted(im, "d")
	unmount()
	if _, err := c.state.RetireImage(im.digest); err != nil { // and the process died
		t.Fatal(err)
	}
	before, err := c.state.Export()
	if err != nil {
		t.Fatal(err)
	}
	dry, err := c.gc(t.Context(), true)
	if after, err2 := c.state.Export(); err != nil || err2 != nil || len(after.Images) != len(before.Images) || len(after.Objects) != len(before.Objects) || !c.saved(im) || !c.cached("d", im.ids[0]) {
		t.Errorf("a dry run changed something: %v, %v, %+v", err, err2, after)
	}
	wet, err := c.gc(t.Context(), false)
	if err != nil || dry.Freed != wet.Freed || wet.Freed == 0 || !dry.DryRun || len(dry.Decisions) != len(wet.Decisions) {
		t.Errorf("gc %+v, %v; dry run %+v", wet, err, dry)
	}
	if c.saved(im) || c.cached("d", im.ids[0]) {
		t.Error("it is still there")
	}
}

func TestLeftoversOfSavesAreRemovedAndNothingElse(t *testing.T) {
	images := layeredImages(t, []int{1}, []int{2})
	c := newCollector(t, simkernel.New(simkernel.Fanotify), t.TempDir())
	defer c.close()
	_, unmount := c.mounted(images[0], "d")
	defer unmount()
	_, gone := c.mounted(images[1], "d")
	gone()
	root := filepath.Join(c.opt.Root, imagesDir)
	name := strings.TrimPrefix(images[0].digest, "sha256:")
	lost := strings.TrimPrefix(images[1].digest, "sha256:")
	if err := os.Rename(filepath.Join(root, lost), filepath.Join(root, lost+image.Unfinished+"7"+image.Replaced)); err != nil {
		t.Fatal(err) // a save died between its two renames: this is all there is
	}
	stranger := strings.Repeat("ab", 32)
	remove := []string{name + image.Unfinished + "1", name + image.Unfinished + "2" + image.Replaced, stranger, stranger + image.Unfinished + "1"}
	keep := []string{"notes", "0123", name + ".bak", lost + image.Unfinished + "7" + image.Replaced, name}
	for _, n := range append(slices.Clone(remove), keep[:3]...) {
		if err := os.Mkdir(filepath.Join(root, n), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	r, err := c.gc(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range remove {
		if isDir(filepath.Join(root, n)) || !decision(t, r, WhatLeftover, n).Remove {
			t.Errorf("%s is still there", n)
		}
	}
	for _, n := range keep {
		if !isDir(filepath.Join(root, n)) {
			t.Errorf("%s is gone", n)
		}
	}
}

func TestARemovalThatAProcessDiedOverIsFinishedByTheNext(t *testing.T) {
	images := layeredImages(t, []int{1, 2}, []int{2, 3})
	k, root := simkernel.New(simkernel.Fanotify), t.TempDir()
	c := newCollector(t, k, root)
	for _, im := range images {
		_, unmount := c.mounted(im, "d")
		unmount()
	}
	_, err := c.state.RetireImage(images[0].digest)
	if err == nil {
		_, err = c.state.RetireObjects(func(g *state.Graph, o state.Object) bool { return !g.Needed(o) })
	}
	if err := errors.Join(err, c.close()); err != nil {
		t.Fatal(err)
	}
	next := newCollector(t, k, root)
	defer next.close()
	next.tidy(t.Context())
	next.makeRoom(t.Context())
	if next.saved(images[0]) || next.cached("d", images[0].ids[0]) {
		t.Error("what was being removed is still there")
	}
	if !next.saved(images[1]) || !next.cached("d", images[0].ids[1]) || !next.cached("d", images[1].ids[1]) {
		t.Error("more was removed than was begun")
	}
	g, err := next.state.Graph()
	if err != nil || len(g.Images) != 1 || len(g.Objects) != 2 {
		t.Errorf("on record are %+v, %v", g, err)
	}
}

func TestOneReferenceThatStoodForTwoImagesIsNotGuessedAt(t *testing.T) {
	g := func(images ...state.Image) *state.Graph { return &state.Graph{Images: images} }
	a, b := state.Image{Digest: "sha256:a", Ref: "oci:/x:y"}, state.Image{Digest: "sha256:b", Ref: "oci:/x:y"}
	var e *Error
	if _, err := resolve(g(a, b), []string{"oci:/x:y"}); !errors.As(err, &e) || e.Code != CodeConflict || !strings.Contains(e.Message, "sha256:a, sha256:b") {
		t.Errorf("%v, want a conflict that lists them", err)
	}
	list, err := resolve(g(a, b), []string{"sha256:b", "sha256:b"})
	if err != nil || len(list) != 1 || list[0].Digest != "sha256:b" {
		t.Errorf("by digest: %+v, %v", list, err)
	}
}
