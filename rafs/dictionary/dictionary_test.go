package dictionary

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"holdfast/rafs"
	"holdfast/rafs/blob"
	"holdfast/rafs/bootstrap"
	"holdfast/rafs/convert"
	"holdfast/rafs/image"
	"holdfast/rafs/oci"
	"holdfast/rafs/tree"
	"holdfast/tests/registry"
)

// tb is what testing.T and rapid.T have in common.
type tb interface {
	Helper()
	Fatalf(format string, args ...any)
}

const chunk = 4 << 10

// random returns n bytes that do not compress, always the same for a seed.
func random(seed, n int) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(p)
	return p
}

// writeTar writes files by name to a tar.
func writeTar(t tb, path string, files map[string][]byte) {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(files[name]))})
		if err == nil {
			_, err = w.Write(files[name])
		}
		if err != nil {
			t.Fatalf("%v", err)
		}
	}
	if err := errors.Join(w.Close(), os.WriteFile(path, b.Bytes(), 0o600)); err != nil {
		t.Fatalf("%v", err)
	}
}

// A maker converts files to images.
type maker struct {
	tb
	dir string
	n   int
}

// try converts files to dest with other images as the dictionary.
func (m *maker) try(dest string, files map[string][]byte, o convert.Options, dict ...string) (*convert.Result, error) {
	m.Helper()
	m.n++
	src := filepath.Join(m.dir, fmt.Sprintf("src-%d.tar", m.n))
	writeTar(m, src, files)
	d, err := Open(ctx, dict, image.Options{})
	if err != nil {
		return nil, err
	}
	defer d.Close()
	o.Source, o.Dest, o.Dictionary = "tar:"+src, dest, d.Blobs()
	if o.ChunkSize == 0 {
		o.ChunkSize = chunk
	}
	return convert.Run(ctx, o)
}

func (m *maker) make(dest string, files map[string][]byte, o convert.Options, dict ...string) *convert.Result {
	m.Helper()
	r, err := m.try(dest, files, o, dict...)
	if err != nil {
		m.Fatalf("%v", err)
	}
	return r
}

func (m *maker) layout(name string) string { return "oci:" + filepath.Join(m.dir, name) + ":v1" }

// objects decodes the objects of all blobs of an image, which checks every digest.
func objects(t tb, img *image.Image) (out [][]byte) {
	t.Helper()
	dec, err := blob.NewDecoder()
	if err != nil {
		t.Fatalf("%v", err)
	}
	for _, b := range img.Blobs {
		o := make([]byte, b.Table.Size())
		for i := range b.Table.Len() {
			c := b.Table.At(i)
			stored := make([]byte, c.Stored)
			if !c.Zero() {
				r, err := b.Source.ReadRange(ctx, int64(c.BlobOffset), int64(c.Stored))
				if err == nil {
					_, err = io.ReadFull(r, stored)
					r.Close()
				}
				if err != nil {
					t.Fatalf("%v", err)
				}
			}
			if err := dec.Decode(c, b.Table.Algo(), stored, o[c.Offset:]); err != nil {
				t.Fatalf("%v", err)
			}
		}
		out = append(out, o)
	}
	return out
}

func open(t tb, ref string) *image.Image {
	t.Helper()
	img, err := image.Open(ctx, ref, image.Options{})
	if err != nil {
		t.Fatalf("%v", err)
	}
	return img
}

// An opened image, read back.
type readBack struct {
	boot  *bootstrap.Image
	files map[string]string // content by path
	used  map[string]bool   // ids of blobs that files refer to
	own   []rafs.Digest     // of the chunks of the blobs that no dictionary has
}

func read(t tb, ref string, dict ...string) readBack {
	t.Helper()
	if _, err := image.Check(ctx, ref, image.Options{}, nil); err != nil {
		t.Fatalf("%v", err)
	}
	theirs := make(map[string]bool)
	for _, d := range dict {
		img := open(t, d)
		for _, b := range img.Blobs {
			theirs[b.Info.ID] = true
		}
		img.Close()
	}
	img := open(t, ref)
	defer img.Close()
	boot, err := bootstrap.Read(bytes.NewReader(img.Bootstrap), int64(len(img.Bootstrap)), ref)
	if err != nil {
		t.Fatalf("%v", err)
	}
	r := readBack{boot: boot, files: make(map[string]string), used: make(map[string]bool)}
	content := objects(t, img)
	_ = boot.Root.Walk(func(path string, n *tree.Node) error { // fn has no errors
		var s strings.Builder
		for i, c := range n.Inode.Chunks {
			size := min(uint64(n.Inode.ChunkSize), n.Inode.Size-uint64(i)*uint64(n.Inode.ChunkSize))
			s.Write(content[c.Blob-1][c.Offset : c.Offset+size])
			r.used[boot.Blobs[c.Blob-1].ID] = true
		}
		r.files[path] = s.String()
		return nil
	})
	for _, b := range img.Blobs {
		for i := range b.Table.Len() {
			if !theirs[b.Info.ID] {
				r.own = append(r.own, b.Table.At(i).Digest)
			}
		}
	}
	return r
}

