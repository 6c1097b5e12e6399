package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// newLayer makes a layer of files "name-0" and so on, of size bytes each, which content gives.
func newLayer(name string, files, size int, content func(file string) []byte) (v1.Layer, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := range files {
		file := fmt.Sprintf("%s-%d", name, i)
		if err := w.WriteHeader(&tar.Header{Name: file, Mode: 0o644, Size: int64(size)}); err != nil {
			return nil, err
		}
		if _, err := w.Write(content(file)); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return static.NewLayer(b.Bytes(), types.OCIUncompressedLayer), nil
}

// repeated is a file's content that says which file it is of.
func repeated(size int) func(file string) []byte {
	return func(file string) []byte { return []byte(strings.Repeat(file+"\n", size)[:size]) }
}

// letters is content that is never twice the same, and compresses to three quarters.
func letters(r *rand.Rand, size int) func(file string) []byte {
	return func(string) []byte {
		data := make([]byte, size)
		for i := range data {
			data[i] = byte(r.Uint32()) & 0x3f
		}
		return data
	}
}

// newLayout makes an OCI layout for writeImage.
func newLayout(dir string) (layout.Path, error) { return layout.Write(dir, empty.Index) }

// writeImage adds an ordinary image of these layers to a layout.
func writeImage(path layout.Path, tag string, layers ...v1.Layer) error {
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.ConfigFile(img, &v1.ConfigFile{Architecture: "amd64", OS: "linux"})
	if err != nil {
		return err
	}
	if img, err = mutate.AppendLayers(img, layers...); err != nil {
		return err
	}
	return path.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": tag}))
}
