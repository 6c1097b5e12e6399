package rafs

import (
	"errors"
	"fmt"
	"sort"
)

// BlockSize is the EROFS block size of every image holdfast reads or writes, in bytes. EROFS over fscache accepts no
// other (fs/erofs/super.c, erofs_fc_fill_super, 5.19 - 7.1: "unsupported blksize for fscache mode").
const BlockSize = 4096

// Limits on chunks and blobs, as in FORMATS.md 1.3 and 1.5 (the RAFS v6 layout cannot express more).
const (
	MinChunkSize     = 4 << 10
	MaxChunkSize     = 16 << 20
	DefaultChunkSize = 1 << 20
	MaxBlobs         = 254     // the device id in a chunk index has 8 bits, and 0 is the bootstrap
	MaxChunks        = 1 << 24 // chunks of one blob: the index in a chunk index has 24 bits
	MaxStoredSize    = 1 << 40 // compressed bytes of one blob
	MaxObjectSize    = 1 << 44 // uncompressed bytes of one blob
)

// A Codec says how a chunk's bytes are encoded in its blob. The values are those of RafsV6Blob.compression_algo.
type Codec uint8

// Codecs.
const (
	CodecNone Codec = 0
	CodecLZ4  Codec = 1 // one raw LZ4 block
	CodecGzip Codec = 2
	CodecZstd Codec = 3 // one or more zstd frames
)

// String returns the codec's name as it is written on the command line.
func (c Codec) String() string {
	switch c {
	case CodecNone:
		return "none"
	case CodecLZ4:
		return "lz4"
	case CodecGzip:
		return "gzip"
	case CodecZstd:
		return "zstd"
	}
	return fmt.Sprintf("codec(%d)", uint8(c))
}

// ParseCodec is the inverse of [Codec.String] for the codecs holdfast writes: none, lz4 and zstd.
func ParseCodec(s string) (Codec, error) {
	switch s {
	case "none":
		return CodecNone, nil
	case "lz4":
		return CodecLZ4, nil
	case "zstd":
		return CodecZstd, nil
	}
	return 0, fmt.Errorf("unknown compression %q: use zstd, lz4 or none", s)
}

// A Chunk is one row of a chunk table.
type Chunk struct {
	Offset     uint64 // in the object, a multiple of BlockSize
	BlobOffset uint64 // in the blob file
	Size       uint32 // uncompressed bytes, 1 to MaxChunkSize
	Stored     uint32 // bytes in the blob; 0: the row is all zeros and nothing is stored
	Codec      Codec
	Digest     Digest // of the uncompressed bytes; unset when Stored is 0
}

// Zero reports whether the row stands for zeros that no blob stores.
func (c Chunk) Zero() bool { return c.Stored == 0 }

// End is the first object offset after the chunk's last block: the offset up to which writing the chunk, padded with
// zeros to BlockSize, fills the object.
func (c Chunk) End() uint64 { return AlignUp(c.Offset + uint64(c.Size)) }

// AlignUp rounds n up to a multiple of BlockSize.
func AlignUp(n uint64) uint64 { return (n + BlockSize - 1) &^ (BlockSize - 1) }

// ErrTable is wrapped by the errors of [NewTable].
var ErrTable = errors.New("inconsistent chunk table")

// A Table is the chunk table of one object, sorted by Offset. It is immutable and safe for concurrent use.
type Table struct {
	chunks []Chunk
	size   uint64
	algo   DigestAlgo
}

