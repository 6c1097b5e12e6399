package bootstrap

import (
	"encoding/binary"

	"holdfast/rafs"
	"holdfast/rafs/tree"
)

// On-disk values of EROFS (fs/erofs/erofs_fs.h, Linux 5.16 - 7.3) and of RAFS v6 (Nydus, rafs/src/metadata/layout/v6.rs).
const (
	blockBits = 12
	blockSize = rafs.BlockSize

	superOffset    = 1024       // EROFS_SUPER_OFFSET
	superMagic     = 0xE0F5E1E2 // EROFS_SUPER_MAGIC_V1
	rafsV5Magic    = 0x52414653 // RAFS_SUPER_MAGIC: "RAFS" as a little-endian number, at offset 0
	extSuperOffset = superOffset + superSize
	devtSlotOffset = 11 // device slots follow the extended superblock at 11 * deviceSlotSize = 1408

	compatRAFSv6        = 0x40000000 // EROFS_FEATURE_COMPAT_RAFS_V6
	incompatChunkedFile = 0x4        // EROFS_FEATURE_INCOMPAT_CHUNKED_FILE
	incompatDeviceTable = 0x8        // EROFS_FEATURE_INCOMPAT_DEVICE_TABLE
	incompatRAFSv6      = incompatChunkedFile | incompatDeviceTable

	rootNid = blockSize / slotSize // meta_blkaddr is the block before the root inode's
)

// Sizes of on-disk structures, in bytes.
const (
	superSize         = 128 // struct erofs_super_block
	extSuperSize      = 256 // RafsV6SuperBlockExt
	deviceSlotSize    = 128 // struct erofs_deviceslot
	blobEntrySize     = 256 // RafsV6Blob
	slotSize          = 32  // an inode starts at a multiple of this; struct erofs_inode_compact
	inodeExtendedSize = 64  // struct erofs_inode_extended
	direntSize        = 12  // struct erofs_dirent
	chunkIndexSize    = 8   // struct erofs_inode_chunk_index
	xattrHeaderSize   = 12  // struct erofs_xattr_ibody_header
	xattrEntrySize    = 4   // struct erofs_xattr_entry
	chunkEntrySize    = 80  // RafsV5ChunkInfo
)

// Bits of erofs_inode_*.i_format and of erofs_inode_chunk_info.format.
const (
	formatExtended   = 0x1
	formatLayoutBit  = 1
	formatLayoutMask = 0x7
	formatAll        = 0xf // EROFS_I_ALL up to 6.15; later bits (48-bit, omitted dots) mean another layout

	layoutFlatPlain         = 0
	layoutCompressedFull    = 1
	layoutFlatInline        = 2
	layoutCompressedCompact = 3
	layoutChunkBased        = 4

	chunkBlkBitsMask = 0x1f
	chunkIndexes     = 0x20 // EROFS_CHUNK_FORMAT_INDEXES

	nullBlock = 0xffffffff // EROFS_NULL_ADDR: a hole
)

// Flags of the extended superblock (RafsSuperFlags).
const (
	flagCompressionNone  = 0x1
	flagCompressionLZ4   = 0x2
	flagHashBlake3       = 0x4
	flagHashSHA256       = 0x8
	flagExplicitUIDGID   = 0x10
	flagHasXattr         = 0x20
	flagCompressionGzip  = 0x40
	flagCompressionZstd  = 0x80
	flagInlinedDigest    = 0x100
	flagTarfs            = 0x200
	flagEncryptionAES128 = 0x02000000
	flagsCompression     = flagCompressionNone | flagCompressionLZ4 | flagCompressionGzip | flagCompressionZstd
	flagsHash            = flagHashBlake3 | flagHashSHA256
	featureInlinedDigest = 0x20 // RafsV6Blob.features: digests are in the blob
	featureTarfs         = 0x40
	featureEncrypted     = 0x100
	featureInternal      = 0x80000000
	featuresUnderstood   = 0xfff // of the bits 0xffff that a reader must understand
	featuresMustKnow     = 0xffff
)

// superBlock is struct erofs_super_block.
type superBlock struct {
	Magic           uint32
	Checksum        uint32
	FeatureCompat   uint32
	BlkSzBits       uint8
	ExtSlots        uint8
	RootNid         uint16
	Inos            uint64
	BuildTime       uint64
	BuildTimeNsec   uint32
	Blocks          uint32
	MetaBlkAddr     uint32
	XattrBlkAddr    uint32
	UUID            [16]byte
	VolumeName      [16]byte
	FeatureIncompat uint32
	ComprAlgs       uint16
	ExtraDevices    uint16
	DevtSlotOff     uint16
	DirBlkBits      uint8
	Reserved        [37]byte
}

