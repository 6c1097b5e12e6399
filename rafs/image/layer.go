package image

import (
	"archive/tar"
	"bufio"
	"errors"
	"io"
	"path"

	"github.com/klauspost/compress/gzip"
)

// maxBootstrap is the largest bootstrap that is unpacked, in bytes. One of a million files has about 200 MiB.
const maxBootstrap = 1 << 30

// unpackLimit is how many bytes a layer of size bytes may unpack to. Bootstraps compress about 1:5; deflate can do 1:1032,
// which no bootstrap comes near.
func unpackLimit(size int64) int64 { return min(maxBootstrap, 16<<20+200*size) }

// unpack reads the file image/image.boot, or image.boot as older builders pack it, out of the tar r, which may be compressed
// with gzip and has size bytes as it comes. The blobs' chunk information (*.blob.meta) that may lie beside it is not
// used, and not unpacked where it comes after: the chunks' digests are in the blobs alone, so that it would save no request.
func unpack(r io.Reader, size int64) ([]byte, error) {
	br := bufio.NewReader(r)
	limit := unpackLimit(size)
	in := &io.LimitedReader{R: br, N: limit}
	if magic, err := br.Peek(2); err == nil && magic[0] == 0x1f && magic[1] == 0x8b {
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, bad("gzip: %w", err)
		}
		in.R = z
	}
	tr := tar.NewReader(in)
	for {
		h, err := tr.Next()
		switch {
		case in.N <= 0:
			return nil, bad("it unpacks to over %d bytes, more than a bootstrap that compresses to %d can have", limit, size)
		case err == io.EOF:
			return nil, bad("there is no image/image.boot in it")
		case err != nil:
			return nil, bad("tar, at unpacked offset %d: %w", limit-in.N, err)
		}
		if n := path.Clean("/" + h.Name); n != "/image/image.boot" && n != "/image.boot" || h.Typeflag != tar.TypeReg {
			continue
		}
		if h.Size > limit {
			return nil, bad("%s has %d bytes, at most %d are possible for a layer of %d", h.Name, h.Size, limit, size)
		}
		b := make([]byte, h.Size)
		if n, err := io.ReadFull(tr, b); err != nil && !(h.Size == 0 && errors.Is(err, io.EOF)) {
			return nil, bad("%s ends after %d of its %d bytes: %w", h.Name, n, h.Size, err)
		}
		return b, nil
	}
}
