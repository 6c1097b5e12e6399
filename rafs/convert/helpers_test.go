package convert

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs"
	"holdfast/rafs/blob"
	"holdfast/rafs/bootstrap"
	"holdfast/rafs/oci"
	"holdfast/rafs/source"
	"holdfast/rafs/tree"
)

// tb is what testing.T, testing.B and rapid.T have in common.
type tb interface {
	Helper()
	Fatalf(format string, args ...any)
}

var epoch = time.Unix(1700000000, 123456789)

// A member is an entry of a tar to be made.
type member struct {
	tar.Header
	body string
}

func reg(name, body string) member {
	return member{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, ModTime: epoch}, body}
}

func dir(name string) member {
	return member{tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755, ModTime: epoch}, ""}
}

func symlink(name, target string) member {
	return member{tar.Header{Name: name, Linkname: target, Typeflag: tar.TypeSymlink, Mode: 0o777, ModTime: epoch}, ""}
}

func link(name, target string) member {
	return member{tar.Header{Name: name, Linkname: target, Typeflag: tar.TypeLink, ModTime: epoch}, ""}
}

func dev(name string, typ byte, major, minor int64) member {
	return member{tar.Header{Name: name, Typeflag: typ, Mode: 0o600, Devmajor: major, Devminor: minor, ModTime: epoch}, ""}
}

func (m member) with(key, value string) member {
	m.PAXRecords = maps.Clone(m.PAXRecords)
	if m.PAXRecords == nil {
		m.PAXRecords = make(map[string]string)
	}
	m.PAXRecords[paxXattr+key] = value
	return m
}

// makeTar returns a tar in PAX format.
func makeTar(t tb, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		h := m.Header
		h.Format, h.Size = tar.FormatPAX, int64(len(m.body))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("tar: %v", err)
		}
		if _, err := io.WriteString(w, m.body); err != nil {
			t.Fatalf("tar: %v", err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatalf("tar: %v", err)
	}
	return b.Bytes()
}

func gzipped(b []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	w.Write(b) // to memory
	w.Close()
	return out.Bytes()
}

func zstded(b []byte) []byte {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	return w.EncodeAll(b, nil)
}

func writeFile(t tb, path string, b []byte) string {
	t.Helper()
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatalf("%v", err)
	}
	return path
}

// ociImage makes an image of layers that are tars, compressed or not.
func ociImage(t tb, layers ...[]byte) v1.Image {
	t.Helper()
	img := mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1)
	for i, b := range layers {
		mt := types.OCIUncompressedLayer
		switch {
		case bytes.HasPrefix(b, []byte{0x1f, 0x8b}):
			mt = types.OCILayer
		case isZstd(b[:min(4, len(b))]):
			mt = types.OCILayerZStd
		}
		var err error
		img, err = mutate.Append(img, mutate.Addendum{
			Layer: static.NewLayer(b, mt), MediaType: mt, History: v1.History{CreatedBy: fmt.Sprint("step ", i)},
		})
		if err != nil {
			t.Fatalf("image: %v", err)
		}
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatalf("image: %v", err)
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", "amd64"
	cfg.Config.Env = []string{"KEY=value"}
	cfg.Config.Cmd = []string{"/bin/true"}
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		t.Fatalf("image: %v", err)
	}
	return img
}

// ociLayout writes an image to a new layout under a tag.
func ociLayout(t tb, path, tag string, img mutate.Appendable) string {
	t.Helper()
	p, err := layout.Write(path, empty.Index)
	if err != nil {
		t.Fatalf("layout: %v", err)
	}
	opt := layout.WithAnnotations(map[string]string{ocispec.AnnotationRefName: tag})
	switch img := img.(type) {
	case v1.Image:
		err = p.AppendImage(img, opt)
	case v1.ImageIndex:
		err = p.AppendIndex(img, opt)
	}
	if err != nil {
		t.Fatalf("layout: %v", err)
	}
	return path
}

// A seen is everything that can be seen of a file.
type seen struct {
	Mode, UID, GID, Major, Minor uint32
	Mtime                        int64
	Nsec                         uint32
	Target, Xattrs, Links        string
	Content                      string
}

