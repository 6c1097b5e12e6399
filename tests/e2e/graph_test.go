package e2e

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"holdfast/daemon"
	"holdfast/tests/link"
	"holdfast/tests/registry"
)

// layer is a layer with one file of 1 MiB, "l<n>", and its content.
func layer(t *testing.T, n int) (v1.Layer, []byte) {
	t.Helper()
	content := randomBytes(rand.New(rand.NewPCG(uint64(n), 4)), 1<<20, 8)
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Name: fmt.Sprint("l", n), Mode: 0o644, Size: int64(len(content))})
	if _, err2 := w.Write(content); err != nil || err2 != nil || w.Close() != nil {
		t.Fatal(err, err2)
	}
	return static.NewLayer(b.Bytes(), types.OCIUncompressedLayer), content
}

// A stack is an image of layers in a registry, and what its files hold.
type stack struct {
	image string
	files map[string][]byte
}

func (s stack) compare(t *testing.T, dir string) {
	t.Helper()
	for name, want := range s.files {
		if got, err := readFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s of %s: %v, or wrong bytes, %d of %d", name, dir, err, len(got), len(want))
		}
	}
}

// stacks starts a registry behind a link, with an image of each list of layers in it.
func stacks(t *testing.T, h *testHost, lists ...[]int) (l *link.Link, images []stack) {
	t.Helper()
	reg, err := registry.Start(filepath.Join(h.Dir, "registry"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { reg.Close() })
	if l, err = link.Start(reg.Addr(), link.Config{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	for n, list := range lists {
		s := stack{image: fmt.Sprintf("docker://%s/stack%d:1", l.Addr(), n), files: map[string][]byte{}}
		var img v1.Image = mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1)
		for _, k := range list {
			one, content := layer(t, k)
			s.files[fmt.Sprint("l", k)] = content
			if img, err = mutate.AppendLayers(img, one); err != nil {
				t.Fatal(err)
			}
		}
		cfg, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		cfg = cfg.DeepCopy()
		cfg.OS, cfg.Architecture = "linux", "amd64"
		if img, err = mutate.ConfigFile(img, cfg); err != nil {
			t.Fatal(err)
		}
		plain := filepath.Join(h.Dir, fmt.Sprint("plain", n))
		p, err := layout.Write(plain, empty.Index)
		if err == nil {
			err = p.AppendImage(img)
		}
		if err != nil {
			t.Fatal(err)
		}
		h.must("convert", "oci:"+plain, fmt.Sprintf("docker://%s/stack%d:1", reg.Addr(), n))
		images = append(images, s)
	}
	return l, images
}

func numbers(from, to int) (list []int) {
	for i := from; i < to; i++ {
		list = append(list, i)
	}
	return list
}

// whole mounts an image, waits until all of it is cached, and says how many bytes the registry sent for it.
func (h *testHost) whole(l *link.Link, s stack, flags ...string) (dir string, fetched int64) {
	h.t.Helper()
	_, before := l.Bytes()
	dir = h.mount(s.image, flags...)
	if err := h.WaitComplete(dir); err != nil {
		h.t.Fatal(err)
	}
	_, after := l.Bytes()
	s.compare(h.t, dir)
	return dir, after - before
}

func TestSecondImageFetchesOnlyWhatIsNew(t *testing.T) {
	h := newHost(t)
	const layers, own = 20, 2 // a tenth
	l, images := stacks(t, h, numbers(0, layers), numbers(own, layers+own))
	_, first := h.whole(l, images[0])
	_, second := h.whole(l, images[1])
	t.Logf("the first image made the registry send %d bytes, the second %d: %.1f %%", first, second, 100*float64(second)/float64(first))
	if first < layers<<20 || 100*second > 12*first {
		t.Errorf("the registry sent %d bytes for the first image and %d for the second, want at most 12 %% of that", first, second)
	}
}

func TestSameImageTwiceSharesInADomainAndNotBetweenTwo(t *testing.T) {
	h := newHost(t)
	const layers = 4
	l, images := stacks(t, h, numbers(0, layers))
	one, first := h.whole(l, images[0])
	again, second := h.whole(l, images[0])
	other, third := h.whole(l, images[0], "--domain", "other")
	if second > 1<<20 || third < layers<<20 {
		t.Errorf("the registry sent %d bytes for the first mount, %d for another in its domain, %d for one in another domain", first, second, third)
	}
	domains := map[string]int{}
	var status struct{ Mounts []daemon.MountInfo }
	if err := json.Unmarshal([]byte(h.must("status", "--json")), &status); err != nil {
		t.Fatal(err)
	}
	for _, m := range status.Mounts {
		domains[m.Domain]++
	}
	own := ""
	for d := range domains {
		if d != "other" {
			own = d
		}
	}
	if len(domains) != 2 || domains["other"] != 1 || !strings.HasPrefix(own, "127.0.0.1-") {
		t.Errorf("domains are %v, want one of the registry and the other", domains)
	}
	for _, dir := range []string{again, one} { // whichever goes, the rest is whole
		h.must("umount", dir)
		dropCaches(t)
		images[0].compare(t, other)
		if dir == again {
			images[0].compare(t, one)
		}
	}
}

func (h *testHost) collect(args ...string) (r daemon.GCReport) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(h.must(args...)), &r); err != nil {
		h.t.Fatal(err)
	}
	return r
}

