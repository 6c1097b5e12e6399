package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs/bootstrap"
	"holdfast/rafs/convert"
	"holdfast/rafs/oci"
	"holdfast/rafs/source"
	"holdfast/rafs/tree"
)

// What each damage to an image in a layout becomes when it is opened.
func TestDamagedImagesAreNamed(t *testing.T) {
	boot := func(m *ocispec.Manifest) *ocispec.Descriptor { return &m.Layers[len(m.Layers)-1] }
	replaceBoot := func(layer []byte) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			d := putBlob(t, dir, layer)
			rewrite(t, dir, func(m *ocispec.Manifest) { boot(m).Digest, boot(m).Size = d, int64(len(layer)) })
		}
	}
	edit := func(f func(m *ocispec.Manifest)) func(*testing.T, string) {
		return func(t *testing.T, dir string) { rewrite(t, dir, f) }
	}
	for _, tt := range []struct {
		name   string
		damage func(t *testing.T, dir string)
		want   error
		says   []string
	}{
		{"no index", func(t *testing.T, dir string) { os.Remove(dir + "/index.json") }, os.ErrNotExist, []string{"not an OCI image layout"}},
		{"index is not JSON", func(t *testing.T, dir string) { flip(t, dir+"/index.json", 0) }, ErrFormat, []string{"index.json"}},
		{"index is huge", func(t *testing.T, dir string) { os.Truncate(dir+"/index.json", source.MaxManifest+1) }, ErrFormat, []string{"index.json", "4194305"}},
		{"no such tag", func(t *testing.T, dir string) {
			var idx ocispec.Index
			readJSON(t, dir+"/index.json", &idx)
			idx.Manifests[0].Annotations = map[string]string{ocispec.AnnotationRefName: "other"}
			writeJSON(t, dir+"/index.json", idx)
		}, oci.ErrNotFound, []string{`"v1"`, `"other"`}},
		{"manifest changed", func(t *testing.T, dir string) {
			var idx ocispec.Index
			readJSON(t, dir+"/index.json", &idx)
			flip(t, blobPath(dir, idx.Manifests[0].Digest), 5)
		}, ErrFormat, []string{"manifest sha256:", "fetch the image again"}},
		{"manifest gone", func(t *testing.T, dir string) {
			var idx ocispec.Index
			readJSON(t, dir+"/index.json", &idx)
			os.Remove(blobPath(dir, idx.Manifests[0].Digest))
		}, os.ErrNotExist, []string{"blobs/sha256/"}},
		{"digest that leads out of the layout", func(t *testing.T, dir string) {
			var idx ocispec.Index
			readJSON(t, dir+"/index.json", &idx)
			idx.Manifests[0].Digest = "sha256:../../../../etc/passwd"
			writeJSON(t, dir+"/index.json", idx)
		}, ErrFormat, []string{"want sha256:<64 hex digits>"}},
		{"layer with such a digest", edit(func(m *ocispec.Manifest) { m.Layers[0].Digest = "sha256:../x" }), ErrFormat, []string{"layer 1"}},
		{"layer with another algorithm", edit(func(m *ocispec.Manifest) { m.Layers[0].Digest = digest.SHA512.FromString("x") }), ErrFormat, []string{"layer 1"}},
		{"layer without a size", edit(func(m *ocispec.Manifest) { m.Layers[0].Size = -1 }), ErrFormat, []string{"layer 1", "size -1"}},
		{"manifest is an index", edit(func(m *ocispec.Manifest) { m.MediaType = ocispec.MediaTypeImageIndex }), ErrFormat, []string{"calls itself"}},
		{"no bootstrap", edit(func(m *ocispec.Manifest) { m.Layers = m.Layers[:1] }), ErrNotRAFS, []string{"holdfast convert oci:"}},
		{"ordinary image", edit(func(m *ocispec.Manifest) {
			m.Layers = []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: m.Layers[0].Digest, Size: m.Layers[0].Size}}
		}), ErrNotRAFS, []string{"holdfast convert oci:"}},
		{"RAFS version 5", edit(func(m *ocispec.Manifest) { boot(m).Annotations[oci.AnnotationVersion] = "5" }), ErrNotRAFS, []string{`RAFS version "5"`}},
		{"bootstrap of another media type", edit(func(m *ocispec.Manifest) { boot(m).MediaType = "application/x-iso9660" }), ErrFormat, []string{"x-iso9660"}},
		{"bootstrap layer of another size", edit(func(m *ocispec.Manifest) { boot(m).Size++ }), source.ErrShort, []string{"bootstrap"}},
		{"bootstrap layer of no bytes", edit(func(m *ocispec.Manifest) { boot(m).Size = 0 }), ErrFormat, []string{"bootstrap layer", "has 0 bytes"}},
		{"bootstrap layer too large", edit(func(m *ocispec.Manifest) { boot(m).Size = maxBootstrap + 1 }), ErrFormat, []string{"bootstrap layer"}},
		{"bootstrap layer changed", func(t *testing.T, dir string) {
			rewrite(t, dir, func(m *ocispec.Manifest) { flip(t, blobPath(dir, boot(m).Digest), 60) })
		}, ErrFormat, []string{"bootstrap layer sha256:", "fetch the image again"}},
		{"bootstrap layer without a bootstrap", replaceBoot(compress(t, makeTar(t, map[string][]byte{"image/other": []byte("x")}))), ErrFormat, []string{"no image/image.boot"}},
		{"bootstrap layer is no tar", replaceBoot(compress(t, random(1, 4096))), ErrFormat, []string{"tar, at unpacked offset"}},
		{"bootstrap layer is cut", replaceBoot(compress(t, makeTar(t, map[string][]byte{"image/image.boot": random(1, 9000)}))[:5000]), ErrFormat, []string{"image.boot ends after"}},
		{"bootstrap layer is a bomb", replaceBoot(compress(t, makeTar(t, map[string][]byte{"a": make([]byte, 40<<20), "image/image.boot": nil}))), ErrFormat, []string{"unpacks to over"}},
		{"bootstrap is a bomb", replaceBoot(compress(t, makeTar(t, map[string][]byte{"image/image.boot": make([]byte, 40<<20)}))), ErrFormat, []string{"image.boot has 41943040 bytes"}},
		{"bootstrap is empty", replaceBoot(compress(t, makeTar(t, map[string][]byte{"image/image.boot": nil}))), nil, []string{"bootstrap"}},
		{"bootstrap is garbage", replaceBoot(compress(t, makeTar(t, map[string][]byte{"image/image.boot": random(1, 8192)}))), nil, []string{"bootstrap", "offset"}},
		{"blob not in the manifest", edit(func(m *ocispec.Manifest) { m.Layers = m.Layers[1:] }), ErrFormat, []string{"no layer of the manifest"}},
		{"blob file gone", func(t *testing.T, dir string) {
			rewrite(t, dir, func(m *ocispec.Manifest) { os.Remove(blobPath(dir, m.Layers[0].Digest)) })
		}, os.ErrNotExist, []string{"blobs/sha256/"}},
		{"blob file cut", func(t *testing.T, dir string) {
			rewrite(t, dir, func(m *ocispec.Manifest) { os.Truncate(blobPath(dir, m.Layers[0].Digest), 1000) })
		}, source.ErrShort, []string{"it has 1000 bytes"}},
		{"table of contents changed", func(t *testing.T, dir string) {
			rewrite(t, dir, func(m *ocispec.Manifest) { flip(t, blobPath(dir, m.Layers[0].Digest), -600) })
		}, nil, []string{"table of contents", "offset"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := makeLayout(t, sample(), convert.Options{})
			tt.damage(t, dir)
			img, err := Open(t.Context(), "oci:"+dir+":v1", Options{})
			if err == nil {
				img.Close()
			}
			contains(t, err, append(tt.says, "oci:"+dir)...)
			if tt.want != nil && !errors.Is(err, tt.want) || !source.IsPermanent(err) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestRegistryThatIsDownIsTemporary(t *testing.T) {
	ref, stop := push(t, sample())
	stop()
	if _, err := Open(t.Context(), ref, Options{}); err == nil || source.IsPermanent(err) {
		t.Errorf("got %v", err)
	}
}

func TestMissingRAFSFilesAreNamed(t *testing.T) {
	dir := makeLayout(t, sample(), convert.Options{})
	boot := filepath.Join(t.TempDir(), "boot")
	_, err := Open(t.Context(), "rafs:"+boot, Options{})
	contains(t, err, boot)
	img := open(t, "oci:"+dir)
	if err := os.WriteFile(boot, img.Bootstrap, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = Open(t.Context(), "rafs:"+boot, Options{})
	contains(t, err, img.Blobs[0].Info.ID, "rafs:BOOTSTRAP,BLOBDIR")
	if bare := open(t, "rafs:"+boot+","+filepath.Join(dir, "blobs/sha256")); bare.Digest != sum(img.Bootstrap) {
		t.Errorf("digest %s", bare.Digest)
	}
}

func TestPlatformIsThisMachinesAndRAFSIsPreferred(t *testing.T) {
	p := func(os, arch string, features ...string) ocispec.Descriptor {
		return ocispec.Descriptor{Size: int64(len(features)), Platform: &ocispec.Platform{OS: os, Architecture: arch, OSFeatures: features}}
	}
	here := runtime.GOARCH
	ds := []ocispec.Descriptor{{}, p("windows", here), p("linux", "s390x", oci.FeatureRAFS), p("linux", here), p("linux", here, oci.FeatureRAFS)}
	if d, err := choose(ds); err != nil || d.Size != 1 || d.Platform.Architecture != here {
		t.Errorf("got %+v, %v", d, err)
	}
	if d, err := choose(ds[:4]); err != nil || d.Platform.OS != "linux" || d.Platform.Architecture != here {
		t.Errorf("without a RAFS one: %+v, %v", d, err)
	}
	_, err := choose(ds[:3])
	contains(t, err, "linux/"+here, "windows/"+here, "linux/s390x")
	if d, err := choose(ds[2:3]); err != nil || d.Platform.Architecture != "s390x" {
		t.Errorf("the only one: %+v, %v", d, err)
	}
}

func TestCheckListsEveryDamagedChunk(t *testing.T) {
	dir := makeLayout(t, map[string][]byte{"f": random(3, 20*4096)}, convert.Options{ChunkSize: 4096})
	img := open(t, "oci:"+dir)
	path := img.Blobs[0].Source.String()
	chunks := rows(img.Blobs[0].Table)
	for _, n := range []int{3, 17} {
		flip(t, path, int64(chunks[n].BlobOffset)+5)
	}
	var last Progress
	r, err := Check(t.Context(), img.Ref, Options{}, func(p Progress) { last = p })
	if !errors.Is(err, ErrDamaged) {
		t.Fatalf("got %v", err)
	}
	contains(t, err, path)
	if len(r.Damage) != 3 || r.Truncated || r.Chunks != 18 {
		t.Fatalf("%d chunks are good, damage is %q", r.Chunks, r.Damage)
	}
	all := strings.Join(r.Damage, "\n")
	for _, want := range []string{
		fmt.Sprintf("chunk at object offset %d", chunks[3].Offset), fmt.Sprintf("blob offset %d", chunks[17].BlobOffset), "its content has sha256",
	} {
		if !strings.Contains(all, want) {
			t.Errorf("damage %q does not say %q", all, want)
		}
	}
	if last.Done != last.Total || last.Total != uint64(img.Blobs[0].Source.Size()) {
		t.Errorf("progress ended at %+v", last)
	}
}

func TestCheckGivesUpAfterEnoughDamage(t *testing.T) {
	dir := makeLayout(t, map[string][]byte{"f": random(3, 300*4096)}, convert.Options{ChunkSize: 4096})
	img := open(t, "oci:"+dir)
	path := img.Blobs[0].Source.String()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range rows(img.Blobs[0].Table) {
		b[c.BlobOffset] ^= 1
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := Check(t.Context(), img.Ref, Options{}, nil)
	if !errors.Is(err, ErrDamaged) || len(r.Damage) != maxDamage || !r.Truncated {
		t.Errorf("%d places, %v", len(r.Damage), err)
	}
}

// References that the bootstrap's own reader takes, because they lie inside the object, but that are no chunk of the blob.
func TestCheckFindsReferencesToNoChunk(t *testing.T) {
	dir := makeLayout(t, map[string][]byte{"a": random(1, 3*4096), "b": random(2, 5000), "c": random(3, 10000)}, convert.Options{ChunkSize: 8192})
	img := open(t, "oci:"+dir)
	for name, tt := range map[string]struct {
		change func(root *tree.Node)
		says   string
	}{
		"in the middle of a chunk": {func(root *tree.Node) { root.Child("b").Inode.Chunks[0].Offset = 4096 }, "no chunk of the blob begins there"},
		"another index":            {func(root *tree.Node) { root.Child("b").Inode.Chunks[0].Index = 0 }, "the file says 0"},
		"another size":             {func(root *tree.Node) { root.Child("b").Inode.Size = 5001 }, "have 5000 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			boot, err := bootstrap.Read(bytes.NewReader(img.Bootstrap), int64(len(img.Bootstrap)), "test")
			if err != nil {
				t.Fatal(err)
			}
			tt.change(boot.Root)
			b, err := bootstrap.Write(boot)
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(t.TempDir(), "boot")
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			r, err := Check(t.Context(), "rafs:"+path+","+filepath.Join(dir, "blobs/sha256"), Options{}, nil)
			contains(t, err, tt.says, `"/b": chunk 0`, img.Blobs[0].Info.ID)
			if len(r.Damage) != 1 {
				t.Errorf("damage %q", r.Damage)
			}
		})
	}
}

func TestCheckFindsLayersThatTheBootstrapDoesNotKnow(t *testing.T) {
	dir := makeLayout(t, sample(), convert.Options{})
	extra := putBlob(t, dir, []byte("nobody's"))
	rewrite(t, dir, func(m *ocispec.Manifest) {
		m.Layers = append([]ocispec.Descriptor{{MediaType: oci.MediaTypeBlob, Digest: extra, Size: 8}}, m.Layers...)
	})
	_, err := Check(t.Context(), "oci:"+dir, Options{}, nil)
	contains(t, err, extra.Encoded(), "manifest sha256:")
}

// A network that fails is no damage.
func TestCheckOfARegistryThatGoesDownIsNoDamage(t *testing.T) {
	ref, stop := push(t, sample())
	img := open(t, ref)
	stop()
	c := &checker{img: img}
	if err := c.checkBlob(t.Context(), 0); err == nil || len(c.report.Damage) > 0 {
		t.Errorf("got %v, damage %q", err, c.report.Damage)
	}
}

func TestInspectCountsSharedChunks(t *testing.T) {
	files := sample()
	d, err := Inspect(t.Context(), "oci:"+makeLayout(t, files, convert.Options{}), Options{}, false)
	if err != nil {
		t.Fatal(err)
	}
	var total uint64
	for _, f := range files {
		total += uint64(len(f))
	}
	// "same" has the five chunks of "big" again.
	s := d.Dedup
	if s.FileBytes != total || s.SharedBytes != 300000 || s.References != s.Chunks+5 || s.ChunkBytes+s.SharedBytes != total || d.Blobs[0].Shared != 5 {
		t.Errorf("of %d bytes: %+v, %+v", total, s, d.Blobs)
	}
	b, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{`"ref":`, `"shared_bytes":300000`, `"path":"/dir/small"`, `"chunk_size":65536`} {
		if !bytes.Contains(b, []byte(key)) {
			t.Errorf("JSON does not hold %s", key)
		}
	}
}

func TestPrintQuotesWhatATerminalWouldObey(t *testing.T) {
	d := &Description{Tree: []Entry{
		{Path: "/\x1b[2J", Type: "file", Mode: 0o4755, Nlink: 1},
		{Path: "/l", Type: "link", Mode: 0o777, Target: "a b"},
		{Path: "/t", Type: "dir", Mode: 0o1776}, {Path: "/n", Type: "char", Mode: 0o2644, Major: 1, Minor: 3},
	}}
	var b bytes.Buffer
	if err := d.Print(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`-rwsr-xr-x `, `"/\x1b[2J"`, `lrwxrwxrwx`, `/l -> "a b"`, `drwxrwxrwT`, `crw-r-Sr--`, `1,3`} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is not in\n%s", want, b.String())
		}
	}
}