// describe returns what can be seen of each path of a tree.
func describe(root *tree.Node, content func(*tree.Inode) string) map[string]seen {
	out := make(map[string]seen)
	first := make(map[*tree.Inode]string)
	root.Walk(func(p string, n *tree.Node) error {
		in := n.Inode
		s := seen{
			Mode: in.Mode, UID: in.UID, GID: in.GID, Major: in.Major, Minor: in.Minor, Mtime: in.Mtime, Nsec: in.MtimeNsec, Target: in.Target,
		}
		for _, x := range in.Xattrs {
			s.Xattrs += fmt.Sprintf("%s=%q ", x.Name, x.Value)
		}
		if in.IsFile() {
			s.Content = content(in)
		}
		if f, ok := first[in]; ok {
			s.Links = f
		} else {
			first[in] = p
		}
		out[p] = s
		return nil
	})
	return out
}

// An opened is a converted image, read back.
type opened struct {
	manifest ocispec.Manifest
	config   map[string]any
	boot     *bootstrap.Image
	files    map[string]seen
	layers   []map[string]seen // of the bootstraps inside the blobs, whose content is not looked at
}

func parseJSON(t tb, b []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatalf("%v in %s", err, b)
	}
}

func layoutBlob(t tb, path string, d ocispec.Descriptor) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(path, "blobs/sha256", d.Digest.Encoded()))
	if err != nil {
		t.Fatalf("%v", err)
	}
	if d.Digest.Algorithm().FromBytes(b) != d.Digest || int64(len(b)) != d.Size {
		t.Fatalf("blob %s is damaged or not %d bytes long", d.Digest, d.Size)
	}
	return b
}

// tagged returns what a tag of a layout stands for.
func tagged(t tb, path, tag string) ocispec.Descriptor {
	t.Helper()
	ds, err := oci.Open(oci.Reference{Path: path, Tag: tag}, source.Options{}).Find(context.Background())
	if err != nil {
		t.Fatalf("%v", err)
	}
	return ds[0]
}

// openConverted reads an image that Run wrote to a layout, all of it.
func openConverted(t tb, path string, d ocispec.Descriptor) *opened {
	t.Helper()
	o := &opened{}
	parseJSON(t, layoutBlob(t, path, d), &o.manifest)
	parseJSON(t, layoutBlob(t, path, o.manifest.Config), &o.config)
	boot := bootOf(t, layoutBlob(t, path, o.manifest.Layers[len(o.manifest.Layers)-1]))
	o.boot = parseBootstrap(t, boot)
	if len(o.boot.Blobs) != len(o.manifest.Layers)-1 {
		t.Fatalf("%d blobs, but %d blob layers", len(o.boot.Blobs), len(o.manifest.Layers)-1)
	}
	var objects [][]byte
	for i, info := range o.boot.Blobs {
		l := o.manifest.Layers[i]
		if l.Digest.Encoded() != info.ID {
			t.Fatalf("blob %d is %s, its layer %s", i, info.ID, l.Digest)
		}
		b := layoutBlob(t, path, l)
		objects = append(objects, decodeObject(t, filepath.Join(path, "blobs/sha256", info.ID), info, b))
		o.layers = append(o.layers, describe(layerBootstrapOf(t, b).Root, func(*tree.Inode) string { return "" }))
	}
	o.files = describe(o.boot.Root, func(in *tree.Inode) string { return contentOf(t, in, objects) })
	return o
}

// gunzip uncompresses in memory.
func gunzip(t tb, b []byte) []byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatalf("gzip: %v", err)
	}
	out, err := io.ReadAll(z)
	if err != nil {
		t.Fatalf("gzip: %v", err)
	}
	return out
}

// bootOf takes the bootstrap out of a bootstrap layer.
func bootOf(t tb, layer []byte) []byte {
	t.Helper()
	for tr := tar.NewReader(bytes.NewReader(gunzip(t, layer))); ; {
		h, err := tr.Next()
		if err != nil {
			t.Fatalf("bootstrap layer: %v", err)
		}
		if h.Name != bootstrapDir+bootstrapName {
			continue
		}
		boot, err := io.ReadAll(tr)
		if err != nil {
			t.Fatalf("bootstrap layer: %v", err)
		}
		return boot
	}
}

func parseBootstrap(t tb, b []byte) *bootstrap.Image {
	t.Helper()
	img, err := bootstrap.Read(bytes.NewReader(b), int64(len(b)), "bootstrap")
	if err != nil {
		t.Fatalf("%v", err)
	}
	return img
}

