package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs"
	"holdfast/rafs/blob"
	"holdfast/rafs/bootstrap"
	"holdfast/rafs/oci"
	"holdfast/rafs/source"
	"holdfast/rafs/tree"
)

// openConvertedTree reads the merged bootstrap of an image in a layout, and no content.
func openConvertedTree(t tb, path, tag string) *bootstrap.Image {
	t.Helper()
	var m ocispec.Manifest
	parseJSON(t, layoutBlob(t, path, tagged(t, path, tag)), &m)
	return parseBootstrap(t, bootOf(t, layoutBlob(t, path, m.Layers[len(m.Layers)-1])))
}

func TestImageIsPackedAsNydusReadsIt(t *testing.T) {
	tmp := t.TempDir()
	src := ociLayout(t, tmp+"/in", "v1", mutate.Annotations(ociImage(t,
		gzipped(makeTar(t, reg("a", strings.Repeat("lower", 5000)))),
		makeTar(t, reg(".wh.nothing", "")), // no data: its blob is not part of the image
		zstded(makeTar(t, reg("b", strings.Repeat("upper", 5000)))),
	), map[string]string{"org.example": "kept"}).(v1.Image))
	got := convertTo(t, tmp, "oci:"+src, Options{Codec: rafs.CodecZstd})

	m := got.manifest
	if m.MediaType != ocispec.MediaTypeImageManifest || m.SchemaVersion != 2 || m.Config.MediaType != ocispec.MediaTypeImageConfig || m.Annotations["org.example"] != "kept" {
		t.Errorf("manifest %+v", m)
	}
	if len(m.Layers) != 3 {
		t.Fatalf("%d layers, want two blobs and the bootstrap", len(m.Layers))
	}
	for _, l := range m.Layers[:2] {
		if l.MediaType != "application/vnd.oci.image.layer.nydus.blob.v1" || l.Annotations["containerd.io/snapshot/nydus-blob"] != "true" {
			t.Errorf("blob layer %+v", l)
		}
	}
	last := m.Layers[2]
	if last.MediaType != "application/vnd.oci.image.layer.v1.tar+gzip" || last.Annotations["containerd.io/snapshot/nydus-bootstrap"] != "true" ||
		last.Annotations["containerd.io/snapshot/nydus-fs-version"] != "6" {
		t.Errorf("bootstrap layer %+v", last)
	}
	d := tagged(t, tmp+"/out", "latest")
	if d.Platform == nil || !slices.Contains(d.Platform.OSFeatures, "nydus.remoteimage.v1") || d.Platform.Architecture != "amd64" {
		t.Errorf("platform in the index: %+v", d.Platform)
	}
	checkConfig(t, got, layoutBlob(t, tmp+"/out", last))
	checkBlobMetas(t, tmp+"/out", got)
}

