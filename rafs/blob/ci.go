package blob

import (
	"encoding/binary"
	"errors"
	"fmt"

	"holdfast/rafs"
)

// Sizes of one chunk information entry (storage/src/meta/chunk_info_v1.rs, chunk_info_v2.rs).
const (
	ciSizeV1 = 16
	ciSizeV2 = 24
)

// Flags of a v2 entry, bits 56 to 63 of its first word.
const (
	ciCompressed = 1 << 0
	ciZran       = 1 << 1
	ciBatch      = 1 << 2
	ciEncrypted  = 1 << 3
	ciHasCRC32   = 1 << 4
)

// Masks of the fields of an entry.
const (
	ciOffsetMask   = 1<<40 - 1         // offset in the blob, both versions
	ciObjectMaskV1 = (1<<32 - 1) << 12 // object offset in place, v1
	ciSizeLow      = 1<<20 - 1         // low part of a v1 size, at bit 44
	ciSizeMaskV2   = 1<<24 - 1         // sizes of v2
	ciFlagsKnown   = ciCompressed | ciZran | ciBatch | ciEncrypted | ciHasCRC32
	ciUnsupported  = ciZran | ciBatch | ciEncrypted
	maxStoredChunk = rafs.MaxChunkSize // what 24 bits hold, plus one
	maxCIBytes     = rafs.MaxChunks * ciSizeV2
)

// ErrFormat is wrapped by errors about blob metadata that is damaged or contradicts itself.
var ErrFormat = errors.New("damaged blob metadata")

// appendCIv1 appends the v1 entry of c. c.Size and c.Stored must be 1 to 16 MiB, c.Offset below 1<<44 and a multiple of
// 4096, c.BlobOffset below 1<<40.
func appendCIv1(b []byte, c rafs.Chunk) []byte {
	size, stored := uint64(c.Size-1), uint64(c.Stored-1)
	b = binary.LittleEndian.AppendUint64(b, c.Offset&ciObjectMaskV1|size&ciSizeLow<<44|size>>20<<8)
	return binary.LittleEndian.AppendUint64(b, c.BlobOffset&ciOffsetMask|stored&ciSizeLow<<44|stored>>20<<40)
}

// parseCIv1 reads one v1 entry. The chunk is compressed with codec if its two sizes differ.
func parseCIv1(b []byte, codec rafs.Codec) (rafs.Chunk, error) {
	u, c := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
	if rest := u &^ (ciObjectMaskV1 | ciSizeLow<<44 | 0xf<<8); rest != 0 {
		return rafs.Chunk{}, fmt.Errorf("reserved bits %#x are set: %w", rest, ErrFormat)
	}
	r := rafs.Chunk{
		Offset:     u & ciObjectMaskV1,
		BlobOffset: c & ciOffsetMask,
		Size:       uint32(u>>44|u>>8&0xf<<20) + 1,
		Stored:     uint32(c>>44|c>>40&0xf<<20) + 1,
		Codec:      codec,
	}
	if r.Size == r.Stored {
		r.Codec = rafs.CodecNone
	}
	return r, nil
}

// appendCIv2 appends the v2 entry of c, within the limits of [appendCIv1].
func appendCIv2(b []byte, c rafs.Chunk) []byte {
	var flags uint64
	if c.Codec != rafs.CodecNone {
		flags = ciCompressed
	}
	b = binary.LittleEndian.AppendUint64(b, c.Offset>>12&(1<<32-1)|uint64(c.Size-1)<<32|flags<<56)
	b = binary.LittleEndian.AppendUint64(b, c.BlobOffset&ciOffsetMask|uint64(c.Stored)<<40)
	return binary.LittleEndian.AppendUint64(b, 0)
}

// parseCIv2 reads one v2 entry. The CRC some entries carry is left alone: it says nothing the digest does not say better.
func parseCIv2(b []byte, codec rafs.Codec) (rafs.Chunk, error) {
	u, c := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
	flags := u >> 56
	for _, f := range [...]struct {
		bit  uint64
		name string
	}{{ciZran, "ZRAN"}, {ciBatch, "BATCH"}, {ciEncrypted, "ENCRYPTED"}} {
		if flags&ciUnsupported&f.bit != 0 {
			return rafs.Chunk{}, fmt.Errorf("chunk flag %s: %w", f.name, rafs.ErrUnsupported)
		}
	}
	if flags&^ciFlagsKnown != 0 {
		return rafs.Chunk{}, fmt.Errorf("unknown chunk flags %#x: %w", flags&^ciFlagsKnown, rafs.ErrUnsupported)
	}
	r := rafs.Chunk{
		Offset:     u & (1<<32 - 1) << 12,
		BlobOffset: c & ciOffsetMask,
		Size:       uint32(u>>32&ciSizeMaskV2) + 1,
		Stored:     uint32(c >> 40),
		Codec:      codec,
	}
	if flags&ciCompressed == 0 {
		r.Codec = rafs.CodecNone
	}
	if r.Stored == 0 {
		return rafs.Chunk{}, fmt.Errorf("no bytes stored for %d: %w", r.Size, ErrFormat)
	}
	return r, nil
}

// parseCI reads an array of n entries, v2 or v1, whose length must fit exactly. Errors name the entry.
func parseCI(b []byte, n uint32, v2 bool, codec rafs.Codec) ([]rafs.Chunk, error) {
	size, parse := ciSizeV1, parseCIv1
	if v2 {
		size, parse = ciSizeV2, parseCIv2
	}
	if n > rafs.MaxChunks || uint64(len(b)) != uint64(n)*uint64(size) {
		return nil, fmt.Errorf("%d bytes of chunk information for %d chunks of %d bytes each: %w", len(b), n, size, ErrFormat)
	}
	rows := make([]rafs.Chunk, n)
	for i := range rows {
		r, err := parse(b[i*size:], codec)
		if err != nil {
			return nil, fmt.Errorf("chunk %d: %w", i, err)
		}
		rows[i] = r
	}
	return rows, nil
}