// extSuperBlock is RafsV6SuperBlockExt. Offsets are in bytes from the start of the file, sizes in bytes.
type extSuperBlock struct {
	Flags               uint64
	BlobTableOffset     uint64
	BlobTableSize       uint32
	ChunkSize           uint32
	ChunkTableOffset    uint64
	ChunkTableSize      uint64
	PrefetchTableOffset uint64
	PrefetchTableSize   uint32
	Padding             uint32
	Reserved            [200]byte
}

// deviceSlot is struct erofs_deviceslot.
type deviceSlot struct {
	Tag           [64]byte
	Blocks        uint32
	MappedBlkAddr uint32
	Reserved      [56]byte
}

// blobEntry is RafsV6Blob.
type blobEntry struct {
	ID         [64]byte
	Index      uint32
	ChunkSize  uint32
	ChunkCount uint32
	Codec      uint32
	Digest     uint32
	Features   uint32
	StoredSize uint64
	Size       uint64
	TOCSize    uint32
	CICodec    uint32
	CIOffset   uint64
	CIStored   uint64
	CISize     uint64
	TOCDigest  [32]byte
	MetaDigest [32]byte
	MetaSize   uint64
	CipherIV   [8]byte
	CipherAlgo uint32
	Reserved   [36]byte
}

// inode is what compact and extended on-disk inodes say.
type inode struct {
	format     uint16
	xattrCount uint16
	mode       uint16
	size       uint64
	union      uint32 // first block, device number or chunk format
	ino        uint32
	uid, gid   uint32
	mtime      int64
	mtimeNsec  uint32
	nlink      uint32
}

// put writes the extended form of i to b.
func (i *inode) put(b []byte) {
	le := binary.LittleEndian
	le.PutUint16(b[0:], i.format|formatExtended)
	le.PutUint16(b[2:], i.xattrCount)
	le.PutUint16(b[4:], i.mode)
	le.PutUint64(b[8:], i.size)
	le.PutUint32(b[16:], i.union)
	le.PutUint32(b[20:], i.ino)
	le.PutUint32(b[24:], i.uid)
	le.PutUint32(b[28:], i.gid)
	le.PutUint64(b[32:], uint64(i.mtime))
	le.PutUint32(b[40:], i.mtimeNsec)
	le.PutUint32(b[44:], i.nlink)
}

// getExtended and getCompact read the two forms; b holds inodeExtendedSize or slotSize bytes.
func getExtended(b []byte) inode {
	le := binary.LittleEndian
	return inode{
		format: le.Uint16(b[0:]), xattrCount: le.Uint16(b[2:]), mode: le.Uint16(b[4:]), size: le.Uint64(b[8:]),
		union: le.Uint32(b[16:]), ino: le.Uint32(b[20:]), uid: le.Uint32(b[24:]), gid: le.Uint32(b[28:]),
		mtime: int64(le.Uint64(b[32:])), mtimeNsec: le.Uint32(b[40:]), nlink: le.Uint32(b[44:]),
	}
}

func getCompact(b []byte) inode {
	le := binary.LittleEndian
	return inode{
		format: le.Uint16(b[0:]), xattrCount: le.Uint16(b[2:]), mode: le.Uint16(b[4:]), nlink: uint32(le.Uint16(b[6:])),
		size: uint64(le.Uint32(b[8:])), union: le.Uint32(b[16:]), ino: le.Uint32(b[20:]),
		uid: uint32(le.Uint16(b[24:])), gid: uint32(le.Uint16(b[26:])),
	}
}

// The device number of a node is packed as the kernel's new_encode_dev does (include/linux/kdev_t.h).
const (
	maxMajor = 1<<12 - 1
	maxMinor = 1<<20 - 1
)

func encodeDev(major, minor uint32) uint32 {
	return minor&0xff | major<<8 | (minor&^0xff)<<12
}

func decodeDev(d uint32) (major, minor uint32) {
	return d >> 8 & 0xfff, d&0xff | d>>12&0xfff00
}

// fileType is the type of a directory entry (fs_types.h, FT_*) for a mode; 0 for no known type.
func fileType(mode uint32) uint8 {
	switch mode & tree.ModeType {
	case tree.ModeFile:
		return 1
	case tree.ModeDir:
		return 2
	case tree.ModeChar:
		return 3
	case tree.ModeBlock:
		return 4
	case tree.ModeFifo:
		return 5
	case tree.ModeSocket:
		return 6
	case tree.ModeLink:
		return 7
	}
	return 0
}

func alignTo(n, a uint64) uint64 { return (n + a - 1) &^ (a - 1) }