// checkBlobMetas checks what is packed beside the bootstrap: for each blob, in order, what the blob says of its chunks.
func checkBlobMetas(t *testing.T, dir string, got *opened) {
	t.Helper()
	layers := got.manifest.Layers
	tr := tar.NewReader(bytes.NewReader(gunzip(t, layoutBlob(t, dir, layers[len(layers)-1]))))
	next := func(want string) []byte {
		h, err := tr.Next()
		if err != nil || h.Name != want {
			t.Fatalf("bootstrap layer: %+v, %v, want %s", h, err, want)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	next("image/")
	next("image/image.boot")
	for _, info := range got.boot.Blobs {
		packed, err := blob.ParseBlobMeta(next("image/"+info.ID+".blob.meta"), info)
		if err != nil {
			t.Fatal(err)
		}
		src := source.NewFile(filepath.Join(dir, "blobs/sha256", info.ID), int64(info.StoredSize))
		defer src.Close()
		inside, err := blob.ReadMeta(t.Context(), src, info)
		if err != nil {
			t.Fatal(err)
		}
		want, err := inside.Table(nil)
		if err != nil {
			t.Fatal(err)
		}
		digests := make([]rafs.Digest, want.Len())
		for i := range digests {
			digests[i] = want.At(i).Digest
		}
		if table, err := packed.Table(digests); err != nil || want.Len() == 0 || !reflect.DeepEqual(table, want) {
			t.Errorf("blob %s: packed %+v, %v, the blob has %+v", info.ID, table, err, want)
		}
	}
	if h, err := tr.Next(); err != io.EOF {
		t.Errorf("one more file: %+v, %v", h, err)
	}
}

func checkConfig(t *testing.T, got *opened, last []byte) {
	t.Helper()
	var c ocispec.Image
	b, err := json.Marshal(got.config)
	if err != nil {
		t.Fatal(err)
	}
	parseJSON(t, b, &c)
	want := []digest.Digest{got.manifest.Layers[0].Digest, got.manifest.Layers[1].Digest, digest.FromBytes(gunzip(t, last))}
	if !slices.Equal(c.RootFS.DiffIDs, want) {
		t.Errorf("diff ids %v, want %v", c.RootFS.DiffIDs, want)
	}
	if !slices.Equal(c.Config.Env, []string{"KEY=value"}) || !slices.Equal(c.Config.Cmd, []string{"/bin/true"}) || c.Architecture != "amd64" {
		t.Errorf("the configuration lost something: %+v", c)
	}
	var full []string
	for _, h := range c.History {
		if !h.EmptyLayer {
			full = append(full, h.CreatedBy)
		}
	}
	if !slices.Equal(full, []string{"step 0", "step 2", "holdfast convert"}) || len(c.History) != 4 {
		t.Errorf("history %+v", c.History)
	}
}

func TestChunksAreSharedBetweenLayers(t *testing.T) {
	tmp := t.TempDir()
	big := strings.Repeat("shared content\n", 1<<16)
	src := ociLayout(t, tmp+"/in", "v1", ociImage(t,
		makeTar(t, reg("unused", strings.Repeat("u", 9000)), reg("low", big)),
		makeTar(t, reg("copy", big), reg("new", "new"), reg(".wh.unused", "")),
		makeTar(t, link("hard", "low"), link("other", "low"), reg(".wh.low", "")),
	))
	got := convertTo(t, tmp, "oci:"+src, Options{ChunkSize: rafs.MinChunkSize})
	if len(got.boot.Blobs) != 2 || len(got.manifest.Layers) != 3 {
		t.Fatalf("%d blobs, %d layers", len(got.boot.Blobs), len(got.manifest.Layers))
	}
	for p, want := range map[string]string{"/copy": big, "/new": "new", "/hard": big, "/other": big} {
		if got.files[p].Content != want {
			t.Errorf("%s holds %d other bytes", p, len(got.files[p].Content))
		}
	}
	if _, ok := got.files["/low"]; ok {
		t.Error("/low is still there")
	}
	if n := got.boot.Blobs[1].ChunkCount; n != 1 {
		t.Errorf("the second blob has %d chunks, want only that of /new", n)
	}
}

func TestImageWithoutDataHasNoBlob(t *testing.T) {
	for name, layers := range map[string][][]byte{"no layers": {}, "an empty layer": {{}}, "an empty file": {makeTar(t, reg("z", ""))}} {
		t.Run(name, func(t *testing.T) {
			tmp := t.TempDir()
			src := ociLayout(t, tmp+"/in", "v1", ociImage(t, layers...))
			got := convertTo(t, tmp, "oci:"+src+":v1", Options{})
			if len(got.manifest.Layers) != 1 || len(got.boot.Blobs) != 0 || got.files["/"].Mode != tree.ModeDir|0o755 {
				t.Errorf("%+v", got.manifest)
			}
		})
	}
}

// multiPlatform writes an index of two platforms and an attestation to a layout.
func multiPlatform(t tb, path string) string {
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range []v1.Platform{{OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "arm64", Variant: "v8"}, {OS: "unknown", Architecture: "unknown"}} {
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{
			Add:        ociImage(t, gzipped(makeTar(t, reg("arch", p.Architecture), reg("same", "same")))),
			Descriptor: v1.Descriptor{Platform: &p},
		})
	}
	return ociLayout(t, path, "multi", idx)
}

func TestIndexBecomesAnIndexOfConvertedImages(t *testing.T) {
	tmp := t.TempDir()
	src := "oci:" + multiPlatform(t, tmp+"/in") + ":multi"
	res, err := Run(context.Background(), Options{Source: src, Dest: "oci:" + tmp + "/out:x"})
	if err != nil {
		t.Fatal(err)
	}
	root := tagged(t, tmp+"/out", "x")
	if root.MediaType != ocispec.MediaTypeImageIndex || res.Digest != root.Digest.String() || len(res.Images) != 2 || res.Images[1].Platform != "linux/arm64/v8" {
		t.Fatalf("root %+v, result %+v", root, res)
	}
	var idx ocispec.Index
	parseJSON(t, layoutBlob(t, tmp+"/out", root), &idx)
	if len(idx.Manifests) != 2 {
		t.Fatalf("%d manifests", len(idx.Manifests))
	}
	for i, arch := range []string{"amd64", "arm64"} {
		d := idx.Manifests[i]
		if d.Platform == nil || d.Platform.Architecture != arch || !slices.Contains(d.Platform.OSFeatures, oci.FeatureRAFS) {
			t.Errorf("platform %+v", d.Platform)
		}
		if got := openConverted(t, tmp+"/out", d); got.files["/arch"].Content != arch || got.files["/same"].Content != "same" {
			t.Errorf("%s holds %+v", arch, got.files)
		}
	}

	res, err = Run(context.Background(), Options{Source: src, Dest: "oci:" + tmp + "/out:arm", Platforms: []string{"linux/arm64"}})
	if err != nil {
		t.Fatal(err)
	}
	if d := tagged(t, tmp+"/out", "arm"); d.Digest != idx.Manifests[1].Digest || res.MediaType != ocispec.MediaTypeImageManifest {
		t.Errorf("one platform alone gives %+v, want the same manifest as in the index, %s", d, idx.Manifests[1].Digest)
	}
	_, err = Run(context.Background(), Options{Source: src, Dest: "oci:" + tmp + "/out:s390x", Platforms: []string{"linux/s390x"}})
	if err == nil {
		t.Fatal("a platform that is not there was converted")
	}
	wantError(t, err, oci.ErrNotFound, "linux/s390x", "linux/arm64/v8")
}

func TestTagIsReplacedAndOthersStay(t *testing.T) {
	tmp := t.TempDir()
	convert := func(content, tag string) string {
		t.Helper()
		x := writeFile(t, tmp+"/x.tar", makeTar(t, reg("f", content)))
		res, err := Run(context.Background(), Options{Source: "tar:" + x, Dest: "oci:" + tmp + "/out:" + tag})
		if err != nil {
			t.Fatal(err)
		}
		return res.Digest
	}
	one, two := convert("1", "one"), convert("2", "two")
	three := convert("3", "one")
	for tag, want := range map[string]string{"one": three, "two": two} {
		if got := tagged(t, tmp+"/out", tag).Digest.String(); got != want {
			t.Errorf("%s is %s, want %s", tag, got, want)
		}
	}
	if one == three {
		t.Error("different content has the same digest")
	}
	before := snapshot(t, tmp+"/out")
	x := writeFile(t, tmp+"/bad.tar", makeTar(t, reg("f", "x"), link("l", "nothing")))
	if _, err := Run(context.Background(), Options{Source: "tar:" + x, Dest: "oci:" + tmp + "/out:one"}); err == nil {
		t.Fatal("a bad tar was converted")
	}
	if after := snapshot(t, tmp+"/out"); fmt.Sprint(before) != fmt.Sprint(after) {
		t.Error("a failed conversion changed the layout")
	}
}

func TestSameInputGivesTheSameBytes(t *testing.T) {
	tmp := t.TempDir()
	var layers [][]byte
	for i := range 3 {
		var members []member
		for k := range 200 {
			content := strings.Repeat(fmt.Sprintf("%d ", k*(i+1)%17), 1+k*k)
			members = append(members, reg(fmt.Sprintf("d%d/f%d", k%7, k), content).with("user.b", "2").with("user.a", "1"))
		}
		layers = append(layers, gzipped(makeTar(t, members...)))
	}
	src := "oci:" + ociLayout(t, tmp+"/in", "x", ociImage(t, layers...))
	for _, codec := range []rafs.Codec{rafs.CodecZstd, rafs.CodecLZ4, rafs.CodecNone} {
		var first map[string]string
		for _, workers := range []int{1, 2, 7} {
			out := fmt.Sprintf("%s/out-%v-%d", tmp, codec, workers)
			if _, err := Run(context.Background(), Options{Source: src, Dest: "oci:" + out + ":x", ChunkSize: 16 << 10, Codec: codec, Workers: workers}); err != nil {
				t.Fatal(err)
			}
			s := snapshot(t, out)
			if first == nil {
				first = s
			}
			if len(s) < 7 || !equalFiles(first, s) {
				t.Errorf("%v with %d workers gives other files", codec, workers)
			}
		}
	}
}

func equalFiles(a, b map[string]string) bool {
	if len(a) != len(b) {
		return false
	}
	for k := range a {
		if v, ok := b[k]; !ok || v != a[k] {
			return false
		}
	}
	return true
}

func TestCancellingLeavesNothingBehind(t *testing.T) {
	tmp := t.TempDir()
	x := writeFile(t, tmp+"/x.tar", makeTar(t, reg("f", strings.Repeat("content", 1<<20))))
	ctx, cancel := context.WithCancelCause(context.Background())
	cause := errors.New("the user pressed ^C")
	cancel(cause)
	_, err := Run(ctx, Options{Source: "tar:" + x, Dest: "oci:" + tmp + "/out:x"})
	if !errors.Is(err, cause) {
		t.Errorf("error %v", err)
	}
	if _, err := os.Stat(tmp + "/out"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the layout is there: %v", err)
	}
}

func TestProgressEndsAtTheTotal(t *testing.T) {
	tmp := t.TempDir()
	src := "oci:" + ociLayout(t, tmp+"/in", "x", ociImage(t, gzipped(makeTar(t, reg("f", strings.Repeat("content", 1<<18)))), makeTar(t, reg("g", strings.Repeat("content", 1<<18)))))
	var last Progress
	res, err := Run(context.Background(), Options{Source: src, Dest: "oci:" + tmp + "/out:x", Progress: func(p Progress) { last = p }})
	if err != nil {
		t.Fatal(err)
	}
	if last != res.Totals || last.Read != last.Total || last.Total == 0 || last.Content != 2*7<<18 || last.Deduplicated != 2 || last.Chunks != 2 || last.Layer != 2 || last.Phase != PhaseStore {
		t.Errorf("last %+v, result %+v", last, res.Totals)
	}
}

func TestPrefetchListGoesIntoTheBootstrap(t *testing.T) {
	tmp := t.TempDir()
	x := "tar:" + writeFile(t, tmp+"/x.tar", makeTar(t, reg("usr/bin/app", "x"), reg("etc/conf", "y")))
	got := convertTo(t, tmp, x, Options{Prefetch: []string{"/usr/bin/app", "/etc"}})
	if !slices.Equal(got.boot.Prefetch, []string{"/usr/bin/app", "/etc"}) {
		t.Errorf("prefetch list %q", got.boot.Prefetch)
	}
	_, err := Run(context.Background(), Options{Source: x, Dest: "oci:" + tmp + "/out:y", Prefetch: []string{"/missing"}})
	if err == nil {
		t.Fatal("a path that is not there was accepted")
	}
	wantError(t, err, nil, "/missing")
}

func TestBadLayoutsAreRefused(t *testing.T) {
	// A layout with one image of two layers; the case damages it.
	blobFile := func(dir string, d digest.Digest) string { return filepath.Join(dir, "blobs/sha256", d.Encoded()) }
	manifest := func(t *testing.T, dir string) (m ocispec.Manifest) {
		parseJSON(t, layoutBlob(t, dir, tagged(t, dir, "x")), &m)
		return m
	}
	// rewrite changes the manifest, with digests that are right again.
	rewrite := func(t *testing.T, dir string, change func(*ocispec.Manifest)) {
		m := manifest(t, dir)
		change(&m)
		setRoot(t, dir, ocispec.MediaTypeImageManifest, m)
	}
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, dir string)
		is     error
		texts  []string
	}{
		{"layer missing", func(t *testing.T, dir string) { os.Remove(blobFile(dir, manifest(t, dir).Layers[1].Digest)) }, os.ErrNotExist, []string{"layer 2"}},
		{"layer damaged", func(t *testing.T, dir string) {
			l := manifest(t, dir).Layers[1]
			flip(t, blobFile(dir, l.Digest), int(l.Size)-600) // inside the padding: the tar reads well
		}, oci.ErrFormat, []string{"layer 2", "digest"}},
		{"layer damaged so that it cannot be read", func(t *testing.T, dir string) {
			flip(t, blobFile(dir, manifest(t, dir).Layers[0].Digest), 30)
		}, oci.ErrFormat, []string{"layer 1", "digest"}},
		{"layer cut", func(t *testing.T, dir string) {
			os.Truncate(blobFile(dir, manifest(t, dir).Layers[0].Digest), 50)
		}, nil, []string{"layer 1", "50 bytes"}},
		{"config missing", func(t *testing.T, dir string) { os.Remove(blobFile(dir, manifest(t, dir).Config.Digest)) }, os.ErrNotExist, []string{"configuration"}},
		{"config damaged", func(t *testing.T, dir string) {
			flip(t, blobFile(dir, manifest(t, dir).Config.Digest), 5)
		}, oci.ErrFormat, []string{"configuration"}},
		{"manifest damaged", func(t *testing.T, dir string) { flip(t, blobFile(dir, tagged(t, dir, "x").Digest), 5) }, oci.ErrFormat, nil},
		{"no index", func(t *testing.T, dir string) { os.Remove(dir + "/index.json") }, os.ErrNotExist, []string{"not an OCI image layout"}},
		{"index not JSON", func(t *testing.T, dir string) { writeFile(t, dir+"/index.json", []byte("{")) }, nil, []string{"index.json"}},
		{"huge index", func(t *testing.T, dir string) { writeFile(t, dir+"/index.json", make([]byte, oci.MaxDocument+1)) }, nil, []string{"index.json", "at most"}},
		{"huge manifest", func(t *testing.T, dir string) {
			setIndex(t, dir, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: tagged(t, dir, "x").Digest, Size: 1 << 40})
		}, nil, []string{"1099511627776", "at most"}},
		{"other media type", func(t *testing.T, dir string) { setRoot(t, dir, "application/x-other", map[string]int{}) }, nil, []string{"application/x-other", "not an image"}},
		{"digest that is a path", func(t *testing.T, dir string) {
			setIndex(t, dir, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: "sha256:../../../etc/passwd", Size: 5})
		}, digest.ErrDigestInvalidLength, []string{"etc/passwd"}},
		{"digest of another kind", func(t *testing.T, dir string) {
			rewrite(t, dir, func(m *ocispec.Manifest) { m.Layers[0].Digest = digest.SHA512.FromString("x") })
		}, nil, []string{"layer 1", "only sha256"}},
		{"negative size", func(t *testing.T, dir string) {
			rewrite(t, dir, func(m *ocispec.Manifest) { m.Layers[0].Size = -1 })
		}, nil, []string{"layer 1", "-1"}},
		{"wrong size", func(t *testing.T, dir string) {
			rewrite(t, dir, func(m *ocispec.Manifest) { m.Layers[0].Size++ })
		}, nil, []string{"layer 1"}},
		{"layer that is no tar", func(t *testing.T, dir string) {
			rewrite(t, dir, func(m *ocispec.Manifest) { m.Layers[0].MediaType = "application/wasm" })
		}, nil, []string{"layer 1", "application/wasm"}},
		{"encrypted layer", func(t *testing.T, dir string) {
			rewrite(t, dir, func(m *ocispec.Manifest) { m.Layers[0].MediaType += "+encrypted" })
		}, nil, []string{"decrypt"}},
		{"too many layers", func(t *testing.T, dir string) {
			rewrite(t, dir, func(m *ocispec.Manifest) { m.Layers = slices.Repeat(m.Layers, 600) })
		}, nil, []string{"1200 layers"}},
		{"more layers than a bootstrap has blobs", func(t *testing.T, dir string) {
			rewrite(t, dir, func(m *ocispec.Manifest) { m.Layers = slices.Repeat(m.Layers, 150) })
		}, nil, []string{"254"}},
		{"configuration that is no object", func(t *testing.T, dir string) {
			b := []byte(`{"history":7,"os":"linux"}`)
			writeFile(t, blobFile(dir, digest.FromBytes(b)), b)
			rewrite(t, dir, func(m *ocispec.Manifest) { m.Config = descriptor(m.Config.MediaType, b) })
		}, nil, []string{"history"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			tmp := t.TempDir()
			dir := ociLayout(t, tmp+"/in", "x", ociImage(t, gzipped(makeTar(t, reg("a", "a"))), makeTar(t, reg("b", "b"))))
			c.damage(t, dir)
			_, err := Run(context.Background(), Options{Source: "oci:" + dir + ":x", Dest: "oci:" + tmp + "/out:x"})
			if err == nil {
				t.Fatal("the image was converted")
			}
			wantError(t, err, c.is, append(c.texts, dir)...)
			if _, err := os.Stat(tmp + "/out"); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the layout is there: %v", err)
			}
		})
	}
}

