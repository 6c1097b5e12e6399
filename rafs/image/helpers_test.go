package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs"
	"holdfast/rafs/blob"
	"holdfast/rafs/convert"
	"holdfast/tests/registry"
)

// random returns n bytes that do not compress, always the same for a seed.
func random(seed uint64, n int) []byte {
	p := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	r.Read(p)
	return p
}

// sample is the content of the images that tests make: name to content.
func sample() map[string][]byte {
	return map[string][]byte{
		"big": random(1, 300000), "same": random(1, 300000), "text": bytes.Repeat([]byte("holdfast "), 20000),
		"dir/small": []byte("hello"), "dir/empty": nil, "zeros": make([]byte, 100000),
	}
}

// makeLayout converts files to an image in an OCI layout, with the tag "v1".
func makeLayout(t testing.TB, files map[string][]byte, o convert.Options) (dir string) {
	t.Helper()
	src := t.TempDir()
	for name, content := range files {
		path := filepath.Join(src, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	dir = filepath.Join(t.TempDir(), "layout")
	o.Source, o.Dest = "dir:"+src, "oci:"+dir+":v1"
	if o.ChunkSize == 0 {
		o.ChunkSize = 64 << 10
	}
	if _, err := convert.Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	return dir
}

// push converts the same files to a registry on loopback, which stop ends.
func push(t *testing.T, files map[string][]byte) (ref string, stop func()) {
	t.Helper()
	r, err := registry.Start(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	src := makeSource(t, files)
	ref = "docker://" + r.Addr() + "/some/image:v1"
	if _, err := convert.Run(t.Context(), convert.Options{Source: "tar:" + src, Dest: ref, ChunkSize: 64 << 10}); err != nil {
		t.Fatal(err)
	}
	return ref, func() { r.Close() }
}

// makeSource writes the files to a tar.
func makeSource(t *testing.T, files map[string][]byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "src.tar")
	if err := os.WriteFile(path, makeTar(t, files), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func makeTar(t testing.TB, files map[string][]byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		content := files[name]
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func compress(t testing.TB, p []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(p); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// open opens an image that must open.
func open(t *testing.T, ref string) *Image {
	t.Helper()
	img, err := Open(t.Context(), ref, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { img.Close() })
	return img
}

// object decodes the whole object of a blob, as the cache file of a complete blob has it.
func object(ctx context.Context, b *Blob) ([]byte, error) {
	dec, err := blob.NewDecoder()
	if err != nil {
		return nil, err
	}
	out := make([]byte, b.Table.Size())
	for i := range b.Table.Len() {
		c := b.Table.At(i)
		stored := make([]byte, c.Stored)
		if !c.Zero() {
			r, err := b.Source.ReadRange(ctx, int64(c.BlobOffset), int64(c.Stored))
			if err != nil {
				return nil, err
			}
			_, err = io.ReadFull(r, stored)
			r.Close()
			if err != nil {
				return nil, err
			}
		}
		if err := dec.Decode(c, b.Table.Algo(), stored, out[c.Offset:]); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// rewrite changes the manifest of a layout's only image, and everything that leads to it.
func rewrite(t *testing.T, dir string, change func(m *ocispec.Manifest)) {
	t.Helper()
	var idx ocispec.Index
	readJSON(t, filepath.Join(dir, "index.json"), &idx)
	var m ocispec.Manifest
	readJSON(t, blobPath(dir, idx.Manifests[0].Digest), &m)
	change(&m)
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	idx.Manifests[0].Digest = putBlob(t, dir, b)
	idx.Manifests[0].Size = int64(len(b))
	writeJSON(t, filepath.Join(dir, "index.json"), idx)
}

func blobPath(dir string, d digest.Digest) string {
	return filepath.Join(dir, "blobs", "sha256", d.Encoded())
}

func putBlob(t *testing.T, dir string, b []byte) digest.Digest {
	t.Helper()
	d := digest.FromBytes(b)
	if err := os.WriteFile(blobPath(dir, d), b, 0o644); err != nil {
		t.Fatal(err)
	}
	return d
}

func readJSON(t *testing.T, path string, v any) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func writeJSON(t *testing.T, path string, v any) {
	t.Helper()
	b, err := json.Marshal(v)
	if err == nil {
		err = os.WriteFile(path, b, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// flip changes one byte of a file.
func flip(t *testing.T, path string, off int64) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if off < 0 {
		off += int64(len(b))
	}
	b[off] ^= 0xff
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// fixtures returns the directory of images that Nydus's builder made.
func fixtures(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../../../shared/fixtures/nydus")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Skipf("the fixtures are not there: %v", err)
	}
	return dir
}

func contains(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not say %q", err, p)
		}
	}
}

// rows returns the rows of a table that have stored bytes.
func rows(t *rafs.Table) (out []rafs.Chunk) {
	for i := range t.Len() {
		if c := t.At(i); !c.Zero() {
			out = append(out, c)
		}
	}
	return out
}

// makeOCI writes an ordinary image of uncompressed layers to a layout, converts it, and returns the result's layout.
func makeOCI(t *testing.T, layers ...map[string][]byte) (dir string) {
	t.Helper()
	src := t.TempDir()
	if err := os.MkdirAll(filepath.Join(src, "blobs/sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	put := func(mediaType string, b []byte) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: mediaType, Digest: putBlob(t, src, b), Size: int64(len(b))}
	}
	doc := func(mediaType string, v any) ocispec.Descriptor {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return put(mediaType, b)
	}
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}, RootFS: ocispec.RootFS{Type: "layers"}}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest}
	m.SchemaVersion = 2
	for _, files := range layers {
		d := put(ocispec.MediaTypeImageLayer, makeTar(t, files))
		m.Layers = append(m.Layers, d)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, d.Digest)
	}
	m.Config = doc(ocispec.MediaTypeImageConfig, config)
	idx := ocispec.Index{Manifests: []ocispec.Descriptor{doc(ocispec.MediaTypeImageManifest, m)}}
	idx.SchemaVersion = 2
	writeJSON(t, filepath.Join(src, "index.json"), idx)
	if err := os.WriteFile(filepath.Join(src, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644); err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(t.TempDir(), "converted")
	if _, err := convert.Run(t.Context(), convert.Options{Source: "oci:" + src, Dest: "oci:" + dir + ":v1", ChunkSize: 64 << 10}); err != nil {
		t.Fatal(err)
	}
	return dir
}
