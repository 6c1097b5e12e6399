package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"holdfast/rafs"
	"holdfast/rafs/blob"
	"holdfast/rafs/image"
)

// A prepared image is what both sides of a measurement work on: the image as holdfast mounts it, and its bootstrap and
// its only blob, decoded, as the bare side does.
type prepared struct {
	ref       string
	bootstrap string // file
	raw       string // file: the blob's cache object, complete
	table     *rafs.Table
	decoder   *blob.Decoder
	stored    *os.File // the blob as it is stored
	img       *image.Image
}

func (p *prepared) close() {
	p.img.Close()
	p.stored.Close()
}

// prepare converts a tar with flags and decodes the result.
func (b *bench) prepare(ctx context.Context, name, tarball string, flags ...string) (*prepared, error) {
	layout := filepath.Join(b.dir, name)
	p := &prepared{ref: "oci:" + layout + ":bench", bootstrap: layout + ".boot", raw: layout + ".raw"}
	args := append(append([]string{"convert"}, flags...), "tar:"+tarball, p.ref)
	if out, err := exec.CommandContext(ctx, b.bin, args...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("convert %s: %w: %s", tarball, err, out)
	}
	var err error
	if p.img, err = image.Open(ctx, p.ref, image.Options{}); err != nil {
		return nil, err
	}
	if len(p.img.Blobs) != 1 {
		return nil, fmt.Errorf("%s has %d blobs, want one", p.ref, len(p.img.Blobs))
	}
	p.table = p.img.Blobs[0].Table
	if p.decoder, err = blob.NewDecoder(); err != nil {
		return nil, err
	}
	if p.stored, err = os.Open(filepath.Join(layout, "blobs", "sha256", p.img.Blobs[0].Info.ID)); err != nil {
		return nil, err
	}
	if err := os.WriteFile(p.bootstrap, p.img.Bootstrap, 0o644); err != nil {
		return nil, err
	}
	return p, p.decodeAll()
}

func (p *prepared) decodeAll() error {
	out, err := os.Create(p.raw)
	if err != nil {
		return err
	}
	defer out.Close()
	if err := out.Truncate(int64(p.table.Size())); err != nil {
		return err
	}
	var stored, plain []byte
	for i := range p.table.Len() {
		c := p.table.At(i)
		if c.Zero() {
			continue
		}
		if stored, plain, err = p.decode(c, stored, plain); err != nil {
			return err
		}
		if _, err := out.WriteAt(plain, int64(c.Offset)); err != nil {
			return err
		}
	}
	return out.Sync()
}

// decode reads, decodes and checks one chunk, growing the buffers it is given.
func (p *prepared) decode(c rafs.Chunk, stored, plain []byte) ([]byte, []byte, error) {
	stored, plain = sized(stored, int(c.Stored)), sized(plain, int(c.Size))
	if _, err := p.stored.ReadAt(stored, int64(c.BlobOffset)); err != nil && err != io.EOF {
		return nil, nil, err
	}
	return stored, plain, p.decoder.Decode(c, p.table.Algo(), stored, plain)
}

func sized(b []byte, n int) []byte {
	if cap(b) < n {
		return make([]byte, n)
	}
	return b[:n]
}

// sparse makes an empty cache file for the bare side.
func (p *prepared) sparse(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Truncate(int64(p.table.Size()))
}
