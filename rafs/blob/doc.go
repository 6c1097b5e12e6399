// Package blob reads and writes the data blobs of RAFS v6 images: chunk data, the chunk information (CI) array with its
// header, the inlined digest array, and the table of contents (TOC) at the end (FORMATS.md 1.7 to 1.9).
//
// A [Writer] makes a blob in one pass, compressing on several cores; a [Meta] is what a reader must know of a blob
// before its chunks can be fetched, and becomes a [rafs.Table]; a [Decoder] turns one stored chunk into its bytes.
//
// A native blob is laid out so, every tar header after the data it describes and nothing padded:
//
//	chunk data | tar header "image.blob" | CI array | CCT header | tar header "blob.meta" | digests | tar header
//	"blob.digest" | bootstrap | tar header "image.boot" | TOC entries | tar header "rafs.blob.toc"
//
// It never fetches chunks (the daemon does), never retries, and never looks into a bootstrap.
//
// Invariants:
//   - a blob's bytes depend on the chunks, their order and the options but Workers; not on timing or cores;
//   - Decode returns no error only if exactly the chunk's size was made and its digest holds (I1, I3);
//   - nothing is allocated for a number in a blob before it was checked against the blob's real size (I9).
//
// Dependencies: github.com/klauspost/compress for zstd, which the standard library lacks, and for a faster gzip reader;
// github.com/pierrec/lz4/v4 for raw LZ4 blocks. Both decode into the caller's memory with a bound on the output.
package blob