// drawFiles draws files of pieces that other files are likely to have too.
func drawFiles(t *rapid.T, label string) map[string][]byte {
	files := make(map[string][]byte)
	for i := range rapid.IntRange(0, 6).Draw(t, label+" files") {
		var content []byte
		for range rapid.IntRange(0, 5).Draw(t, "pieces") {
			if piece := rapid.IntRange(0, 12).Draw(t, "piece"); piece > 0 {
				content = append(content, random(piece, chunk)...)
			} else {
				content = append(content, make([]byte, chunk)...)
			}
		}
		content = append(content, random(99, rapid.SampledFrom([]int{0, 1, 100, 4095}).Draw(t, "rest"))...)
		files[fmt.Sprintf("f%d", i)] = content
	}
	return files
}

func TestConvertingWithADictionaryGivesTheSameTree(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp("", "dictionary-")
		if err != nil {
			t.Fatalf("%v", err)
		}
		defer os.RemoveAll(dir)
		m := &maker{tb: t, dir: dir}
		codecs := []rafs.Codec{rafs.CodecNone, rafs.CodecLZ4, rafs.CodecZstd}
		o := convert.Options{Digest: rapid.SampledFrom([]rafs.DigestAlgo{rafs.Blake3, rafs.SHA256}).Draw(t, "digest")}
		var dict []string
		for i := range rapid.IntRange(1, 3).Draw(t, "images") {
			dict = append(dict, m.layout(fmt.Sprintf("dict%d", i)))
			o.Codec = rapid.SampledFrom(codecs).Draw(t, "codec of a dictionary")
			m.make(dict[i], drawFiles(t, "dictionary"), o)
		}
		files := drawFiles(t, "image")
		o.Codec = rapid.SampledFrom(codecs).Draw(t, "codec")
		m.make(m.layout("plain"), files, o)
		res := m.make(m.layout("with"), files, o, dict...)
		plain, with := read(t, m.layout("plain")), read(t, m.layout("with"), dict...)
		if !maps.Equal(plain.files, with.files) {
			t.Fatalf("without a dictionary %v, with one %v", slices.Collect(maps.Keys(plain.files)), slices.Collect(maps.Keys(with.files)))
		}
		for name, content := range files {
			if with.files["/"+name] != string(content) {
				t.Fatalf("%s has other content than its source", name)
			}
		}
		if len(with.used) != len(with.boot.Blobs) {
			t.Fatalf("%d blobs are listed, %d used", len(with.boot.Blobs), len(with.used))
		}
		have := make(map[rafs.Digest]bool)
		for _, d := range dict {
			for _, digest := range read(t, d).own {
				have[digest] = true
			}
		}
		for _, d := range with.own {
			if have[d] {
				t.Fatalf("chunk %s is stored again", d)
			}
		}
		if got, want := uint64(len(plain.own)-len(with.own)), res.Images[0].Dictionary.Chunks; got != want {
			t.Fatalf("%d chunks fewer are stored, the result says %d", got, want)
		}
	})
}

// sample is two sets of files, of which the second shares most with the first.
func sample() (a, b map[string][]byte) {
	a = map[string][]byte{"one": random(1, 40*chunk), "two": random(2, 25*chunk+7)}
	b = map[string][]byte{"one": a["one"], "moved/two": a["two"], "new": random(3, 2*chunk)}
	return a, b
}

func TestSharedChunksAreReferredToAndNotStored(t *testing.T) {
	m := &maker{tb: t, dir: t.TempDir()}
	a, b := sample()
	dict := m.make(m.layout("a"), a, convert.Options{}).Images[0].Blobs[0]
	res := m.make(m.layout("b"), b, convert.Options{}, m.layout("a"))
	img := res.Images[0]
	if want := (convert.DictionaryUse{Blobs: 1, Chunks: 66, Bytes: 65*chunk + 7, Stored: 65*chunk + 7}); img.Dictionary != want {
		t.Errorf("the result says %+v, want %+v", img.Dictionary, want)
	}
	if len(img.Blobs) != 2 || img.Blobs[0].Size != 2*chunk || img.Blobs[1] != dict {
		t.Fatalf("blobs %+v, want one with the two new chunks and %s", img.Blobs, dict.ID)
	}
	// The blob is in the layout, under its digest, and the manifest keeps it there.
	if _, err := os.Stat(filepath.Join(m.dir, "b/blobs/sha256", dict.ID)); err != nil {
		t.Error(err)
	}
	for _, digest := range layersOf(t, m.layout("b")) {
		if digest == dict.ID {
			return
		}
	}
	t.Errorf("blob %s is no layer of the manifest", dict.ID)
}

