package blob

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"holdfast/rafs"
)

// ErrDigest is wrapped by the error about a chunk whose bytes do not have the digest its table gives.
var ErrDigest = errors.New("digest mismatch")

// ErrDecode is wrapped by the error about stored bytes that are not what the table says: damaged, or longer or shorter
// decoded than the chunk.
var ErrDecode = errors.New("stored bytes cannot be decoded")

// A Decoder decodes chunks. It is safe for any number of goroutines; at most one decoder state a processor is kept.
type Decoder struct {
	zstd *zstd.Decoder
	gzip sync.Pool // of *gzipReader
}

type gzipReader struct {
	in bytes.Reader
	z  gzip.Reader
}

// NewDecoder returns a Decoder.
func NewDecoder() (*Decoder, error) {
	// The output of DecodeAll is bounded by the capacity of what it decodes into, and back references reach into that, so
	// that a frame's window or content size costs no memory.
	z, err := zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(0),
		zstd.WithDecoderLowmem(true),
		zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return nil, fmt.Errorf("set up zstd: %w", err)
	}
	return &Decoder{zstd: z}, nil
}

// Slack is how many bytes of capacity beyond a destination's length make a chunk faster to decode, by a quarter for small ones: with so
// much room zstd copies without looking where the end is.
const Slack = 16

// Decode decodes stored, all c.Stored bytes of the chunk as the blob has them, into dst[:c.Size] and checks the digest. It leaves the
// rest of dst alone; where dst ends with the chunk it may leave anything in the Slack bytes behind, as far as dst's capacity goes. After
// an error all of that means nothing. For [rafs.CodecNone] dst may be stored itself, which spares the copy. A zero row needs no stored
// bytes.
//
// Errors wrap [ErrDigest] or [ErrDecode] and name the chunk's place in the object and in the blob.
func (d *Decoder) Decode(c rafs.Chunk, algo rafs.DigestAlgo, stored, dst []byte) error {
	if uint64(len(stored)) != uint64(c.Stored) || uint64(len(dst)) < uint64(c.Size) {
		return chunkError(c, fmt.Errorf("%d bytes stored and room for %d are given, want %d and %d: %w", len(stored), len(dst), c.Stored, c.Size, ErrDecode))
	}
	room := int(c.Size)
	if len(dst) == room {
		room = min(cap(dst), room+Slack)
	}
	dst = dst[:c.Size:room]
	if c.Zero() {
		clear(dst)
		return nil
	}
	if err := d.expand(c.Codec, stored, dst); err != nil {
		return chunkError(c, fmt.Errorf("%s: %w: %w", c.Codec, ErrDecode, err))
	}
	if got := algo.Sum(dst); got != c.Digest {
		return chunkError(c, fmt.Errorf("%w: %s is %s, want %s", ErrDigest, algo, got, c.Digest))
	}
	return nil
}

func chunkError(c rafs.Chunk, err error) error {
	return fmt.Errorf("chunk at object offset %d, %d bytes at blob offset %d: %w", c.Offset, c.Stored, c.BlobOffset, err)
}

var (
	errLength = errors.New("decoded length differs from the chunk's")
	errCodec  = errors.New("unknown compression")
)

// expand decodes src into dst, which it must fill exactly.
func (d *Decoder) expand(codec rafs.Codec, src, dst []byte) error {
	n := 0
	switch codec {
	case rafs.CodecNone:
		if n = len(src); n == len(dst) {
			copy(dst, src)
		}
	case rafs.CodecLZ4:
		var err error
		if n, err = lz4.UncompressBlock(src, dst); err != nil {
			return err
		}
	case rafs.CodecZstd:
		out, err := d.zstd.DecodeAll(src, dst[:0])
		if err != nil {
			return err
		}
		n = len(out)
	case rafs.CodecGzip:
		return d.gunzip(src, dst)
	default:
		return errCodec
	}
	if n != len(dst) {
		return errLength
	}
	return nil
}

func (d *Decoder) gunzip(src, dst []byte) error {
	r, _ := d.gzip.Get().(*gzipReader)
	if r == nil {
		r = new(gzipReader)
	}
	defer func() {
		r.in.Reset(nil)
		d.gzip.Put(r)
	}()
	r.in.Reset(src)
	if err := r.z.Reset(&r.in); err != nil {
		return err
	}
	if _, err := io.ReadFull(&r.z, dst); err != nil {
		return err
	}
	// One more byte, which must not be there; reading to the end also checks the CRC.
	var more [1]byte
	if n, err := r.z.Read(more[:]); n != 0 || err == nil {
		return errLength
	} else if err != io.EOF {
		return err
	}
	return nil
}
