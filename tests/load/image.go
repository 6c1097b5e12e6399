package load

import (
	"archive/tar"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"holdfast/rafs"
	"holdfast/rafs/convert"
)

// PageSize is the size of a chunk of the images made here, and of what a reader misses at once.
const PageSize = 4096

// An Image says what an image holds: so many layers, each of which becomes a blob, with so many files of about so many bytes.
// Images of different names have no bytes in common.
type Image struct {
	Name          string // of letters
	Layers, Files int
	Size          int64
}

// A File is one of an image's files. Its bytes follow from Path.
type File struct {
	Path string // below the root
	Size int64
}

// List names the files. Their sizes differ, and few end with a page.
func (i Image) List() []File {
	var all []File
	for l := range i.Layers {
		for n := range i.Files {
			all = append(all, File{fmt.Sprintf("%sl%d-f%d", i.Name, l, n), i.Size - int64(n*997%PageSize)})
		}
	}
	return all
}

// Pages is how many pages the files have together.
func (i Image) Pages() (n int64) {
	for _, f := range i.List() {
		n += (f.Size + PageSize - 1) / PageSize
	}
	return n
}

// Fill fills p with the bytes that f has from off on, a multiple of eight.
func (f File) Fill(p []byte, off int64) {
	h := fnv.New64a()
	_, _ = h.Write([]byte(f.Path)) // never fails
	seed := h.Sum64()
	var word [8]byte
	for n := 0; n < len(p); n += 8 {
		// The finalizer of splitmix64: no two words of an image are alike, nor any all zero by more than chance.
		x := seed + uint64(off+int64(n))*0x9e3779b97f4a7c15
		x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
		x = (x ^ x>>27) * 0x94d049bb133111eb
		binary.LittleEndian.PutUint64(word[:], x^x>>31)
		copy(p[n:], word[:])
	}
}

// Convert makes the image at dest, as `holdfast convert` does, in chunks of PageSize.
func (i Image) Convert(ctx context.Context, dest string) (err error) {
	tmp, err := os.MkdirTemp("", "holdfast-load-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	plain := filepath.Join(tmp, "plain")
	if err := i.write(tmp, plain); err != nil {
		return fmt.Errorf("make an image for readers: %w", err)
	}
	_, err = convert.Run(ctx, convert.Options{Source: "oci:" + plain, Dest: dest, ChunkSize: PageSize, Codec: rafs.CodecNone})
	return err
}

// write writes an ordinary OCI image to plain, its layers to tmp.
func (i Image) write(tmp, plain string) error {
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	img, err := mutate.ConfigFile(img, &v1.ConfigFile{Architecture: "amd64", OS: "linux"})
	if err != nil {
		return err
	}
	files := i.List()
	for l := range i.Layers {
		name := filepath.Join(tmp, fmt.Sprintf("layer%d.tar", l))
		if err := writeLayer(name, files[l*i.Files:(l+1)*i.Files]); err != nil {
			return err
		}
		layer, err := tarball.LayerFromFile(name, tarball.WithMediaType(types.OCILayer))
		if err != nil {
			return err
		}
		if img, err = mutate.AppendLayers(img, layer); err != nil {
			return err
		}
	}
	p, err := layout.Write(plain, empty.Index)
	if err != nil {
		return err
	}
	return p.AppendImage(img)
}

func writeLayer(name string, files []File) error {
	out, err := os.Create(name)
	if err != nil {
		return err
	}
	defer out.Close()
	w := tar.NewWriter(out)
	for _, f := range files {
		b := make([]byte, f.Size)
		f.Fill(b, 0)
		if err := w.WriteHeader(&tar.Header{Name: f.Path, Mode: 0o644, Size: f.Size, Typeflag: tar.TypeReg}); err != nil {
			return err
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return errors.Join(w.Close(), out.Close())
}