// decodeObject decodes and checks all chunks of a blob.
func decodeObject(t tb, path string, info rafs.BlobInfo, stored []byte) []byte {
	t.Helper()
	src := source.NewFile(path, int64(len(stored)))
	defer src.Close()
	meta, err := blob.ReadMeta(context.Background(), src, info)
	if err != nil {
		t.Fatalf("%v", err)
	}
	table, err := meta.Table(nil)
	if err != nil {
		t.Fatalf("%v", err)
	}
	dec, err := blob.NewDecoder()
	if err != nil {
		t.Fatalf("%v", err)
	}
	object := make([]byte, table.Size())
	for i := range table.Len() {
		c := table.At(i)
		if err := dec.Decode(c, table.Algo(), stored[c.BlobOffset:c.BlobOffset+uint64(c.Stored)], object[c.Offset:]); err != nil {
			t.Fatalf("%v", err)
		}
	}
	return object
}

func contentOf(t tb, in *tree.Inode, objects [][]byte) string {
	var s strings.Builder
	for i, c := range in.Chunks {
		n := min(uint64(in.ChunkSize), in.Size-uint64(i)*uint64(in.ChunkSize))
		if c.Blob == 0 {
			s.Write(make([]byte, n))
			continue
		}
		s.Write(objects[c.Blob-1][c.Offset : c.Offset+n])
	}
	if uint64(s.Len()) != in.Size {
		t.Fatalf("%d bytes of chunks for a file of %d", s.Len(), in.Size)
	}
	return s.String()
}

// layerBootstrapOf finds the bootstrap inside a blob by the table of contents at its end (FORMATS.md 1.7, 1.8).
func layerBootstrapOf(t tb, b []byte) *bootstrap.Image {
	t.Helper()
	h, err := tar.NewReader(bytes.NewReader(append(bytes.Clone(b[len(b)-512:]), make([]byte, 8192)...))).Next()
	if err != nil || h.Name != "rafs.blob.toc" {
		t.Fatalf("end of blob: %v %v", h, err)
	}
	le := func(b []byte, n int) (v int) {
		for i := range n {
			v |= int(b[i]) << (8 * i)
		}
		return v
	}
	for e := b[len(b)-512-int(h.Size) : len(b)-512]; len(e) > 0; e = e[128:] {
		if string(bytes.TrimRight(e[8:24], "\x00")) != "image.boot" {
			continue
		}
		off, n := le(e[56:], 8), le(e[64:], 8)
		body := b[off : off+n]
		if le(e, 4) == 2 {
			z, err := zstd.NewReader(nil)
			if err != nil {
				t.Fatalf("%v", err)
			}
			defer z.Close()
			if body, err = z.DecodeAll(body, nil); err != nil {
				t.Fatalf("bootstrap in blob: %v", err)
			}
		}
		return parseBootstrap(t, body)
	}
	t.Fatalf("no bootstrap in the blob")
	return nil
}

// convertTo converts a source into a new layout below dir and reads the image back.
func convertTo(t tb, dir, src string, o Options) *opened {
	t.Helper()
	o.Source, o.Dest = src, "oci:"+filepath.Join(dir, "out:latest")
	if _, err := Run(context.Background(), o); err != nil {
		t.Fatalf("%v", err)
	}
	path := filepath.Join(dir, "out")
	return openConverted(t, path, tagged(t, path, "latest"))
}

func diff(t *testing.T, got, want map[string]seen) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" {
		t.Fatalf("image differs (-want +got):\n%s", d)
	}
}

// snapshot returns every file below a directory.
func snapshot(t tb, root string) map[string]string {
	t.Helper()
	out := make(map[string]string)
	err := filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		rel, _ := filepath.Rel(root, p)
		out[rel] = string(b)
		return err
	})
	if err != nil {
		t.Fatalf("%v", err)
	}
	return out
}

// fixture returns the path of a shared fixture.
func fixture(t *testing.T, name string) string {
	t.Helper()
	p := filepath.Join("../../../shared/fixtures", name)
	if _, err := os.Stat(p); err != nil {
		t.Skipf("no fixtures here: %v", err)
	}
	return p
}