// flip damages one byte of a file.
func flip(t *testing.T, path string, at int) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, path, damaged(b, at))
}

// setRoot stores a document and makes the layout's tag x stand for it.
func setRoot(t *testing.T, dir, mediaType string, v any) {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	d := descriptor(mediaType, b)
	writeFile(t, filepath.Join(dir, "blobs/sha256", d.Digest.Encoded()), b)
	setIndex(t, dir, d)
}

func setIndex(t *testing.T, dir string, d ocispec.Descriptor) {
	t.Helper()
	d.Annotations = map[string]string{ocispec.AnnotationRefName: "x"}
	b, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{d}})
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, dir+"/index.json", b)
}

func TestMissingTagIsNamedWithThoseThatAreThere(t *testing.T) {
	tmp := t.TempDir()
	dir := ociLayout(t, tmp+"/in", "there", ociImage(t, makeTar(t)))
	_, err := Run(context.Background(), Options{Source: "oci:" + dir + ":gone", Dest: "oci:" + tmp + "/out:x"})
	if err == nil {
		t.Fatal("converted")
	}
	wantError(t, err, oci.ErrNotFound, "gone", "there")
}

func TestConvertedImageIsNotConvertedAgain(t *testing.T) {
	tmp := t.TempDir()
	convertTo(t, tmp, "tar:"+writeFile(t, tmp+"/x.tar", makeTar(t, reg("a", "a"))), Options{})
	_, err := Run(context.Background(), Options{Source: "oci:" + tmp + "/out", Dest: "oci:" + tmp + "/again:x"})
	if err == nil {
		t.Fatal("converted")
	}
	wantError(t, err, nil, "mount it as it is")
}