// removed are the names of what was removed, of a kind.
func removed(r daemon.GCReport, what string) (names []string) {
	for _, x := range r.Decisions {
		if x.What == what && x.Remove && x.Failed == "" {
			names = append(names, x.Name)
		}
	}
	slices.Sort(names)
	return names
}

func TestRemovedImageFreesWhatNoOtherNeeds(t *testing.T) {
	h := newHost(t)
	l, images := stacks(t, h, numbers(0, 4), numbers(2, 6))
	one, _ := h.whole(l, images[0])
	two, _ := h.whole(l, images[1])
	if out, err := h.Run("images", "rm", images[0].image); err == nil || !strings.Contains(err.Error(), one) {
		t.Errorf("removing a mounted image: %v, %s: want refused with where it is mounted", err, out)
	}
	h.must("umount", one)
	h.must("gc") // of the mount's bootstrap, if the daemon has not deleted it yet
	if r := h.collect("gc", "--json"); r.Freed != 0 || len(removed(r, daemon.WhatObject)) != 0 {
		t.Errorf("gc freed %d of what is on record", r.Freed)
	}
	r := h.collect("images", "rm", "--json", images[0].image)
	if n := len(removed(r, daemon.WhatObject)); n != 2 || r.Freed < 2<<20 {
		t.Errorf("%d objects were removed, %d bytes freed; want the two layers of its own: %+v", n, r.Freed, r)
	}
	dropCaches(t)
	images[1].compare(t, two)
	h.kill() // and the next daemon knows the same
	h.until("a daemon serves", func() bool { _, err := h.Run("status"); return err == nil })
	if out := h.must("images"); strings.Contains(out, images[0].image) || !strings.Contains(out, images[1].image) {
		t.Errorf("images:\n%s", out)
	}
	h.must("umount", two)
	h.must("images", "rm", images[1].image)
	h.until("nothing is left", func() bool { return len(h.collect("gc", "--dry-run", "--json").Decisions) == 0 })
	var left []string
	err := filepath.WalkDir(filepath.Join(h.Dir, "root", "cache"), func(path string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			left = append(left, path)
		}
		return err
	})
	if len(left) > 0 || err != nil {
		t.Errorf("cache files are left: %q, %v", left, err)
	}
}

func TestFlippedBitsUnderACompleteObjectAreFoundAndRepaired(t *testing.T) {
	h := newHost(t)
	l, images := stacks(t, h, numbers(0, 3))
	mnt, _ := h.whole(l, images[0])
	if h.engine() != "fanotify" {
		if out, err := h.Run("check", "--cache"); err == nil || !strings.Contains(out, "not checked: the kernel has it open") {
			t.Errorf("check: %v, %s: want that nothing can be read back", err, out)
		}
		t.Skipf("engine %s cannot read back what the kernel has open, as it has just said", h.engine())
	}
	h.must("check", "--cache")
	files, err := filepath.Glob(filepath.Join(h.Dir, "root", "cache", "fanotify", "*", "*"))
	if err != nil || len(files) != 3 {
		t.Fatalf("cache files %q, %v", files, err)
	}
	f, err := os.OpenFile(files[1], os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const at = 12345
	p := make([]byte, 1)
	if _, err := f.ReadAt(p, at); err != nil {
		t.Fatal(err)
	}
	p[0] ^= 4
	if _, err := f.WriteAt(p, at); err != nil {
		t.Fatal(err)
	}
	_, before := l.Bytes()
	var r daemon.CacheReport
	out, err := h.Run("check", "--cache", "--json")
	if err == nil || json.Unmarshal([]byte(out), &r) != nil || r.Bad != 1 {
		t.Errorf("check of a flipped bit: %v, %s: want one bad chunk and an error", err, out)
	}
	if err := json.Unmarshal([]byte(h.must("check", "--cache", "--repair", "--json", images[0].image)), &r); err != nil || r.Bad != 1 || r.Repaired != 1 {
		t.Errorf("repair: %+v, %v", r, err)
	}
	if _, after := l.Bytes(); after-before > 5<<18 {
		t.Errorf("the registry sent %d bytes for one chunk of 1 MiB", after-before)
	}
	h.must("check", "--cache")
	dropCaches(t)
	images[0].compare(t, mnt)
}
