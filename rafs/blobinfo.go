package rafs

// A BlobInfo describes one blob of an image: an entry of the bootstrap's blob table (RafsV6Blob, FORMATS.md 1.5) and,
// in part, of its device table.
type BlobInfo struct {
	ID         string // at most 64 bytes of lower-case hex; the device slot's tag, hence the cache object's name
	ChunkSize  uint32 // bytes
	ChunkCount uint32
	Codec      Codec
	Digest     DigestAlgo
	Features   uint32
	StoredSize uint64 // compressed_size, bytes
	Size       uint64 // uncompressed_size, bytes: the cache object's size before rounding up to BlockSize

	// Where the chunk information (CI) array lies in the blob file, and how it is stored.
	CICodec  Codec
	CIOffset uint64
	CIStored uint64
	CISize   uint64

	TOCSize    uint32
	TOCDigest  Digest
	MetaSize   uint64
	MetaDigest Digest
}
