package image

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"holdfast/rafs"
	"holdfast/rafs/blob"
	"holdfast/rafs/bootstrap"
	"holdfast/rafs/convert"
	"holdfast/rafs/source"
)

func TestFixtureDecodesToTheObjectOfAnotherReader(t *testing.T) {
	dir := fixtures(t)
	img := open(t, "rafs:"+dir+"/rafs-v6/rafs-v6-2.2.boot")
	want, err := os.ReadFile(dir + "/decoded/be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef.decoded")
	if err != nil {
		t.Fatal(err)
	}
	got, err := object(t.Context(), img.Blobs[0])
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, want %d; %v", len(got), len(want), err)
	}
	if img.Digest != "sha256:6a1ab377a31df3b1dfe6d3f09b4168f1db66207f77012206ac7b98cb5a42186d" {
		t.Errorf("digest %s", img.Digest)
	}
}

func TestFixtureTreeIsThatOfAnotherReader(t *testing.T) {
	dir := fixtures(t)
	var want struct {
		ChunkSize uint32
		Files     []struct {
			Path, Type                  string
			Mode, Size, UID, GID, Nlink uint32
			Mtime                       int64
			Chunks                      int
		}
	}
	readJSON(t, dir+"/decoded/rafs-v6-2.2.json", &want)
	d, err := Inspect(t.Context(), "rafs:"+dir+"/rafs-v6/rafs-v6-2.2.boot", Options{}, true)
	if err != nil {
		t.Fatal(err)
	}
	if len(d.Tree) != len(want.Files) || d.ChunkSize != want.ChunkSize {
		t.Fatalf("%d entries, chunks of %d, want %d, %d", len(d.Tree), d.ChunkSize, len(want.Files), want.ChunkSize)
	}
	for i, w := range want.Files {
		e := d.Tree[i]
		kind := map[string]string{"dir": "dir", "reg": "file", "sym": "link"}[w.Type]
		if strings.TrimSuffix(e.Path, "/") != w.Path || e.Type != kind || e.Mode != w.Mode&0o7777 || e.UID != w.UID || e.GID != w.GID ||
			e.Nlink != w.Nlink || e.Mtime.Unix() != w.Mtime || len(e.Chunks) != w.Chunks || kind == "file" && e.Size != uint64(w.Size) {
			t.Errorf("entry %+v, want %+v", e, w)
		}
	}
}

func TestLayoutAndRegistryGiveTheSameImage(t *testing.T) {
	files := sample()
	dir := filepath.Join(t.TempDir(), "layout")
	src := makeSource(t, files)
	if _, err := convert.Run(t.Context(), convert.Options{Source: "tar:" + src, Dest: "oci:" + dir + ":v1", ChunkSize: 64 << 10}); err != nil {
		t.Fatal(err)
	}
	a := open(t, "oci:"+dir)
	files = sample()
	ref, _ := push(t, files)
	b := open(t, ref)
	for _, img := range []*Image{a, b} {
		if len(img.Bootstrap)%4096 != 0 || len(img.Blobs) != 1 || !strings.HasPrefix(img.Digest, "sha256:") {
			t.Fatalf("%s: bootstrap of %d bytes, %d blobs, digest %s", img.Ref, len(img.Bootstrap), len(img.Blobs), img.Digest)
		}
		o, err := object(t.Context(), img.Blobs[0])
		if err != nil {
			t.Fatal(err)
		}
		// "big" and "same" are one; the object holds each file's bytes somewhere.
		if !bytes.Contains(o, files["big"][:64<<10]) || bytes.Count(o, files["big"][:64<<10]) != 1 || !bytes.Contains(o, []byte("hello")) {
			t.Errorf("%s: the object does not hold the files' data once", img.Ref)
		}
		if r, err := Check(t.Context(), img.Ref, Options{}, nil); err != nil {
			t.Errorf("check: %+v, %v", r, err)
		}
	}
}

