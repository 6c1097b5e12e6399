package blob

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strconv"

	"holdfast/rafs"
)

// The table of contents at a blob's end (storage/src/meta/toc.rs).
const (
	tocEntrySize = 128
	tocNameSize  = 16
	maxTOCSize   = 64*tocEntrySize + rafs.TarHeaderSize // six names exist; the rest is room for newer builders
)

// Names of TOC entries; the tar headers in the blob bear the same, but for the CCT header, which has none of its own.
const (
	tocBlob   = "image.blob"
	tocBoot   = "image.boot"
	tocMeta   = "blob.meta"
	tocHeader = "blob.meta.header"
	tocDigest = "blob.digest"
	tocSelf   = "rafs.blob.toc"
)

// Compression flags of a TOC entry.
const (
	tocNone = 1
	tocZstd = 2
	tocLZ4  = 4
)

// A tocEntry locates one part of a blob.
type tocEntry struct {
	name   string
	codec  rafs.Codec
	digest rafs.Digest // sha256 of the decoded bytes
	offset uint64      // of image.blob unreliable: builders before 2.3 wrote its size; chunk data starts at 0
	stored uint64
	size   uint64
}

func (e *tocEntry) append(b []byte) []byte {
	le := binary.LittleEndian
	flags := uint32(tocNone)
	switch e.codec {
	case rafs.CodecZstd:
		flags = tocZstd
	case rafs.CodecLZ4:
		flags = tocLZ4
	}
	b = le.AppendUint32(b, flags)
	b = le.AppendUint32(b, 0)
	var name [tocNameSize]byte
	copy(name[:], e.name)
	b = append(b, name[:]...)
	b = append(b, e.digest[:]...)
	b = le.AppendUint64(b, e.offset)
	b = le.AppendUint64(b, e.stored)
	b = le.AppendUint64(b, e.size)
	return append(b, make([]byte, 48)...)
}

// A toc is a parsed table of contents. Entries with names nobody knows are kept and never used.
type toc []tocEntry

// find returns the entry called name, or nil.
func (t toc) find(name string) *tocEntry {
	for i := range t {
		if t[i].name == name {
			return &t[i]
		}
	}
	return nil
}

// parseTOC reads the entries and the tar header after them, checked against the size of the blob file they end.
func parseTOC(b []byte, blobSize uint64) (toc, error) {
	if len(b) < rafs.TarHeaderSize {
		return nil, fmt.Errorf("table of contents: %d bytes are too few for its tar header: %w", len(b), ErrFormat)
	}
	n, err := parseTarHeader(b[len(b)-rafs.TarHeaderSize:], tocSelf)
	if err != nil {
		return nil, fmt.Errorf("table of contents: %w", err)
	}
	b = b[:len(b)-rafs.TarHeaderSize]
	if n != uint64(len(b)) || len(b) == 0 || len(b)%tocEntrySize != 0 {
		return nil, fmt.Errorf("table of contents: %d bytes of entries, its tar header says %d: %w", len(b), n, ErrFormat)
	}
	var t toc
	for ; len(b) > 0; b = b[tocEntrySize:] {
		e, err := parseTOCEntry(b[:tocEntrySize], blobSize)
		if err != nil {
			return nil, fmt.Errorf("table of contents: entry %d: %w", len(t), err)
		}
		if t.find(e.name) != nil {
			return nil, fmt.Errorf("table of contents: two entries called %q: %w", e.name, ErrFormat)
		}
		t = append(t, e)
	}
	return t, nil
}

func parseTOCEntry(b []byte, blobSize uint64) (tocEntry, error) {
	le := binary.LittleEndian
	e := tocEntry{
		name:   string(bytes.TrimRight(b[8:8+tocNameSize], "\x00")),
		digest: rafs.Digest(b[24:56]),
		offset: le.Uint64(b[56:]),
		stored: le.Uint64(b[64:]),
		size:   le.Uint64(b[72:]),
	}
	switch flags := le.Uint32(b); flags {
	case tocNone:
		e.codec = rafs.CodecNone
	case tocZstd:
		e.codec = rafs.CodecZstd
	case tocLZ4:
		e.codec = rafs.CodecLZ4
	default:
		return e, fmt.Errorf("%q: unknown compression flags %#x: %w", e.name, flags, ErrFormat)
	}
	if e.name == tocBlob {
		e.offset = 0
	}
	if e.offset > blobSize || e.stored > blobSize-e.offset {
		return e, fmt.Errorf("%q: offset %d, %d bytes, outside the blob (%d bytes): %w", e.name, e.offset, e.stored, blobSize, ErrFormat)
	}
	if e.codec == rafs.CodecNone && e.stored != e.size && e.name != tocBlob {
		return e, fmt.Errorf("%q: not compressed, yet %d bytes stored for %d: %w", e.name, e.stored, e.size, ErrFormat)
	}
	return e, nil
}

// Fields of a GNU tar header that the builders fill; everything else is zero.
const (
	tarSizeOff  = 124
	tarMtimeOff = 136
	tarSumOff   = 148
	tarTypeOff  = 156
	tarMagicOff = 257
	tarMagic    = "ustar  \x00"
)

// appendTarHeader appends the header that says that the size bytes before it are called name. The size has 11 octal
// digits; beyond that GNU's base-256 form is used.
func appendTarHeader(b []byte, name string, size uint64) []byte {
	var h [rafs.TarHeaderSize]byte
	copy(h[:], name)
	if size < 1<<33 {
		copy(h[tarSizeOff:], fmt.Sprintf("%011o", size))
	} else {
		binary.BigEndian.PutUint64(h[tarSizeOff+4:], size)
		h[tarSizeOff] = 0x80
	}
	copy(h[tarMtimeOff:], "00000000000")
	h[tarTypeOff] = '0'
	copy(h[tarMagicOff:], tarMagic)
	copy(h[tarSumOff:], fmt.Sprintf("%07o", tarSum(h[:])))
	return append(b, h[:]...)
}

// tarSum adds up the header's bytes with the checksum field taken as spaces.
func tarSum(h []byte) uint64 {
	var sum uint64
	for i, c := range h {
		if i >= tarSumOff && i < tarSumOff+8 {
			c = ' '
		}
		sum += uint64(c)
	}
	return sum
}

// parseTarHeader checks a header of rafs.TarHeaderSize bytes and returns the size it gives to the part called name.
func parseTarHeader(h []byte, name string) (uint64, error) {
	got := string(bytes.TrimRight(h[:100], "\x00"))
	if string(h[tarMagicOff:tarMagicOff+5]) != "ustar" {
		return 0, fmt.Errorf("no tar header where that of %q should be: %w", name, ErrFormat)
	}
	if got != name {
		return 0, fmt.Errorf("the tar header is that of %q, want %q: %w", got, name, ErrFormat)
	}
	sum, err := parseOctal(h[tarSumOff : tarSumOff+8])
	if err != nil || sum != tarSum(h) {
		return 0, fmt.Errorf("the checksum of the tar header of %q does not hold: %w", name, ErrFormat)
	}
	if h[tarSizeOff] == 0x80 && binary.BigEndian.Uint32(h[tarSizeOff:]) == 0x80000000 {
		return binary.BigEndian.Uint64(h[tarSizeOff+4:]), nil
	}
	size, err := parseOctal(h[tarSizeOff : tarSizeOff+12])
	if err != nil {
		return 0, fmt.Errorf("the size in the tar header of %q is no number: %w", name, ErrFormat)
	}
	return size, nil
}

func parseOctal(b []byte) (uint64, error) {
	return strconv.ParseUint(string(bytes.Trim(b, " \x00")), 8, 63)
}
