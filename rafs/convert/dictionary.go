package convert

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs"
	"holdfast/rafs/blob"
	"holdfast/rafs/bootstrap"
	"holdfast/rafs/oci"
	"holdfast/rafs/source"
	"holdfast/rafs/tree"
)

// A DictionaryBlob is a blob of another RAFS image, whose chunks are referred to where the converted image has them too.
type DictionaryBlob struct {
	Image  string         // that image's reference, for errors
	Info   rafs.BlobInfo  // as that image has it
	Table  *rafs.Table    // of its chunks, checked
	Source source.Source  // of its file; it stays the caller's
	Repo   name.Reference // of that image, for a registry to take the blob from; nil: it is in none
}

// A DictionaryUse says what an image has in the dictionary's blobs and not in its own.
type DictionaryUse struct {
	Blobs  int    // referred to
	Chunks uint64 // different ones
	Bytes  uint64 // of them, uncompressed
	Stored uint64 // of them, as the dictionary's blobs store them
}

// makeDictionary checks the blobs of Options.Dictionary and indexes their chunks; a blob that is there twice counts once.
func (c *conversion) makeDictionary() error {
	if len(c.o.Dictionary) == 0 {
		return nil
	}
	c.dict = blob.NewDictionary()
	seen := make(map[string]bool)
	for _, b := range c.o.Dictionary {
		if err := c.checkDictionaryBlob(b); err != nil {
			return fmt.Errorf("chunk dictionary %s: blob %s: %w", b.Image, b.Info.ID, err)
		}
		if !seen[b.Info.ID] {
			seen[b.Info.ID] = true
			c.dict.Add(b.Table)
			c.dictBlobs = append(c.dictBlobs, b)
		}
	}
	return nil
}

// checkDictionaryBlob refuses a blob that cannot be a blob of the new image: of which no chunk could ever match, whose digests
// the new image's readers would not find, or which no manifest could name.
func (c *conversion) checkDictionaryBlob(b DictionaryBlob) error {
	switch {
	case b.Info.ChunkSize != c.o.ChunkSize:
		return fmt.Errorf("its chunks have %d bytes, those of this conversion %d, and none can be equal: convert with --chunk-size=%d, or leave the image out", b.Info.ChunkSize, c.o.ChunkSize, b.Info.ChunkSize)
	case b.Info.Digest != c.o.Digest || b.Table.Algo() != c.o.Digest:
		return fmt.Errorf("its chunks have digests of %s, those of this conversion of %s, and none can be equal: convert with --digest=%s, or leave the image out", b.Info.Digest, c.o.Digest, b.Info.Digest)
	case b.Info.ChunkCount > 0 && b.Info.Features&rafs.FeatureInlinedChunkDigest == 0:
		return errors.New("it does not hold the digests of its chunks, its image's bootstrap does: convert that image anew, or leave it out")
	}
	if err := digest.NewDigestFromEncoded(digest.SHA256, b.Info.ID).Validate(); err != nil {
		return fmt.Errorf("its id is no sha256, by which a manifest would name it: convert that image anew, or leave it out: %w", err)
	}
	return nil
}

// dictionaryUse counts the chunks of the dictionary that a merged tree refers to. own is how many blobs come before its.
func (c *conversion) dictionaryUse(root *tree.Node, own int) (use DictionaryUse, err error) {
	if len(c.dictBlobs) == 0 {
		return use, nil
	}
	seen := make(map[tree.ChunkRef]bool)
	blobs := make(map[int]bool)
	err = eachFile(root, func(in *tree.Inode) {
		for _, ref := range in.Chunks {
			if ref.Blob <= own || seen[ref] {
				continue
			}
			seen[ref] = true
			blobs[ref.Blob] = true
			t := c.dictBlobs[ref.Blob-own-1].Table
			first, _ := t.Range(ref.Offset, 1)
			row := t.At(first)
			use.Chunks++
			use.Bytes += uint64(row.Size)
			use.Stored += uint64(row.Stored)
		}
	})
	use.Blobs = len(blobs)
	return use, err
}

// checkCount refuses more blobs than a bootstrap can list, and says what to do.
func checkCount(used, own int) error {
	if used > rafs.MaxBlobs && used > own {
		return fmt.Errorf("%w: %d blobs, %d of them of the chunk dictionary, at most %d are possible: name fewer images as the dictionary", bootstrap.ErrInvalid, used, used-own, rafs.MaxBlobs)
	}
	return nil
}

func (b DictionaryBlob) descriptor() ocispec.Descriptor {
	return describeBlob(b.Info.ID, b.Source.Size())
}

// open returns the blob's file from its start, which ends with an error unless it is what its id says.
func (b DictionaryBlob) open(ctx context.Context) io.ReadCloser {
	raw := &resumer{ctx: ctx, src: b.Source}
	return struct {
		io.Reader
		io.Closer
	}{&verifier{r: raw, sum: sha256.New(), want: b.Info.ID}, raw}
}

// failed says which blob could not be copied.
func (b DictionaryBlob) failed(err error) error {
	return fmt.Errorf("copy blob %s of the chunk dictionary %s: %w", b.Info.ID, b.Image, err)
}

// A sharedLayer is a dictionary's blob as the registry library takes it.
type sharedLayer struct {
	ctx    context.Context // of the one upload
	b      DictionaryBlob
	pushed *atomic.Int64
}

func (l *sharedLayer) Digest() (v1.Hash, error) {
	return v1.NewHash(l.b.descriptor().Digest.String())
}
func (l *sharedLayer) DiffID() (v1.Hash, error)             { return l.Digest() }
func (l *sharedLayer) Size() (int64, error)                 { return l.b.Source.Size(), nil }
func (l *sharedLayer) MediaType() (types.MediaType, error)  { return oci.MediaTypeBlob, nil }
func (l *sharedLayer) Uncompressed() (io.ReadCloser, error) { return l.Compressed() }

func (l *sharedLayer) Compressed() (io.ReadCloser, error) {
	r := l.b.open(l.ctx)
	return struct {
		io.Reader
		io.Closer
	}{meter{r, l.pushed}, r}, nil
}
