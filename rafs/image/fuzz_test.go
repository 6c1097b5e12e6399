package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
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

// The platforms of any index lead to one of its images or an error of ours, and the layers of any manifest to a bootstrap or
// such an error.
func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"layers":[{"digest":"sha256:../x","annotations":{"containerd.io/snapshot/nydus-bootstrap":"true"}}],"manifests":[{"platform":{"os":"linux"}},{}]}`))
	f.Fuzz(func(t *testing.T, p []byte) {
		var idx ocispec.Index
		if json.Unmarshal(p, &idx) == nil {
			if _, err := choose(idx.Manifests); err != nil && !errors.Is(err, ErrFormat) {
				t.Errorf("choose: %v", err)
			}
		}
		var m ocispec.Manifest
		if json.Unmarshal(p, &m) != nil {
			return
		}
		for i := range m.Layers { // package oci lets no other digests pass
			m.Layers[i].Digest = digest.FromString(string(m.Layers[i].Digest))
		}
		if _, _, err := splitLayers("x", m); err != nil && !errors.Is(err, ErrFormat) && !errors.Is(err, ErrNotRAFS) {
			t.Errorf("layers: %v", err)
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
