package bootstrap

import (
	"errors"

	"holdfast/rafs"
	"holdfast/rafs/tree"
)

var (
	// ErrDamaged is wrapped by errors about bytes that no builder writes.
	ErrDamaged = errors.New("damaged bootstrap")
	// ErrUnsupported is wrapped by errors about features of EROFS or RAFS that holdfast does not read; the message names
	// the feature.
	ErrUnsupported = errors.New("not supported")
	// ErrInvalid is wrapped by errors of [Write] about trees that RAFS v6 cannot express.
	ErrInvalid = errors.New("cannot be written to a RAFS v6 image")
)

// Limits that keep readers in bounds. They are the same for [Write] and [Read].
const (
	// MaxSize is the largest bootstrap, in bytes.
	MaxSize = 4 << 30
	// MaxPath is the longest path of an entry, in bytes: four times what system calls take (PATH_MAX).
	MaxPath = 16 << 10
	// MaxTarget is the longest target of a symbolic link, in bytes (PATH_MAX less the NUL).
	MaxTarget = 4095
)

// maxPrefetchPaths is how long the different paths of the prefetch table may be together for a bootstrap of size bytes: with one
// entry for each of many files in a deep directory they could be hundreds of times as long as the file.
func maxPrefetchPaths(size uint64) uint64 { return 1<<20 + 4*size }

// An Image is what a bootstrap says, in both directions.
type Image struct {
	Root      *tree.Node
	Blobs     []rafs.BlobInfo // blob i is ChunkRef.Blob i+1, device i+1 of the mount and entry i of the blob table
	ChunkSize uint32          // bytes, a power of two
	Codec     rafs.Codec
	Digest    rafs.DigestAlgo
	Prefetch  []string     // absolute paths, in priority order
	Chunks    []ChunkEntry // the chunk table, where the bootstrap has one; [Write] writes none
}

// A ChunkEntry is an entry of the chunk table (RafsV5ChunkInfo), in which builders without digests in the blob keep them.
type ChunkEntry struct {
	Digest     rafs.Digest // of the uncompressed bytes
	Blob       int         // 1 + index in the list of blobs, as in tree.ChunkRef
	Flags      uint32      // COMPRESSED 1, HOLE 2, ENCRYPTED 4, BATCH 8, HAS_CRC32 0x10
	Stored     uint32      // bytes in the blob
	Size       uint32      // uncompressed bytes
	BlobOffset uint64      // in the blob file
	Offset     uint64      // in the blob's object
	FileOffset uint64      // in the first file that has the chunk
	Index      uint32      // row in the blob's own chunk array
	CRC32      uint32
}

// A Summary is what a mount needs to know of a bootstrap.
type Summary struct {
	Blobs     []rafs.BlobInfo
	ChunkSize uint32
	Codec     rafs.Codec
	Digest    rafs.DigestAlgo
	Inodes    uint64       // as the superblock says; not checked
	Chunks    []ChunkEntry // the chunk table, read only when a blob holds no digests of its own
	Prefetch  []Extent     // data of the prefetch table's files, and of all files below its directories, in its order
}

// An Extent is a part of a blob's object. Off and Len are multiples of rafs.BlockSize.
type Extent struct {
	Blob     int // 1 + index in the list of blobs
	Off, Len uint64
}