// Device i+1 of the bootstrap is blob i: each file's chunks, read from the blob that is said to have them, are the file.
func TestChunksOfEveryLayerAreInTheirBlob(t *testing.T) {
	layers := []map[string][]byte{
		{"a": random(1, 200000), "gone": random(2, 100000)},
		{"b": random(3, 150000), "again": random(1, 200000)},
		{"c": random(4, 100), ".wh.gone": nil},
	}
	dir := makeOCI(t, layers...)
	img := open(t, "oci:"+dir)
	d, err := Inspect(t.Context(), img.Ref, Options{}, true)
	if err != nil {
		t.Fatal(err)
	}
	if len(img.Blobs) != 3 || len(d.Tree) != 5 {
		t.Fatalf("%d blobs, %d entries", len(img.Blobs), len(d.Tree))
	}
	var objects [][]byte
	for _, b := range img.Blobs {
		o, err := object(t.Context(), b)
		if err != nil {
			t.Fatal(err)
		}
		objects = append(objects, o)
	}
	want := map[string][]byte{"/a": layers[0]["a"], "/b": layers[1]["b"], "/again": layers[0]["a"], "/c": layers[2]["c"]}
	for _, e := range d.Tree[1:] {
		var got []byte
		for _, c := range e.Chunks {
			got = append(got, objects[c.Blob][c.Offset:][:c.Size]...)
		}
		if !bytes.Equal(got, want[e.Path]) {
			t.Errorf("%s: %d bytes in %+v", e.Path, len(got), e.Chunks)
		}
	}
	if r, err := Check(t.Context(), img.Ref, Options{}, nil); err != nil || r.LayerDigests != 3 {
		t.Errorf("check: %+v, %v", r, err)
	}
}

func TestPlanIsPrefetchTableThenAllBlobs(t *testing.T) {
	dir := makeLayout(t, sample(), convert.Options{Prefetch: []string{"/text", "/dir"}})
	img := open(t, "oci:"+dir)
	d, err := Inspect(t.Context(), img.Ref, Options{}, true)
	if err != nil {
		t.Fatal(err)
	}
	var want []Range
	for _, path := range []string{"/text", "/dir/small"} {
		i := slices.IndexFunc(d.Tree, func(e Entry) bool { return e.Path == path })
		for _, c := range d.Tree[i].Chunks {
			n := (uint64(c.Size) + 4095) &^ 4095
			if k := len(want) - 1; k >= 0 && want[k].Off+want[k].Len == c.Offset {
				want[k].Len += n
			} else {
				want = append(want, Range{c.Blob, c.Offset, n})
			}
		}
	}
	want = append(want, Range{0, 0, img.Blobs[0].Table.Size()})
	if got := img.Plan(); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if !reflect.DeepEqual(d.Prefetch, []string{"/text", "/dir"}) {
		t.Errorf("prefetch table %q", d.Prefetch)
	}
}

