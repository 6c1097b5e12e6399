package oci

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs/source"
)

// A Store is the layout or repository that a reference names, and may be used by several goroutines.
type Store struct {
	ref  Reference
	repo *source.Repository // nil: a layout
}

// Open returns the store. Nothing is opened or fetched.
func Open(ref Reference, o source.Options) *Store {
	s := &Store{ref: ref}
	if ref.Name != nil {
		s.repo = source.NewRepository(ref.Name.Context(), o)
	}
	return s
}

// String names the layout or repository in errors.
func (s *Store) String() string {
	if s.repo != nil {
		return schemeRegistry + "://" + s.repo.String()
	}
	return s.ref.Path
}

// Close closes connections; sources of blobs must be closed before.
func (s *Store) Close() error {
	if s.repo != nil {
		return s.repo.Close()
	}
	return nil
}

// Blob returns the blob with the sha256 hex, which the caller has seen to be hex, and size bytes.
func (s *Store) Blob(hex string, size int64) source.Source {
	if s.repo != nil {
		return s.repo.Blob(digest.SHA256.String()+":"+hex, size)
	}
	return source.NewFile(s.path(hex), size)
}

func (s *Store) path(hex string) string {
	return filepath.Join(s.ref.Path, ocispec.ImageBlobsDir, digest.SHA256.String(), hex)
}

// Find returns what the reference stands for, at least one descriptor: several if a layout has the tag several times. The
// error wraps [ErrNotFound] if a layout has no such tag, or several images and the reference no tag.
func (s *Store) Find(ctx context.Context) ([]ocispec.Descriptor, error) {
	if s.repo != nil {
		m, err := s.repo.Manifest(ctx, s.ref.Name.Identifier(), documentTypes)
		if err != nil {
			return nil, err
		}
		return []ocispec.Descriptor{{MediaType: m.MediaType, Digest: digest.Digest(m.Digest), Size: int64(len(m.Body))}}, nil
	}
	idx, err := ReadIndex(s.ref.Path)
	if err != nil {
		return nil, err
	}
	var found []ocispec.Descriptor
	var tags []string
	for _, d := range idx.Manifests {
		tag := d.Annotations[ocispec.AnnotationRefName]
		tags = append(tags, tag)
		if s.ref.Tag == "" || s.ref.Tag == tag {
			found = append(found, d)
		}
	}
	path := filepath.Join(s.ref.Path, ocispec.ImageIndexFile)
	switch {
	case len(found) == 0:
		return nil, source.Permanent(fmt.Errorf("%w: %s has no image with the tag %q, only %.200q", ErrNotFound, path, s.ref.Tag, tags))
	case len(found) > 1 && s.ref.Tag == "":
		return nil, source.Permanent(fmt.Errorf("%w: %s holds %d images: name one with its tag, one of %.200q", ErrNotFound, path, len(found), tags))
	}
	return found, nil
}

// ReadIndex reads the index.json of the layout in dir. The error wraps os.ErrNotExist if there is none.
func ReadIndex(dir string) (ocispec.Index, error) {
	path := filepath.Join(dir, ocispec.ImageIndexFile)
	b, err := readDocument(path)
	if errors.Is(err, os.ErrNotExist) {
		err = fmt.Errorf("%s is not an OCI image layout: %w", dir, err)
	}
	if err != nil {
		return ocispec.Index{}, source.Permanent(err)
	}
	idx, err := parseIndex(b)
	if err != nil {
		return idx, fmt.Errorf("%s: %w", path, err)
	}
	return idx, nil
}

// readDocument reads a file of at most MaxDocument bytes.
func readDocument(path string) ([]byte, error) {
	b, err := source.ReadFile(path, MaxDocument)
	if errors.Is(err, source.ErrTooLarge) {
		err = bad("%w", err)
	}
	return b, err
}
