package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"holdfast/rafs"
	"holdfast/rafs/blob"
	"holdfast/rafs/bootstrap"
	"holdfast/rafs/oci"
	"holdfast/rafs/source"
)

// openers is how many blobs' chunk information is fetched at once.
const openers = 8

// An Image is an opened image. Its fields must not be changed but for Bootstrap, and a blob's Table for one that says the same; sources may be read from any goroutine.
type Image struct {
	Ref       string  // with absolute paths
	Digest    string  // "sha256:<hex>" of the image's manifest, or of the bootstrap file of a rafs reference
	Bootstrap []byte  // a multiple of rafs.BlockSize long; whoever has it in a file may set it to nil
	Sum       string  // "sha256:<hex>" of the bootstrap; set by Save and Load
	Blobs     []*Blob // in the order of the bootstrap's devices: the kernel's device i+1 is blob i

	prefetch []bootstrap.Extent
	store    store
	unused   []string // layers of the manifest that are blobs, and that the bootstrap does not know
}

// A Blob is one blob of an image: where its bytes are, and what they must be.
type Blob struct {
	Info   rafs.BlobInfo
	Table  *rafs.Table
	Source source.Source // of the blob file, opened when it is first read

	meta *blob.Meta
}

// Open fetches all of an image but its chunks: manifest, bootstrap, and each blob's chunk information. Errors name the
// reference and what is wrong with what; those about content wrap [ErrFormat], [ErrNotRAFS] or an error of packages
// bootstrap or blob. All are permanent in the sense of source.IsPermanent but those that trying again may mend.
func Open(ctx context.Context, ref string, o Options) (*Image, error) {
	r, err := ParseReference(ref)
	if err != nil {
		return nil, err
	}
	img := &Image{Ref: r.String(), store: openStore(r, o)}
	if err := img.open(ctx, r); err != nil {
		img.Close()
		return nil, fmt.Errorf("open image %s: %w", r, err)
	}
	return img, nil
}

func (i *Image) open(ctx context.Context, r Reference) error {
	var sizes func(id string) (int64, error)
	var layers map[string]ocispec.Descriptor
	if s, ok := i.store.(*oci.Store); !ok {
		b, err := readFile(r.boot, maxBootstrap)
		if err != nil {
			return err
		}
		i.Bootstrap, i.Digest = b, sum(b)
		sizes = func(id string) (int64, error) { return fileSize(filepath.Join(r.blobs, id)) }
	} else {
		var err error
		if layers, err = i.openManifest(ctx, s); err != nil {
			return err
		}
		sizes = func(id string) (int64, error) {
			l, ok := layers[id]
			if !ok {
				return 0, bad("the bootstrap needs blob %s, which is no layer of the manifest %s", id, i.Digest)
			}
			return l.Size, nil
		}
	}
	s, err := i.readBootstrap()
	if err != nil {
		return err
	}
	seen := make(map[string]bool)
	for _, info := range s.Blobs {
		if seen[info.ID] {
			return bad("the bootstrap lists blob %s twice", info.ID)
		}
		seen[info.ID] = true
		if !idPattern.MatchString(info.ID) {
			return bad("the bootstrap names a blob %.80q, which is no hex id: if this is the bootstrap of a single layer, use the merged one of the image", info.ID)
		}
		size, err := sizes(info.ID)
		if err != nil {
			return err
		}
		i.Blobs = append(i.Blobs, &Blob{Info: info, Source: i.store.Blob(info.ID, size)})
	}
	maps.DeleteFunc(layers, func(id string, _ ocispec.Descriptor) bool { return seen[id] })
	i.unused = slices.Sorted(maps.Keys(layers))
	return i.readMeta(ctx, s)
}

// openManifest fetches manifest and bootstrap, and returns the layers that are blobs, by id.
func (i *Image) openManifest(ctx context.Context, s *oci.Store) (map[string]ocispec.Descriptor, error) {
	m, digest, err := fetchManifest(ctx, s)
	if err != nil {
		return nil, err
	}
	i.Digest = digest
	boot, layers, err := splitLayers(i.Ref, m)
	if err != nil {
		return nil, err
	}
	i.Bootstrap, err = fetchBootstrap(ctx, s, boot)
	return layers, err
}

// readBootstrap reads what a mount needs to know of the bootstrap.
func (i *Image) readBootstrap() (*bootstrap.Summary, error) {
	s, err := bootstrap.ReadBlobs(bytes.NewReader(i.Bootstrap), int64(len(i.Bootstrap)), i.Ref)
	switch {
	case errors.Is(err, bootstrap.ErrUnsupported):
		return nil, source.Permanent(fmt.Errorf("%w: make another image from the original one with: holdfast convert", err))
	case err != nil:
		return nil, source.Permanent(fmt.Errorf("%w: fetch or convert the image again", err))
	}
	i.prefetch = s.Prefetch
	return s, nil
}

// readMeta fetches every blob's chunk information and makes the tables.
func (i *Image) readMeta(ctx context.Context, s *bootstrap.Summary) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(openers)
	for n, b := range i.Blobs {
		g.Go(func() error {
			m, err := blob.ReadMeta(ctx, b.Source, b.Info)
			if err != nil {
				return err
			}
			return b.setMeta(m, s, n)
		})
	}
	return g.Wait()
}

// setMeta makes the table of blob n of the bootstrap.
func (b *Blob) setMeta(m *blob.Meta, s *bootstrap.Summary, n int) error {
	var digests []rafs.Digest
	if !m.HasDigests() && s.Chunks != nil {
		digests = make([]rafs.Digest, m.Info().ChunkCount)
		for _, c := range s.Chunks {
			if c.Blob == n+1 && uint64(c.Index) < uint64(len(digests)) {
				digests[c.Index] = c.Digest
			}
		}
	}
	t, err := m.Table(digests)
	if err != nil {
		return source.Permanent(err)
	}
	b.Info, b.meta, b.Table = m.Info(), m, t
	return nil
}

// A Range is a part of a blob's object.
type Range struct {
	Blob     int    // index in Image.Blobs
	Off, Len uint64 // bytes, in the object
}

// Plan returns what to prefetch, in order: what the image's own prefetch table lists, then every blob from start to end.
// What the first part names is named again by the second.
func (i *Image) Plan() []Range {
	var out []Range
	for _, e := range i.prefetch {
		out = append(out, Range{e.Blob - 1, e.Off, e.Len})
	}
	for n, b := range i.Blobs {
		if b.Table.Size() > 0 {
			out = append(out, Range{n, 0, b.Table.Size()})
		}
	}
	return out
}

// Close closes the sources. No reader of them may be left.
func (i *Image) Close() error {
	var errs []error
	for _, b := range i.Blobs {
		errs = append(errs, b.Source.Close())
	}
	return errors.Join(append(errs, i.store.Close())...)
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(s[:])
}

func fileSize(path string) (int64, error) {
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return 0, source.Permanent(fmt.Errorf("a blob is missing: %w: name the directory that holds it with rafs:BOOTSTRAP,BLOBDIR", err))
	case err != nil:
		return 0, source.Permanent(err)
	}
	return fi.Size(), nil
}