func layersOf(t tb, ref string) (ids []string) {
	t.Helper()
	s, m := manifestOf(t, ref)
	defer s.Close()
	for _, l := range m.Layers {
		ids = append(ids, l.Digest.Encoded())
	}
	return ids
}

func TestImageThatIsAllInTheDictionaryHasNoBlobOfItsOwn(t *testing.T) {
	m := &maker{tb: t, dir: t.TempDir()}
	a, _ := sample()
	blobs := m.make(m.layout("a"), a, convert.Options{}).Images[0].Blobs
	got := m.make(m.layout("b"), a, convert.Options{}, m.layout("a")).Images[0].Blobs
	if !slices.Equal(got, blobs) {
		t.Errorf("blobs %+v, want %+v", got, blobs)
	}
	read(t, m.layout("b"), m.layout("a"))
}

func TestManifestNamesLayersAndDiffIDsAlike(t *testing.T) {
	m := &maker{tb: t, dir: t.TempDir()}
	a, b := sample()
	m.make(m.layout("a"), a, convert.Options{})
	m.make(m.layout("b"), b, convert.Options{}, m.layout("a"))
	config := configOf(t, m.layout("b"))
	layers := layersOf(t, m.layout("b"))
	if len(layers) != 3 || len(config.RootFS.DiffIDs) != 3 {
		t.Fatalf("layers %v, diff ids %v", layers, config.RootFS.DiffIDs)
	}
	for i, id := range layers[:2] {
		if config.RootFS.DiffIDs[i].Encoded() != id {
			t.Errorf("layer %d is %s, its diff id %s", i, id, config.RootFS.DiffIDs[i])
		}
	}
}

func TestFsckReadsAnImageOfSeveralDevices(t *testing.T) {
	tool, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Skip("fsck.erofs is not installed (Debian: erofs-utils)")
	}
	m := &maker{tb: t, dir: t.TempDir()}
	a, b := sample()
	m.make(m.layout("a"), a, convert.Options{})
	m.make(m.layout("c"), map[string][]byte{"c": random(4, 9*chunk)}, convert.Options{})
	b["c"] = random(4, 9*chunk)
	m.make(m.layout("b"), b, convert.Options{}, m.layout("c"), m.layout("a"))
	img := open(t, m.layout("b"))
	defer img.Close()
	args := []string{"--extract"}
	for i, o := range objects(t, img) {
		path := filepath.Join(m.dir, fmt.Sprint("device", i))
		if err := os.WriteFile(path, o, 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--device="+path)
	}
	boot := filepath.Join(m.dir, "boot")
	if err := os.WriteFile(boot, img.Bootstrap, 0o600); err != nil {
		t.Fatal(err)
	}
	if len(args) != 4 {
		t.Fatalf("%d devices, want three", len(args)-1)
	}
	if out, err := exec.Command(tool, append(args, boot)...).CombinedOutput(); err != nil || bytes.Contains(out, []byte("<E>")) {
		t.Fatalf("fsck.erofs: %v\n%s", err, out)
	}
}

func TestDictionariesThatCannotMatchAreRefused(t *testing.T) {
	m := &maker{tb: t, dir: t.TempDir()}
	a, b := sample()
	m.make(m.layout("large"), a, convert.Options{ChunkSize: 64 << 10})
	m.make(m.layout("sha256"), a, convert.Options{Digest: rafs.SHA256})
	m.make(m.layout("whole"), a, convert.Options{})
	renamed := bare(t, m, "whole", func(id string) string { return strings.Repeat("ab", 20) })
	for _, tt := range []struct {
		name, dict string
		want       []string
	}{
		{"other chunk size", m.layout("large"), []string{"--chunk-size=65536"}},
		{"other digest algorithm", m.layout("sha256"), []string{"--digest=sha256"}},
		{"a blob with a name of its own", renamed, []string{strings.Repeat("ab", 20), "sha256"}},
		{"no image", m.layout("none"), []string{"none"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := m.try(m.layout("b"), b, convert.Options{}, tt.dict)
			if err == nil {
				t.Fatal("converted")
			}
			for _, w := range append(tt.want, "chunk dictionary") {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("the error does not say %q: %v", w, err)
				}
			}
			if _, err := os.Stat(filepath.Join(m.dir, "b")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the layout was made: %v", err)
			}
		})
	}
}