func TestLoadedImageIsTheSavedOneWithoutNetwork(t *testing.T) {
	ref, stop := push(t, sample())
	img := open(t, ref)
	dir := filepath.Join(t.TempDir(), "images", "saved")
	if err := img.Save(dir); err != nil {
		t.Fatal(err)
	}
	want, err := object(t.Context(), img.Blobs[0])
	if err != nil {
		t.Fatal(err)
	}
	again, err := Load(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if got, err := object(t.Context(), again.Blobs[0]); err != nil || !bytes.Equal(got, want) {
		t.Errorf("while the registry is up: %d bytes, %v", len(got), err)
	}
	stop()
	offline, err := Load(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer offline.Close()
	if offline.Ref != img.Ref || offline.Digest != img.Digest || !bytes.Equal(offline.Bootstrap, img.Bootstrap) ||
		!reflect.DeepEqual(offline.Plan(), img.Plan()) || len(offline.Blobs) != len(img.Blobs) ||
		!reflect.DeepEqual(offline.Blobs[0].Table, img.Blobs[0].Table) || !reflect.DeepEqual(offline.Blobs[0].Info, img.Blobs[0].Info) {
		t.Error("the loaded image is not the saved one")
	}
	if _, err := object(t.Context(), offline.Blobs[0]); err == nil || source.IsPermanent(err) {
		t.Errorf("reading while the registry is down: %v", err)
	}
}

// Where the blob tells no digests, those of the bootstrap's chunk table are the table's.
func TestDigestsComeFromTheChunkTableWhereTheBlobHasNone(t *testing.T) {
	img := open(t, "rafs:"+fixtures(t)+"/rafs-v6/rafs-v6-2.2.boot")
	b := img.Blobs[0]
	file, err := os.ReadFile(b.Source.String())
	if err != nil {
		t.Fatal(err)
	}
	ci := file[b.Info.CIOffset:][:b.Info.CISize]
	packed := append(make([]byte, 0, 8192), ci...)
	packed = append(packed[:4096], file[b.Info.CIOffset+b.Info.CIStored:][:4096]...)
	m, err := blob.ParseBlobMeta(packed, b.Info)
	if err != nil || m.HasDigests() {
		t.Fatal(err, m)
	}
	boot, err := bootstrap.Read(bytes.NewReader(img.Bootstrap), int64(len(img.Bootstrap)), "fixture")
	if err != nil {
		t.Fatal(err)
	}
	got := &Blob{}
	other := bootstrap.ChunkEntry{Blob: 2, Digest: rafs.Digest{1}} // of another blob, and of the same index
	if err := got.setMeta(m, &bootstrap.Summary{Chunks: append(boot.Chunks, other)}, 0); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got.Table, b.Table) {
		t.Errorf("got %+v, want %+v", got.Table, b.Table)
	}
	// Without digests, and with one chunk's missing, there is no table.
	if err := got.setMeta(m, &bootstrap.Summary{}, 0); !source.IsPermanent(err) {
		t.Errorf("no chunk table: %v", err)
	}
	if err := got.setMeta(m, &bootstrap.Summary{Chunks: boot.Chunks[:1]}, 0); !source.IsPermanent(err) {
		t.Errorf("half a chunk table: %v", err)
	}
}

// A process that dies while an image is saved that is mounted elsewhere must leave what those mounts depend on (I1).
func TestSaveTouchesNothingThatCanBeLoaded(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "saved")
	a := open(t, "oci:"+makeLayout(t, sample(), convert.Options{}))
	b := open(t, "oci:"+makeLayout(t, map[string][]byte{"one": []byte("1")}, convert.Options{}))
	inode := func() os.FileInfo {
		fi, err := os.Stat(dir)
		if err != nil {
			t.Fatal(err)
		}
		return fi
	}
	if err := a.Save(dir); err != nil {
		t.Fatal(err)
	}
	first := inode()
	if err := a.Save(dir); err != nil {
		t.Fatal(err)
	}
	contains(t, b.Save(dir), dir, "other blobs")
	if !os.SameFile(first, inode()) {
		t.Error("the directory was replaced")
	}
	flip(t, filepath.Join(dir, savedMeta(0)), 2)
	if err := b.Save(dir); err != nil {
		t.Errorf("over what cannot be loaded: %v", err)
	}
	got, err := Load(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	got.Close()
	if got.Digest != b.Digest {
		t.Errorf("loaded %s, saved %s", got.Digest, b.Digest)
	}
	left, err := os.ReadDir(filepath.Dir(dir))
	if err != nil || len(left) != 1 {
		t.Errorf("beside the saved image are %v, %v", left, err)
	}
	a.Bootstrap = nil
	contains(t, a.Save(dir), "bootstrap")
}

func TestDamagedSavedImageIsNamed(t *testing.T) {
	img := open(t, "oci:"+makeLayout(t, sample(), convert.Options{}))
	for _, file := range []string{savedIndex, savedBootstrap, savedMeta(0)} {
		dir := filepath.Join(t.TempDir(), "saved")
		if err := img.Save(dir); err != nil {
			t.Fatal(err)
		}
		flip(t, filepath.Join(dir, file), 2)
		_, err := Load(dir, Options{})
		contains(t, err, file, dir)
		if !errors.Is(err, ErrFormat) || !source.IsPermanent(err) {
			t.Errorf("%s: %v", file, err)
		}
		if err := os.Remove(filepath.Join(dir, file)); err != nil {
			t.Fatal(err)
		}
		_, err = Load(dir, Options{})
		contains(t, err, file)
	}
}

func TestSavedImageOfANewerReleaseIsRefused(t *testing.T) {
	img := open(t, "oci:"+makeLayout(t, sample(), convert.Options{}))
	dir := filepath.Join(t.TempDir(), "saved")
	if err := img.Save(dir); err != nil {
		t.Fatal(err)
	}
	var s saved
	readJSON(t, filepath.Join(dir, savedIndex), &s)
	s.Version++
	writeJSON(t, filepath.Join(dir, savedIndex), s)
	_, err := Load(dir, Options{})
	contains(t, err, "version 2", "release")
	contains(t, img.Save(dir), "version 2")
}

func TestCloseReleasesTheDescriptors(t *testing.T) {
	dir := makeLayout(t, sample(), convert.Options{})
	count := func() int {
		ents, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(ents)
	}
	before := count()
	for range 5 {
		img, err := Open(t.Context(), "oci:"+dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if n := count(); n > before {
		t.Errorf("%d descriptors before, %d after", before, n)
	}
}
