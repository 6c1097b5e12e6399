package rafs

import (
	"errors"
	"fmt"
)

// Feature bits of a blob, as in FORMATS.md 1.5 (RafsV6Blob.features; the CCT header uses the same).
const (
	FeatureAligned              uint32 = 1 << 0 // uncompressed offsets are multiples of 4096
	FeatureInlinedFsMeta        uint32 = 1 << 1 // the blob file holds a bootstrap too
	FeatureChunkInfoV2          uint32 = 1 << 2
	FeatureZran                 uint32 = 1 << 3
	FeatureSeparate             uint32 = 1 << 4 // chunk information lies in another blob
	FeatureInlinedChunkDigest   uint32 = 1 << 5
	FeatureTarfs                uint32 = 1 << 6
	FeatureBatch                uint32 = 1 << 7
	FeatureEncrypted            uint32 = 1 << 8
	FeatureChunkDictGenerated   uint32 = 1 << 9  // made from a chunk dictionary; reading does not differ
	FeatureSeparatedForPrefetch uint32 = 1 << 10 // holds only files to prefetch; reading does not differ
	FeatureExternal             uint32 = 1 << 11
	FeatureHasTarHeader         uint32 = 1 << 28 // a tar header follows the chunk data
	FeatureHasTOC               uint32 = 1 << 29
	FeatureCapTarTOC            uint32 = 1 << 30 // the two bits above can be trusted
	featureReserved             uint32 = 1 << 31

	featuresIncompatible uint32 = 0xffff // an unknown bit in here makes the blob unreadable
)

// PlaceholderID is the blob id in a bootstrap inlined in the blob itself, which cannot hold its own digest.
const PlaceholderID = "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"

// TarHeaderSize is the length in bytes of the tar header after the chunk data of a blob with [FeatureHasTarHeader].
const TarHeaderSize = 512

// ErrUnsupported is wrapped by errors about features of an image that this release cannot read.
var ErrUnsupported = errors.New("not supported by this release")

// featureNames gives every known incompatible bit its name and whether such blobs can be read.
var featureNames = [...]struct {
	bit      uint32
	name     string
	readable bool
}{
	{FeatureAligned, "ALIGNED", true},
	{FeatureInlinedFsMeta, "INLINED_FS_META", true},
	{FeatureChunkInfoV2, "CHUNK_INFO_V2", true},
	{FeatureZran, "ZRAN", false},
	{FeatureSeparate, "SEPARATE", false},
	{FeatureInlinedChunkDigest, "INLINED_CHUNK_DIGEST", true},
	{FeatureTarfs, "TARFS", false},
	{FeatureBatch, "BATCH", false},
	{FeatureEncrypted, "ENCRYPTED", false},
	{FeatureChunkDictGenerated, "IS_CHUNKDICT_GENERATED", true},
	{FeatureSeparatedForPrefetch, "IS_SEPARATED_WITH_PREFETCH_FILES", true},
	{FeatureExternal, "EXTERNAL", false},
}

// CheckFeatures returns an error that wraps [ErrUnsupported] and names the feature, unless blobs with the features f can
// be read.
func CheckFeatures(f uint32) error {
	var known uint32
	for _, n := range featureNames {
		known |= n.bit
		if f&n.bit != 0 && !n.readable {
			return fmt.Errorf("blob feature %s (%#x): %w", n.name, n.bit, ErrUnsupported)
		}
	}
	if u := f & (featuresIncompatible&^known | featureReserved); u != 0 {
		return fmt.Errorf("unknown blob feature bits %#x: %w", u, ErrUnsupported)
	}
	return nil
}

// A BlobInfo describes one blob of an image: an entry of the bootstrap's blob table (RafsV6Blob, FORMATS.md 1.5) and,
// in part, of its device table.
type BlobInfo struct {
	ID         string // at most 64 bytes of lower-case hex; the device slot's tag, hence the cache object's name
	ChunkSize  uint32 // bytes
	ChunkCount uint32
	Codec      Codec
	Digest     DigestAlgo
	Features   uint32 // Feature* bits
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

// DataSize is the length in bytes of the blob's chunk data, which starts at offset 0 (FORMATS.md 1.5, "Size of the
// chunk-data region"). It does not check the result against the real file.
func (b *BlobInfo) DataSize() (uint64, error) {
	if b.Features&FeatureSeparate != 0 || b.Features&FeatureCapTarTOC == 0 {
		return b.StoredSize, nil
	}
	size := b.CIOffset
	if b.Features&FeatureHasTarHeader != 0 {
		if size < TarHeaderSize {
			return 0, fmt.Errorf("chunk information at offset %d leaves no room for the tar header before it", b.CIOffset)
		}
		size -= TarHeaderSize
	}
	return size, nil
}