func TestDictionaryWhoseBlobIsMissingOrDamagedGivesNoImage(t *testing.T) {
	m := &maker{tb: t, dir: t.TempDir()}
	a, b := sample()
	id := m.make(m.layout("a"), a, convert.Options{}).Images[0].Blobs[0].ID
	path := filepath.Join(m.dir, "a/blobs/sha256", id)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	damaged := bytes.Clone(whole)
	damaged[100] ^= 1 // of a chunk: nothing that opening the image reads
	for name, content := range map[string][]byte{"damaged": damaged, "cut short": whole[:len(whole)-1], "missing": nil} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if content == nil {
			os.Remove(path)
		}
		if _, err := m.try(m.layout("b"), b, convert.Options{}, m.layout("a")); err == nil || !strings.Contains(err.Error(), id) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := oci.ReadIndex(filepath.Join(m.dir, "b")); err == nil {
			t.Errorf("%s: the layout has an index", name)
		}
		if files, _ := filepath.Glob(filepath.Join(m.dir, "b/blobs/sha256", id)); len(files) > 0 {
			t.Errorf("%s: the blob is in the layout", name)
		}
	}
}

func TestRegistryMountsSharedBlobsAndIsSentWhatItCannot(t *testing.T) {
	m := &maker{tb: t, dir: t.TempDir()}
	hosts := make([]string, 2)
	for i := range hosts {
		r, err := registry.Start(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		hosts[i] = r.Addr()
	}
	a, b := sample()
	dict := "docker://" + hosts[0] + "/some/a:v1"
	shared := m.make(dict, a, convert.Options{}).Images[0].Blobs[0]
	own := int64(0)
	for i, want := range []int64{0, int64(shared.StoredSize), int64(shared.StoredSize)} {
		from, to := dict, "docker://"+hosts[min(i, 1)]+"/other/b:v1"
		if i == 2 { // a layout gives its blobs as well
			m.make(m.layout("a"), a, convert.Options{})
			from, to = m.layout("a"), "docker://"+hosts[1]+"/third/b:v1"
		}
		res := m.make(to, b, convert.Options{}, from)
		if i == 0 {
			own = int64(res.Images[0].Blobs[0].StoredSize)
		}
		if got := res.Totals.Pushed; got != own+want {
			t.Errorf("%s with %s: %d bytes were sent, want %d", to, from, got, own+want)
		}
		read(t, to, from)
	}
}

func TestChunksOfABareImageAreReferredToAsWell(t *testing.T) {
	m := &maker{tb: t, dir: t.TempDir()}
	a, b := sample()
	m.make(m.layout("a"), a, convert.Options{})
	ref := bare(t, m, "a", func(id string) string { return id })
	if got := m.make(m.layout("b"), b, convert.Options{}, ref).Images[0].Dictionary.Chunks; got != 66 {
		t.Errorf("%d chunks of the dictionary are used", got)
	}
	read(t, m.layout("b"), ref)
}

// bare writes the image of a layout as a bare bootstrap and blobs with other names, and returns its reference.
func bare(t *testing.T, m *maker, name string, rename func(string) string) string {
	t.Helper()
	img := open(t, m.layout(name))
	defer img.Close()
	dir := t.TempDir()
	boot, err := bootstrap.Read(bytes.NewReader(img.Bootstrap), int64(len(img.Bootstrap)), name)
	if err != nil {
		t.Fatal(err)
	}
	for i := range boot.Blobs {
		id := boot.Blobs[i].ID
		boot.Blobs[i].ID = rename(id)
		b, err := os.ReadFile(filepath.Join(m.dir, name, "blobs/sha256", id))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, rename(id)), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	b, err := bootstrap.Write(boot)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "boot"), b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return "rafs:" + filepath.Join(dir, "boot")
}

func TestMoreBlobsThanABootstrapCanListAreRefused(t *testing.T) {
	m := &maker{tb: t, dir: t.TempDir()}
	files := make(map[string][]byte)
	var dict []string
	for i := range rafs.MaxBlobs + 1 {
		name := fmt.Sprint("f", i)
		files[name] = random(i, 100)
		dict = append(dict, "oci:"+filepath.Join(m.dir, "dict")+":"+name)
		m.make(dict[i], map[string][]byte{name: files[name]}, convert.Options{})
	}
	_, err := m.try(m.layout("b"), files, convert.Options{}, dict...)
	if !errors.Is(err, bootstrap.ErrInvalid) || !strings.Contains(err.Error(), "255 of them of the chunk dictionary") {
		t.Errorf("error %v", err)
	}
	delete(files, "f0")
	delete(files, "f1")
	m.make(m.layout("b"), files, convert.Options{}, dict...)
}
