package image

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs"
	"holdfast/rafs/bootstrap"
	"holdfast/rafs/convert"
	"holdfast/rafs/oci"
	"holdfast/rafs/source"
	"holdfast/rafs/tree"
)

func TestFixtureChecksClean(t *testing.T) {
	r, err := Check(t.Context(), "rafs:"+fixtures(t)+"/rafs-v6/rafs-v6-2.2.boot", Options{}, nil)
	if err != nil || r.Files != 2 || r.Directories != 1 || r.Chunks != 2 || r.ChunkBytes != 30331 || r.LayerDigests != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestHardLinksAreCountedOnce(t *testing.T) {
	src := t.TempDir()
	if err := os.WriteFile(src+"/a", random(1, 70000), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(src+"/a", src+"/b"); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "layout")
	if _, err := convert.Run(t.Context(), convert.Options{Source: "dir:" + src, Dest: "oci:" + dir + ":v1", ChunkSize: 64 << 10}); err != nil {
		t.Fatal(err)
	}
	r, err := Check(t.Context(), "oci:"+dir, Options{}, nil)
	if err != nil || r.Files != 1 || r.References != 2 {
		t.Errorf("%+v, %v", r, err)
	}
	d, err := Inspect(t.Context(), "oci:"+dir, Options{}, false)
	if err != nil || d.Dedup.FileBytes != 70000 || d.Dedup.References != 2 || d.Dedup.SharedBytes != 0 || d.Tree[1].Nlink != 2 || d.Tree[2].Nlink != 2 {
		t.Errorf("%+v, %v", d, err)
	}
}

func TestReferencesAreFoundByWhatTheyHold(t *testing.T) {
	row := func(off, stored uint64, size uint32) rafs.Chunk {
		return rafs.Chunk{Offset: off, BlobOffset: stored, Size: size, Stored: size}
	}
	// Rows at 0, 4096 (5000 bytes, so up to 12288), a gap of one block, and at 16384 and 20480.
	table, err := rafs.NewTable([]rafs.Chunk{row(0, 0, 4096), row(4096, 4096, 5000), row(16384, 9096, 4096), row(20480, 13192, 100)}, 24576, 20000, rafs.Blake3)
	if err != nil {
		t.Fatal(err)
	}
	img := &Image{Blobs: []*Blob{{Table: table, Info: rafs.BlobInfo{ChunkCount: 4}}}}
	f := img.rowFinders()[0]
	for _, tt := range []struct {
		off, n uint64
		index  uint64 // of the first chunk in the blob's own array
		chunks int
		says   string
	}{
		{0, 4096, 0, 1, ""},
		{4096, 5000, 1, 1, ""},
		{0, 9096, 0, 2, ""},     // a reference to two neighbours
		{16384, 4196, 2, 2, ""}, // behind a gap, which is no chunk of the blob
		{16384, 4096, 2, 1, ""},
		{0, 4095, 0, 0, "have 4096 bytes"},
		{0, 4097, 0, 0, "have 9096 bytes"},
		{4096, 8192 + 4096, 0, 0, "runs over the end of the blob's chunk at object offset 4096"},
		{12288, 4096, 0, 0, "no data at object offset 12288"},
		{8192, 904, 0, 0, "no chunk of the blob begins there"},
		{24576, 1, 0, 0, "no chunk of the blob begins there"},
	} {
		first, last, err := f.find(tt.off, tt.n)
		if tt.says != "" {
			contains(t, err, tt.says)
			continue
		}
		if err != nil || last-first != tt.chunks || f.index(first) != tt.index {
			t.Errorf("%d+%d: rows %d to %d, index %d, %v; want %+v", tt.off, tt.n, first, last, f.index(first), err, tt)
		}
	}
}

// Two chunks may be stored in the same bytes: the second one is read anew.
func TestChunksThatShareStoredBytesAreChecked(t *testing.T) {
	data := random(1, 8192)
	path := filepath.Join(t.TempDir(), "blob")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	chunk := func(off uint64, p []byte, at uint64) rafs.Chunk {
		return rafs.Chunk{Offset: off, BlobOffset: at, Size: uint32(len(p)), Stored: uint32(len(p)), Digest: rafs.SHA256.Sum(p)}
	}
	table, err := rafs.NewTable([]rafs.Chunk{chunk(0, data, 0), chunk(8192, data[100:5000], 100), chunk(16384, data[7000:], 7000)}, 20480, 8192, rafs.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	src := source.NewFile(path, 8192)
	defer src.Close()
	c := &checker{img: &Image{store: directory{}, Blobs: []*Blob{{Table: table, Source: src}}}}
	if err := c.checkBlob(t.Context(), 0); err != nil || len(c.report.Damage) > 0 || c.report.Chunks != 3 {
		t.Errorf("%+v, %v", c.report, err)
	}
}

func TestLastBootstrapLayerCounts(t *testing.T) {
	dir := makeLayout(t, sample(), convert.Options{})
	want := open(t, "oci:"+dir)
	other := putBlob(t, dir, []byte("not a tar"))
	rewrite(t, dir, func(m *ocispec.Manifest) {
		d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: other, Size: 9, Annotations: map[string]string{oci.AnnotationBootstrap: "true"}}
		m.Layers = append([]ocispec.Descriptor{d}, m.Layers...)
	})
	if img := open(t, "oci:"+dir); string(img.Bootstrap) != string(want.Bootstrap) {
		t.Error("another bootstrap was taken")
	}
}

func TestManifestOfAnotherSizeIsRefused(t *testing.T) {
	dir := makeLayout(t, sample(), convert.Options{})
	var idx ocispec.Index
	readJSON(t, dir+"/index.json", &idx)
	idx.Manifests[0].Size++
	writeJSON(t, dir+"/index.json", idx)
	_, err := Open(t.Context(), "oci:"+dir, Options{})
	contains(t, err, "bytes instead of")
}

// bareBootstrap writes a bootstrap of one empty directory and these blobs, and returns a reference to it.
func bareBootstrap(t *testing.T, ids ...string) string {
	t.Helper()
	boot := &bootstrap.Image{Root: tree.NewRoot(), ChunkSize: rafs.DefaultChunkSize, Codec: rafs.CodecZstd}
	for _, id := range ids {
		boot.Blobs = append(boot.Blobs, rafs.BlobInfo{ID: id, ChunkSize: rafs.DefaultChunkSize, Codec: rafs.CodecZstd})
	}
	b, err := bootstrap.Write(boot)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "boot")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		if err := os.WriteFile(filepath.Join(filepath.Dir(path), id), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return "rafs:" + path
}

func TestBlobListedTwiceOrWithoutAnIDIsRefused(t *testing.T) {
	id := strings.Repeat("ab", 32)
	_, err := Open(t.Context(), bareBootstrap(t, id, id), Options{})
	contains(t, err, id)
	_, err = Open(t.Context(), bareBootstrap(t, rafs.PlaceholderID), Options{})
	contains(t, err, "merged")
	img := open(t, bareBootstrap(t))
	if len(img.Plan()) != 0 {
		t.Errorf("an image without blobs has the plan %v", img.Plan())
	}
}

func TestSavedBlobsMustBeTheBootstraps(t *testing.T) {
	img := open(t, "oci:"+makeOCI(t, map[string][]byte{"a": random(1, 100)}, map[string][]byte{"b": random(2, 100)}))
	for name, change := range map[string]func(dir string, s *saved){
		"id":      func(_ string, s *saved) { s.Blobs[0].ID = s.Blobs[1].ID },
		"size":    func(_ string, s *saved) { s.Blobs[0].Size = -1 },
		"missing": func(_ string, s *saved) { s.Blobs = s.Blobs[:1] },
		"swapped": func(dir string, s *saved) {
			s.Blobs[0].Meta, s.Blobs[1].Meta = s.Blobs[1].Meta, s.Blobs[0].Meta
			a, b := filepath.Join(dir, savedMeta(0)), filepath.Join(dir, savedMeta(1))
			if err := os.Rename(a, a+"x"); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(b, a); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(a+"x", b); err != nil {
				t.Fatal(err)
			}
		},
	} {
		dir := filepath.Join(t.TempDir(), "saved")
		if err := img.Save(dir); err != nil {
			t.Fatal(err)
		}
		var s saved
		readJSON(t, filepath.Join(dir, savedIndex), &s)
		change(dir, &s)
		b, err := json.Marshal(s)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, savedIndex), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		if again, err := Load(dir, Options{}); err == nil {
			again.Close()
			t.Errorf("%s: loaded", name)
		}
	}
}
