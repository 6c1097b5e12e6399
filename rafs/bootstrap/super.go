package bootstrap

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
	"strings"

	"holdfast/rafs"
)

// A header is everything in a bootstrap that is not inodes.
type header struct {
	file
	sb       superBlock
	ext      extSuperBlock
	codec    rafs.Codec
	digest   rafs.DigestAlgo
	blobs    []rafs.BlobInfo
	prefetch []uint32 // nids
}

// openHeader reads and checks the superblocks, the blob and device tables and the prefetch table.
func openHeader(r io.ReaderAt, size int64, name string) (*header, error) {
	h := &header{file: file{r: r, size: uint64(size), name: name}}
	if size < blockSize || size > MaxSize {
		return nil, fmt.Errorf("bootstrap %s: %w: size of %d bytes, want %d to %d", name, ErrDamaged, size, blockSize, uint64(MaxSize))
	}
	for _, step := range []func() error{h.readSuper, h.readExtSuper, h.readBlobs, h.readPrefetch} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// incompatNames are the incompatible features of EROFS that RAFS v6 does not use (EROFS_FEATURE_INCOMPAT_*, up to 7.3).
var incompatNames = []struct {
	bit  uint32
	name string
}{
	{0x1, "compressed EROFS (ZERO_PADDING)"},
	{0x2, "compressed EROFS (COMPR_CFGS or BIG_PCLUSTER)"},
	{0x10, "compressed EROFS (ZTAILPACKING)"},
	{0x20, "compressed EROFS (FRAGMENTS or DEDUPE)"},
	{0x40, "long xattr name prefixes (XATTR_PREFIXES)"},
	{0x80, "48-bit block addresses (48BIT)"},
	{0x100, "metadata in an inode (METABOX)"},
}

// unknownBits names the bits in words: the ones with names, and the rest as a number.
func unknownBits(b uint32) string {
	var names []string
	for _, f := range incompatNames {
		if b&f.bit != 0 {
			names = append(names, f.name)
			b &^= f.bit
		}
	}
	if b != 0 {
		names = append(names, fmt.Sprintf("unknown incompatible features %#x", b))
	}
	return strings.Join(names, ", ")
}

func (h *header) readSuper() error {
	first, err := h.at(0, 4, "magic number")
	if err != nil {
		return err
	}
	if err := h.decode(superOffset, &h.sb, "superblock"); err != nil {
		return err
	}
	sb := &h.sb
	if sb.Magic != superMagic {
		if binary.LittleEndian.Uint32(first) == rafsV5Magic {
			return h.unsupported(0, "RAFS v5: convert the image to RAFS v6")
		}
		return h.damaged(superOffset, "magic number %#x is not that of EROFS (%#x)", sb.Magic, uint32(superMagic))
	}
	if sb.BlkSzBits == 9 {
		return h.unsupported(superOffset+12, "512 byte blocks (tarfs)")
	}
	if sb.BlkSzBits != blockBits {
		return h.unsupported(superOffset+12, "block size of 2^%d bytes, want 2^%d", sb.BlkSzBits, blockBits)
	}
	if extra := sb.FeatureIncompat &^ incompatRAFSv6; extra != 0 {
		return h.unsupported(superOffset+80, "%s", unknownBits(extra))
	}
	switch {
	case sb.FeatureCompat&compatRAFSv6 == 0 || sb.FeatureIncompat != incompatRAFSv6:
		return h.unsupported(superOffset+8, "EROFS that is not RAFS v6 (features %#x, incompatible features %#x)", sb.FeatureCompat, sb.FeatureIncompat)
	case h.size%blockSize != 0:
		return h.damaged(h.size, "the file's size is not a multiple of %d: is it complete?", blockSize)
	case sb.ExtSlots != 0:
		return h.unsupported(superOffset+13, "superblock with %d extension slots", sb.ExtSlots)
	case sb.XattrBlkAddr != 0:
		return h.unsupported(superOffset+44, "shared xattrs")
	case sb.DirBlkBits != 0:
		return h.unsupported(superOffset+90, "directory blocks of another size")
	case sb.DevtSlotOff != devtSlotOffset:
		return h.damaged(superOffset+88, "device table in slot %d, want %d", sb.DevtSlotOff, devtSlotOffset)
	case sb.BuildTimeNsec >= 1e9:
		return h.damaged(superOffset+32, "build time with %d nanoseconds", sb.BuildTimeNsec)
	case uint64(sb.MetaBlkAddr) >= h.size/blockSize:
		return h.damaged(superOffset+40, "inodes start in block %d of %d", sb.MetaBlkAddr, h.size/blockSize)
	}
	return nil
}

func (h *header) readExtSuper() error {
	if err := h.decode(extSuperOffset, &h.ext, "extended superblock"); err != nil {
		return err
	}
	e := &h.ext
	switch {
	case e.Flags&flagTarfs != 0:
		return h.unsupported(extSuperOffset, "tarfs")
	case e.Flags&flagEncryptionAES128 != 0:
		return h.unsupported(extSuperOffset, "encryption (AES-128-XTS)")
	case bits.OnesCount64(e.Flags&flagsCompression) != 1 || bits.OnesCount64(e.Flags&flagsHash) != 1:
		return h.damaged(extSuperOffset, "flags %#x do not name one compression and one digest", e.Flags)
	}
	for c, f := range codecFlags {
		if e.Flags&f != 0 {
			h.codec = c
		}
	}
	for d, f := range digestFlags {
		if e.Flags&f != 0 {
			h.digest = d
		}
	}
	if err := checkChunkSize(e.ChunkSize); err != nil {
		return h.damaged(extSuperOffset+20, "%w", err)
	}
	return nil
}

// tableOff checks where a table starts: after the device slots, at a multiple of align.
func (h *header) tableOff(field, off, align uint64, what string) error {
	if end := (devtSlotOffset + uint64(h.sb.ExtraDevices)) * deviceSlotSize; off < max(end, blockSize) || off%align != 0 {
		return h.damaged(field, "%s at %d, want a multiple of %d after the device table", what, off, align)
	}
	return nil
}

func (h *header) readBlobs() error {
	size := uint64(h.ext.BlobTableSize)
	count := size / blobEntrySize
	if size%blobEntrySize != 0 || count > rafs.MaxBlobs || count != uint64(h.sb.ExtraDevices) {
		return h.damaged(extSuperOffset+16, "blob table of %d bytes for %d devices: want %d bytes for each of at most %d", size, h.sb.ExtraDevices, blobEntrySize, rafs.MaxBlobs)
	}
	if count == 0 {
		return nil
	}
	if err := h.tableOff(extSuperOffset+8, h.ext.BlobTableOffset, blockSize, "blob table"); err != nil {
		return err
	}
	for i := range count {
		off := h.ext.BlobTableOffset + i*blobEntrySize
		var e blobEntry
		if err := h.decode(off, &e, "blob table entry"); err != nil {
			return err
		}
		b, err := h.parseBlob(off, uint32(i), &e)
		if err != nil {
			return err
		}
		var slot deviceSlot
		slotOff := (devtSlotOffset + i) * deviceSlotSize
		if err := h.decode(slotOff, &slot, "device slot"); err != nil {
			return err
		}
		if id := text(slot.Tag[:]); id != b.ID {
			return h.damaged(slotOff, "device %d is blob %q, the blob table says %q", i+1, id, b.ID)
		}
		h.blobs = append(h.blobs, b)
	}
	if err := checkBlobs(h.blobs, h.ext.ChunkSize); err != nil {
		return h.damaged(h.ext.BlobTableOffset, "%w", err)
	}
	return nil
}

// text is the string in a NUL-padded field.
func text(b []byte) string {
	s, _, _ := strings.Cut(string(b), "\x00")
	return s
}

func (h *header) parseBlob(off uint64, i uint32, e *blobEntry) (rafs.BlobInfo, error) {
	if e.Codec > uint32(rafs.CodecZstd) || e.CICodec > uint32(rafs.CodecZstd) || e.Digest > uint32(rafs.SHA256) {
		return rafs.BlobInfo{}, h.unsupported(off, "blob %d with compression %d (of its chunk information: %d), digest %d", i, e.Codec, e.CICodec, e.Digest)
	}
	if e.CipherAlgo != 0 || e.Features&featureEncrypted != 0 {
		return rafs.BlobInfo{}, h.unsupported(off, "blob %d: encryption", i)
	}
	if bad := e.Features & (featuresMustKnow&^featuresUnderstood | featureInternal); bad != 0 {
		return rafs.BlobInfo{}, h.unsupported(off+84, "blob %d: unknown features %#x", i, bad)
	}
	if e.Features&featureTarfs != 0 {
		return rafs.BlobInfo{}, h.unsupported(off+84, "blob %d: tarfs", i)
	}
	if e.Index != i {
		return rafs.BlobInfo{}, h.damaged(off+64, "blob %d has index %d", i, e.Index)
	}
	b := rafs.BlobInfo{
		ID: text(e.ID[:]), ChunkSize: e.ChunkSize, ChunkCount: e.ChunkCount, Codec: rafs.Codec(e.Codec), Digest: rafs.DigestAlgo(e.Digest),
		Features: e.Features, StoredSize: e.StoredSize, Size: e.Size, CICodec: rafs.Codec(e.CICodec), CIOffset: e.CIOffset,
		CIStored: e.CIStored, CISize: e.CISize, TOCSize: e.TOCSize, TOCDigest: e.TOCDigest, MetaSize: e.MetaSize, MetaDigest: e.MetaDigest,
	}
	if !bytes.Equal(bytes.TrimRight(e.ID[:], "\x00"), []byte(b.ID)) {
		return b, h.damaged(off, "blob %d has an id with a NUL in it", i)
	}
	return b, nil
}

func (h *header) readPrefetch() error {
	off, size := h.ext.PrefetchTableOffset, uint64(h.ext.PrefetchTableSize)
	if off == 0 || size == 0 { // older builders leave a size behind where there is no table
		return nil
	}
	if size%4 != 0 {
		return h.damaged(extSuperOffset+48, "prefetch table of %d bytes", size)
	}
	if err := h.tableOff(extSuperOffset+40, off, 1, "prefetch table"); err != nil {
		return err
	}
	b, err := h.at(off, size, "prefetch table")
	if err != nil {
		return err
	}
	h.prefetch = make([]uint32, size/4)
	for i := range h.prefetch {
		h.prefetch[i] = binary.LittleEndian.Uint32(b[4*i:])
	}
	return nil
}

// ownDigests reports whether every blob holds its chunks' digests.
func (h *header) ownDigests() bool {
	for i := range h.blobs {
		if h.blobs[i].Features&featureInlinedDigest == 0 {
			return false
		}
	}
	return true
}

// readChunkTable reads the chunk table, nil where there is none.
func (h *header) readChunkTable() ([]ChunkEntry, error) {
	off, size := h.ext.ChunkTableOffset, h.ext.ChunkTableSize
	if size == 0 {
		return nil, nil
	}
	if size%chunkEntrySize != 0 {
		return nil, h.damaged(extSuperOffset+32, "chunk table of %d bytes, want %d for each entry", size, chunkEntrySize)
	}
	if err := h.tableOff(extSuperOffset+24, off, blockSize, "chunk table"); err != nil {
		return nil, err
	}
	b, err := h.at(off, size, "chunk table")
	if err != nil {
		return nil, err
	}
	out := make([]ChunkEntry, size/chunkEntrySize)
	for i := range out {
		e, err := h.parseChunkEntry(b[i*chunkEntrySize:])
		if err != nil {
			return nil, h.damaged(off+uint64(i)*chunkEntrySize, "chunk table entry %d: %w", i, err)
		}
		out[i] = e
	}
	return out, nil
}

const chunkFlagsKnown = 0x1f // COMPRESSED, HOLE, ENCRYPTED, BATCH, HAS_CRC32

func (h *header) parseChunkEntry(b []byte) (ChunkEntry, error) {
	le := binary.LittleEndian
	e := ChunkEntry{
		Digest: rafs.Digest(b[:32]), Flags: le.Uint32(b[36:]), Stored: le.Uint32(b[40:]), Size: le.Uint32(b[44:]),
		BlobOffset: le.Uint64(b[48:]), Offset: le.Uint64(b[56:]), FileOffset: le.Uint64(b[64:]), Index: le.Uint32(b[72:]), CRC32: le.Uint32(b[76:]),
	}
	blob := le.Uint32(b[32:])
	if uint64(blob) >= uint64(len(h.blobs)) {
		return e, fmt.Errorf("in blob %d of %d", blob, len(h.blobs))
	}
	e.Blob = 1 + int(blob)
	info := &h.blobs[blob]
	switch {
	case e.Flags&^chunkFlagsKnown != 0:
		return e, fmt.Errorf("unknown flags %#x", e.Flags&^chunkFlagsKnown)
	case e.Size == 0 || e.Size > h.ext.ChunkSize:
		return e, fmt.Errorf("%d bytes long, want 1 to %d", e.Size, h.ext.ChunkSize)
	case e.Index >= info.ChunkCount:
		return e, fmt.Errorf("chunk %d of a blob with %d", e.Index, info.ChunkCount)
	case e.Offset > info.Size || uint64(e.Size) > info.Size-e.Offset:
		return e, fmt.Errorf("%d bytes at %d of blob %.64s, which has %d", e.Size, e.Offset, info.ID, info.Size)
	case e.BlobOffset > info.StoredSize || uint64(e.Stored) > info.StoredSize-e.BlobOffset:
		return e, fmt.Errorf("%d bytes stored at %d of blob %.64s, which has %d", e.Stored, e.BlobOffset, info.ID, info.StoredSize)
	}
	return e, nil
}
