package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs"
	"holdfast/rafs/blob"
	"holdfast/rafs/bootstrap"
	"holdfast/rafs/tree"
)

// readStream reads a layer of arbitrary bytes, and returns its tree with everything that a bootstrap needs to know.
func readStream(t *testing.T, b []byte, sparse uint64) (*bootstrap.Image, error) {
	t.Helper()
	w, err := blob.NewWriter(io.Discard, blob.Options{Blob: 1, ChunkSize: rafs.MinChunkSize, Codec: rafs.CodecNone, Workers: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	r := &layerReader{layer: newLayer(nil), chunks: &chunker{w: w, chunk: rafs.MinChunkSize}, read: new(atomic.Int64), sparse: sparse}
	if err := r.readTarStream(context.Background(), bytes.NewReader(b)); err != nil {
		return nil, err
	}
	if err := r.layer.finish(); err != nil {
		return nil, err
	}
	if err := r.chunks.finish(); err != nil {
		return nil, err
	}
	info, err := w.Info()
	if err != nil {
		return nil, err
	}
	return &bootstrap.Image{Root: r.layer.root, Blobs: []rafs.BlobInfo{info}, ChunkSize: rafs.MinChunkSize}, nil
}

// FuzzLayer proves that any bytes are read as a layer or refused, and that what was read can be written as a bootstrap and
// merged, or is refused there.
func FuzzLayer(f *testing.F) {
	whole := makeTar(f, dir("d"), reg("d/f", strings.Repeat("content", 2000)).with("user.x", "y"), link("l", "d/f"), symlink("s", "d"), dev("c", tar.TypeChar, 5, 1), reg("d/.wh.x", ""))
	for _, b := range [][]byte{nil, whole, whole[:len(whole)/2], gzipped(whole), zstded(whole), makeTar(f, link("a", "b"), reg("../x", ""))} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		img, err := readStream(t, b, 1<<24)
		if err != nil {
			return
		}
		if _, err := bootstrap.Write(img); err != nil {
			return
		}
		merged := tree.NewRoot()
		if err := merge(merged, &layer{root: img.Root}); err != nil {
			return
		}
		img.Root = merged
		if _, err := bootstrap.Write(img); err != nil {
			t.Errorf("a layer can be written, but not what it is merged to: %v", err)
		}
	})
}

// FuzzDocuments proves that any manifest and configuration lead to an image or an error.
func FuzzDocuments(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"layers":[]}`), []byte(`{"os":"linux","history":[{"created_by":"x"},null]}`))
	f.Add([]byte(`{"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:00","size":-1}]}`), []byte(`[]`))
	f.Fuzz(func(t *testing.T, manifest, config []byte) {
		dir := t.TempDir()
		if err := os.MkdirAll(filepath.Join(dir, "blobs/sha256"), 0o755); err != nil {
			t.Fatal(err)
		}
		store := func(mediaType string, b []byte) ocispec.Descriptor {
			d := descriptor(mediaType, b)
			writeFile(t, filepath.Join(dir, "blobs/sha256", d.Digest.Encoded()), b)
			return d
		}
		c := store(ocispec.MediaTypeImageConfig, config)
		var m map[string]any
		if json.Unmarshal(manifest, &m) == nil && m != nil {
			m["config"] = c
			var err error
			if manifest, err = json.Marshal(m); err != nil {
				t.Fatal(err)
			}
		}
		setRoot(t, dir, ocispec.MediaTypeImageManifest, json.RawMessage("{}"))
		setIndex(t, dir, store(ocispec.MediaTypeImageManifest, manifest))
		out := filepath.Join(dir, "out")
		_, err := Run(context.Background(), Options{Source: "oci:" + dir + ":x", Dest: "oci:" + out + ":x"})
		if _, missing := os.Stat(out); (err == nil) != (missing == nil) {
			t.Errorf("error %v, but the output: %v", err, missing)
		}
	})
}

func TestSparseFilesMayNotTakeForEver(t *testing.T) {
	// GNU sparse 0.1: the size is only a number in a record.
	sparse := func(size string) []byte {
		m := reg("s", "data")
		m.PAXRecords = map[string]string{"GNU.sparse.size": size, "GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,4"}
		return rawPAX(t, m)
	}
	img, err := readStream(t, sparse("1000000"), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if in := img.Root.Child("s").Inode; in.Size != 1000000 || in.Chunks[1] != in.Chunks[2] || in.Chunks[0] == in.Chunks[1] {
		t.Errorf("%d bytes, chunks %+v", in.Size, in.Chunks[:3])
	}
	if _, err := readStream(t, sparse("2000000"), 1<<20); err == nil || !strings.Contains(err.Error(), `"s"`) {
		t.Errorf("error %v", err)
	}
}

// rawPAX writes a member with records that the tar package keeps for itself.
func rawPAX(t *testing.T, m member) []byte {
	t.Helper()
	var records string
	for _, k := range []string{"GNU.sparse.size", "GNU.sparse.numblocks", "GNU.sparse.map"} {
		rest := " " + k + "=" + m.PAXRecords[k] + "\n"
		n := len(rest) + 2
		records += string(rune('0'+n/10)) + string(rune('0'+n%10)) + rest
	}
	x := makeTar(t, member{tar.Header{Name: "pax", Typeflag: tar.TypeReg}, records})
	head := rawHeaderOf(x, func(h []byte) { h[156] = 'x' })
	m.PAXRecords = nil
	m.ModTime = epoch.Truncate(1e9)
	return append(head[:1024], makeTar(t, m)...)
}