// NewTable checks rows (sorted by Offset, without overlaps, inside size bytes of object and stored bytes of blob) and
// returns them as a table; gaps become zero rows of at most MaxChunkSize. It keeps rows. size is rounded up to
// BlockSize. Errors wrap [ErrTable] and name the row.
func NewTable(rows []Chunk, size, stored uint64, algo DigestAlgo) (*Table, error) {
	if size > MaxObjectSize || stored > MaxStoredSize {
		return nil, fmt.Errorf("%w: object of %d bytes in a blob of %d bytes is over the limit (%d, %d)", ErrTable, size, stored, uint64(MaxObjectSize), uint64(MaxStoredSize))
	}
	if algo != Blake3 && algo != SHA256 {
		return nil, fmt.Errorf("%w: unknown digest algorithm %s", ErrTable, algo)
	}
	if len(rows) > MaxChunks {
		return nil, fmt.Errorf("%w: %d rows, at most %d are possible", ErrTable, len(rows), MaxChunks)
	}
	size = AlignUp(size)
	var next uint64
	gaps := 0
	for i, c := range rows {
		switch {
		case c.Offset%BlockSize != 0:
			return nil, fmt.Errorf("%w: row %d starts at offset %d, not on a %d byte boundary", ErrTable, i, c.Offset, BlockSize)
		case c.Size == 0 || c.Size > MaxChunkSize:
			return nil, fmt.Errorf("%w: row %d at offset %d is %d bytes long, want 1 to %d", ErrTable, i, c.Offset, c.Size, MaxChunkSize)
		case c.Offset < next:
			return nil, fmt.Errorf("%w: row %d at offset %d overlaps the row before it, which ends at %d", ErrTable, i, c.Offset, next)
		case c.Offset > size || c.End() > size:
			return nil, fmt.Errorf("%w: row %d at offset %d, %d bytes, ends after the object (%d bytes)", ErrTable, i, c.Offset, c.Size, size)
		case c.BlobOffset > stored || uint64(c.Stored) > stored-c.BlobOffset:
			return nil, fmt.Errorf("%w: row %d is stored at %d, %d bytes, outside the blob's data (%d bytes)", ErrTable, i, c.BlobOffset, c.Stored, stored)
		case c.Codec > CodecZstd:
			return nil, fmt.Errorf("%w: row %d has the unknown compression %s", ErrTable, i, c.Codec)
		case c.Codec == CodecNone && c.Stored != 0 && c.Stored != c.Size:
			return nil, fmt.Errorf("%w: row %d is not compressed, yet has %d bytes stored for %d", ErrTable, i, c.Stored, c.Size)
		case c.Stored > MaxChunkSize+MaxChunkSize/128+1024:
			return nil, fmt.Errorf("%w: row %d has %d bytes stored, more than any codec makes of %d", ErrTable, i, c.Stored, MaxChunkSize)
		}
		if c.Offset > next {
			gaps++
		}
		next = c.End()
	}
	t := &Table{chunks: rows, size: size, algo: algo}
	if gaps > 0 || next < size {
		t.fillGaps()
	}
	if len(t.chunks) > 2*MaxChunks {
		return nil, fmt.Errorf("%w: %d rows with the gaps filled", ErrTable, len(t.chunks))
	}
	return t, nil
}

// fillGaps inserts zero rows wherever the rows leave a part of the object out.
func (t *Table) fillGaps() {
	out := make([]Chunk, 0, len(t.chunks)+8)
	var next uint64
	zeros := func(to uint64) {
		for next < to && len(out) <= 2*MaxChunks {
			n := min(to-next, MaxChunkSize)
			out = append(out, Chunk{Offset: next, Size: uint32(n)})
			next += n
		}
	}
	for _, c := range t.chunks {
		zeros(c.Offset)
		out = append(out, c)
		next = c.End()
	}
	zeros(t.size)
	t.chunks = out
}

// Len is the number of rows.
func (t *Table) Len() int { return len(t.chunks) }

// At returns row i.
func (t *Table) At(i int) Chunk { return t.chunks[i] }

// Size is the object's size in bytes, a multiple of BlockSize.
func (t *Table) Size() uint64 { return t.size }

// Algo is the algorithm of every row's digest.
func (t *Table) Algo() DigestAlgo { return t.algo }

// Range returns the rows [first, last) that cover the object's bytes [off, off+n), cut to the object's size.
func (t *Table) Range(off, n uint64) (first, last int) {
	if off >= t.size || n == 0 {
		return 0, 0
	}
	end := t.size
	if n < t.size-off {
		end = off + n
	}
	first = sort.Search(len(t.chunks), func(i int) bool { return t.chunks[i].End() > off })
	last = first + sort.Search(len(t.chunks)-first, func(i int) bool { return t.chunks[first+i].Offset >= end })
	return first, last
}
