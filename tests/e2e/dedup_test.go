package e2e

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/daemon"
	"holdfast/rafs/image"
	"holdfast/tests/host"
	"holdfast/tests/link"
)

// blobSizes are the sizes of an image's blob files, by id.
func blobSizes(t *testing.T, ref string) map[string]int64 {
	t.Helper()
	img, err := image.Open(t.Context(), ref, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	sizes := make(map[string]int64)
	for _, b := range img.Blobs {
		sizes[b.Info.ID] = b.Source.Size()
	}
	return sizes
}

func TestImageMadeWithAChunkDictionaryShowsTheSameThroughTheKernel(t *testing.T) {
	h := newHost(t)
	convert := func(m model, tag string, flags ...string) string {
		tarball := filepath.Join(h.Dir, tag+".tar")
		m.writeTar(t, tarball)
		ref := "oci:" + filepath.Join(h.Dir, tag) + ":v1" // a layout of its own: what it needs of the dictionary is copied
		h.must(append(append([]string{"convert"}, flags...), "tar:"+tarball, ref)...)
		h.must("check", ref)
		h.must("inspect", ref)
		return ref
	}
	const big = 6
	a := convert(bigFiles(big), "a")
	for _, seed := range seeds(t, 1) {
		m := bigFiles(big)
		maps.Copy(m, randomTree(seed))
		b := convert(m, "b", "--chunk-dict", a)
		dict, sizes := blobSizes(t, a), blobSizes(t, b)
		for id := range dict {
			if _, ok := sizes[id]; !ok {
				t.Errorf("blob %s of the dictionary is no blob of the image", id)
			}
			delete(sizes, id)
		}
		for id, n := range sizes {
			plain := blobSizes(t, convert(m, "plain"))
			for _, whole := range plain {
				if n > whole-big<<20 {
					t.Errorf("blob %s has %d bytes, without the dictionary it would have %d", id, n, whole)
				}
			}
		}
		if len(sizes) != 1 {
			t.Errorf("blobs of its own: %v, want one", sizes)
		}
		if err := os.RemoveAll(strings.TrimSuffix(strings.TrimPrefix(a, "oci:"), ":v1")); err != nil { // it stands on its own
			t.Fatal(err)
		}
		dir := h.mount(b, "--prefetch=off")
		m.compare(t, dir)
		dropCaches(t)
		m.compare(t, dir)
		if t.Failed() {
			t.Fatalf("replay with HOLDFAST_SEED=%d go test -run %s ./tests/e2e", seed, t.Name())
		}
	}
}

func TestSecondImageWithTheSameFilesInAnotherBlobFetchesNextToNothing(t *testing.T) {
	s := fetchesNextToNothing(t, newHost(t))
	if s.Engine == "cachefiles" {
		return // which cannot read its cache
	}
	t.Run("and takes next to no space on XFS", func(t *testing.T) {
		h, _ := diskHost(t, "400M", []string{"mkfs.xfs", "-q"})
		fetchesNextToNothing(t, h)
		h.until("what was copied shares its space", func() bool { s := h.fullStatus(); return s.Copied > 0 && s.Reflinked == s.Copied })
	})
}

func fetchesNextToNothing(t *testing.T, h *testHost) host.Status {
	const files = 6
	l, a, m := counted(t, h, link.Config{}, files)
	other := bigFiles(files + 1) // the same files and one more
	tarball := filepath.Join(h.Dir, "other.tar")
	other.writeTar(t, tarball)
	b := strings.Replace(a, "/big:1", "/other:1", 1)
	h.must("convert", "tar:"+tarball, b)
	for id := range blobSizes(t, a) {
		if _, ok := blobSizes(t, b)[id]; ok {
			t.Fatalf("the images share blob %s", id)
		}
	}
	m.compare(t, h.mount(a, "--prefetch=off"))
	dir := h.mount(b, "--prefetch=off")
	_, before := l.Bytes()
	other.compare(t, dir)
	_, after := l.Bytes()
	s, err := h.Status()
	if err != nil {
		t.Fatal(err)
	}
	// The one more does not compress. An engine that cannot read its cache copies nothing.
	want := int64(1 << 20)
	if s.Engine == "cachefiles" {
		want = (files + 1) << 20
	}
	if got := after - before; got < want || got > want+want/10 {
		t.Errorf("the registry sent %d bytes for the second image, want %d and little more", got, want)
	}
	if want := int64((files+1)<<20) - want; s.Copied != want {
		t.Errorf("status says that %d bytes were copied, want %d", s.Copied, want)
	}
	var sharing daemon.Sharing
	if err := json.Unmarshal([]byte(h.must("images", "--dedup", "--json")), &sharing); err != nil {
		t.Fatal(err)
	}
	if sharing.Host.Copied != s.Copied || sharing.Host.Images != 2 || sharing.Host.Shared != 0 {
		t.Errorf("holdfast images --dedup says %+v", sharing)
	}
	if out := h.must("images", "--dedup"); !strings.Contains(out, b) || !strings.Contains(out, "(host)") {
		t.Errorf("holdfast images --dedup prints %q", out)
	}
	dropCaches(t)
	other.compare(t, dir)
	return s
}
