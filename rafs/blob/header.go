package blob

import (
	"encoding/binary"
	"fmt"

	"holdfast/rafs"
)

// The CCT header after the CI array (storage/src/meta/mod.rs, BlobCompressionContextHeader).
const (
	cctSize  = 4096
	cctMagic = 0xb10bb10b
)

// A cctHeader says what the CI array before it holds.
type cctHeader struct {
	features   uint32
	codec      rafs.Codec // of the stored CI array
	entries    uint32
	offset     uint64 // of the CI array in the blob file
	stored     uint64 // bytes of it as stored
	size       uint64 // bytes of it decoded, zran or batch contexts included
	zranOffset uint64 // of zran or batch contexts in the decoded array
	zranSize   uint64
	zranCount  uint32
}

func (h *cctHeader) append(b []byte) []byte {
	le := binary.LittleEndian
	start := len(b)
	b = le.AppendUint32(b, cctMagic)
	b = le.AppendUint32(b, h.features)
	b = le.AppendUint32(b, uint32(h.codec))
	b = le.AppendUint32(b, h.entries)
	b = le.AppendUint64(b, h.offset)
	b = le.AppendUint64(b, h.stored)
	b = le.AppendUint64(b, h.size)
	b = le.AppendUint64(b, h.zranOffset)
	b = le.AppendUint64(b, h.zranSize)
	b = le.AppendUint32(b, h.zranCount)
	b = append(b, make([]byte, cctSize-4-(len(b)-start))...)
	return le.AppendUint32(b, cctMagic)
}

// parseHeader reads a header of exactly cctSize bytes. Features are not judged, so that the caller can name the blob.
func parseHeader(b []byte) (cctHeader, error) {
	le := binary.LittleEndian
	if len(b) != cctSize {
		return cctHeader{}, fmt.Errorf("chunk information header: %d bytes, want %d: %w", len(b), cctSize, ErrFormat)
	}
	if m, n := le.Uint32(b), le.Uint32(b[cctSize-4:]); m != cctMagic || n != cctMagic {
		return cctHeader{}, fmt.Errorf("chunk information header: magic numbers are %#x and %#x, want %#x: %w", m, n, uint32(cctMagic), ErrFormat)
	}
	codec := le.Uint32(b[8:])
	if codec > uint32(rafs.CodecZstd) {
		return cctHeader{}, fmt.Errorf("chunk information header: unknown compression %d: %w", codec, ErrFormat)
	}
	return cctHeader{
		features:   le.Uint32(b[4:]),
		codec:      rafs.Codec(codec),
		entries:    le.Uint32(b[12:]),
		offset:     le.Uint64(b[16:]),
		stored:     le.Uint64(b[24:]),
		size:       le.Uint64(b[32:]),
		zranOffset: le.Uint64(b[40:]),
		zranSize:   le.Uint64(b[48:]),
		zranCount:  le.Uint32(b[56:]),
	}, nil
}

// v2 reports whether the array holds v2 entries.
func (h *cctHeader) v2() bool { return h.features&rafs.FeatureChunkInfoV2 != 0 }
