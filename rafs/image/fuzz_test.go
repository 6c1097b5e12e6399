package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs/source"
)

// Any layer gives a bootstrap within the bounds, or an error of ours.
func FuzzUnpack(f *testing.F) {
	f.Add(compress(f, makeTar(f, map[string][]byte{"image/image.boot": []byte("boot")})))
	f.Add(makeTar(f, map[string][]byte{"./image.boot": []byte("boot"), "x": nil}))
	f.Add(compress(f, nil))
	f.Add([]byte{0x1f, 0x8b})
	f.Fuzz(func(t *testing.T, p []byte) {
		b, err := unpack(bytes.NewReader(p), int64(len(p)))
		if err != nil && (!errors.Is(err, ErrFormat) || !source.IsPermanent(err) || b != nil) {
			t.Errorf("%d bytes, %v", len(b), err)
		}
		if int64(len(b)) > unpackLimit(int64(len(p))) {
			t.Errorf("%d bytes out of %d", len(b), len(p))
		}
	})
}

// Any manifest or index gives layers that can be fetched, or an error of ours.
func FuzzManifest(f *testing.F) {
	d := ocispec.Descriptor{MediaType: blobMediaType, Digest: "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", Size: 2}
	boot := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: d.Digest, Size: 2, Annotations: map[string]string{annotationBootstrap: "true"}}
	for _, v := range []any{ocispec.Manifest{Layers: []ocispec.Descriptor{d, boot}}, ocispec.Index{Manifests: []ocispec.Descriptor{d, boot}}} {
		b, err := json.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"layers":[{"digest":"sha256:../x"}],"manifests":[{"platform":{"os":"linux"}},{}]}`))
	f.Fuzz(func(t *testing.T, p []byte) {
		if idx, err := parseIndex(p); err == nil {
			if _, err := choose(idx.Manifests); err != nil && !errors.Is(err, ErrFormat) {
				t.Errorf("choose: %v", err)
			}
		} else if !errors.Is(err, ErrFormat) {
			t.Errorf("index: %v", err)
		}
		m, err := parseManifest(p)
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Errorf("manifest: %v", err)
			}
			return
		}
		boot, blobs, err := splitLayers("x", m)
		if err != nil {
			if !errors.Is(err, ErrFormat) && !errors.Is(err, ErrNotRAFS) {
				t.Errorf("layers: %v", err)
			}
			return
		}
		for id := range blobs {
			if len(id) != 64 || !idPattern.MatchString(id) {
				t.Errorf("blob id %q", id)
			}
		}
		if !idPattern.MatchString(boot.Digest.Encoded()) || boot.Size <= 0 {
			t.Errorf("bootstrap layer %+v", boot)
		}
	})
}

// Any image.json gives an error or the image that was saved.
func FuzzLoad(f *testing.F) {
	dir := f.TempDir()
	f.Add([]byte(`{"version":1,"ref":"oci:/x","digest":"sha256:0","bootstrap":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","blobs":[{"id":"../../x","size":-1}]}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`[]`))
	if err := os.WriteFile(filepath.Join(dir, savedBootstrap), nil, 0o600); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		if err := os.WriteFile(filepath.Join(dir, savedIndex), p, 0o600); err != nil {
			t.Fatal(err)
		}
		img, err := Load(dir, Options{})
		if err == nil {
			img.Close()
			t.Error("an empty bootstrap was loaded")
		}
	})
}