func TestDestinationsThatCannotBe(t *testing.T) {
	tmp := t.TempDir()
	x := "tar:" + writeFile(t, tmp+"/x.tar", makeTar(t))
	for dest, text := range map[string]string{
		"":                             "want oci:PATH:TAG",
		"oci:" + tmp:                   "no tag",
		"oci:" + tmp + ":not/a:tag ":   "tag",
		"oci::x":                       "path is missing",
		"dir:" + tmp:                   "want oci:PATH:TAG",
		"oci:" + tmp + ":x":            "not an OCI image layout",
		"oci:" + tmp + "/x.tar/sub:x":  "not a directory",
		"oci:" + tmp + "/none/where:x": "no such file",
		"docker://host/repo@sha256:" + strings.Repeat("0", 64): "write a tag",
		"docker://UPPER/case": "docker://UPPER/case",
	} {
		_, err := Run(context.Background(), Options{Source: x, Dest: dest})
		if err == nil {
			t.Errorf("%q was written to", dest)
			continue
		}
		wantError(t, err, nil, text)
	}
	for _, src := range []string{"", "dir:", "file:x", "docker:x", tmp} {
		if _, err := Run(context.Background(), Options{Source: src, Dest: "oci:" + tmp + "/o:x"}); err == nil || !strings.Contains(err.Error(), "want dir:PATH") {
			t.Errorf("source %q: %v", src, err)
		}
	}
	for _, o := range []Options{{ChunkSize: 5000}, {ChunkSize: 32 << 20}, {Platforms: []string{"linux"}}} {
		o.Source, o.Dest = x, "oci:"+tmp+"/o:x"
		if _, err := Run(context.Background(), o); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
	if entries, _ := os.ReadDir(tmp); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}

func TestBlobsWithoutDataAreLeftOutOfEveryPlatform(t *testing.T) {
	tmp := t.TempDir()
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, arch := range []string{"amd64", "arm64"} {
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{
			Add:        ociImage(t, makeTar(t, dir("a")), makeTar(t, reg("a/b", arch), reg("c", "hidden")), makeTar(t, reg(".wh.c", "")), makeTar(t, dir("d"))),
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
		})
	}
	res, err := Run(context.Background(), Options{Source: "oci:" + ociLayout(t, tmp+"/in", "x", idx), Dest: "oci:" + tmp + "/out:x"})
	if err != nil {
		t.Fatal(err)
	}
	for _, img := range res.Images {
		if len(img.Blobs) != 1 {
			t.Errorf("%s has %d blobs", img.Platform, len(img.Blobs))
		}
	}
	// index.json, oci-layout, an index, and for each platform a manifest, a configuration, a bootstrap layer and a blob.
	if s := snapshot(t, tmp+"/out"); len(s) != 3+2*4 {
		t.Errorf("%d files in the layout", len(s))
	}
}

func TestHistoryHasAStepForEachLayerOfADictionary(t *testing.T) {
	got, err := rewriteHistory([]byte(`[{"created_by":"a"},{"created_by":"b"}]`), []bool{true, false}, 2)
	if err != nil {
		t.Fatal(err)
	}
	var steps []ocispec.History
	parseJSON(t, got, &steps)
	var full []string
	for _, s := range steps {
		if !s.EmptyLayer {
			full = append(full, s.CreatedBy+s.Comment)
		}
	}
	const own = "holdfast convert"
	if want := []string{"a", own + "chunk dictionary", own + "chunk dictionary", own + "RAFS bootstrap"}; !slices.Equal(full, want) {
		t.Errorf("steps with a layer %q, want %q", full, want)
	}
}
