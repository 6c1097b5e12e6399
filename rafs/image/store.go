package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs/source"
)

// Options say how images are fetched; the zero value is good.
type Options struct {
	Keychain authn.Keychain // where credentials come from; nil: the Docker configuration file and its helpers
	Stall    time.Duration  // how long a registry may send nothing; 0: source.DefaultStall
}

// A store keeps the parts of an image.
type store interface {
	// root describes what the reference stands for. Only registries tell a digest without being asked for one.
	root(ctx context.Context) (ocispec.Descriptor, error)
	// document returns a manifest or an index; the caller checks it against d.
	document(ctx context.Context, d ocispec.Descriptor) ([]byte, error)
	// blob returns the blob whose sha256, or file name, is id. id was checked to be hex.
	blob(id string, size int64) source.Source
	Close() error
}

// openStore returns the store a reference names. Nothing is opened or fetched.
func openStore(r Reference, o Options) store {
	switch r.scheme {
	case schemeRegistry:
		return &remote{repo: source.NewRepository(r.name.Context(), source.Options{Keychain: o.Keychain, Stall: o.Stall}), ref: r.name.Identifier()}
	case schemeLayout:
		return layout{dir: r.path, tag: r.tag}
	}
	return directory{dir: r.blobs}
}

// A remote is a repository of a registry and the tag or digest in it.
type remote struct {
	repo *source.Repository
	ref  string
}

func (s *remote) root(ctx context.Context) (ocispec.Descriptor, error) {
	m, err := s.repo.Manifest(ctx, s.ref, documentTypes)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return descriptor(m), nil
}

func (s *remote) document(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	m, err := s.repo.Manifest(ctx, d.Digest.String(), documentTypes)
	return m.Body, err
}

func (s *remote) blob(id string, size int64) source.Source { return s.repo.Blob("sha256:"+id, size) }
func (s *remote) Close() error                             { return s.repo.Close() }

// A layout is an OCI image layout (OCI image specification 1.1, "Image Layout").
type layout struct{ dir, tag string }

func (s layout) root(context.Context) (ocispec.Descriptor, error) {
	path := filepath.Join(s.dir, ocispec.ImageIndexFile)
	b, err := readFile(path, source.MaxManifest)
	if errors.Is(err, os.ErrNotExist) {
		err = fmt.Errorf("%s is not an OCI image layout: %w", s.dir, err)
	}
	if err != nil {
		return ocispec.Descriptor{}, source.Permanent(err)
	}
	idx, err := parseIndex(b)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: %w", path, err)
	}
	var tags []string
	var found []ocispec.Descriptor
	for _, d := range idx.Manifests {
		tag := d.Annotations[ocispec.AnnotationRefName]
		tags = append(tags, tag)
		if s.tag == "" || s.tag == tag {
			found = append(found, d)
		}
	}
	switch {
	case len(found) == 0:
		return ocispec.Descriptor{}, bad("%s has no image with the tag %q, only %.200q", path, s.tag, tags)
	case len(found) > 1 && s.tag == "":
		return ocispec.Descriptor{}, bad("%s holds %d images: name one with its tag, one of %.200q", path, len(found), tags)
	}
	return choose(found)
}

func (s layout) document(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	b, err := readFile(s.path(d.Digest.Encoded()), source.MaxManifest)
	return b, source.Permanent(err)
}

func (s layout) path(id string) string {
	return filepath.Join(s.dir, ocispec.ImageBlobsDir, "sha256", id)
}

func (s layout) blob(id string, size int64) source.Source { return source.NewFile(s.path(id), size) }
func (s layout) Close() error                             { return nil }

// A directory has blobs named by id, and no manifest.
type directory struct{ dir string }

func (s directory) root(context.Context) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{}, bad("%s has no manifest", s.dir)
}

func (s directory) document(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	return nil, bad("%s has no manifest %s", s.dir, d.Digest)
}

func (s directory) blob(id string, size int64) source.Source {
	return source.NewFile(filepath.Join(s.dir, id), size)
}

func (s directory) Close() error { return nil }

// readFile reads a regular file of at most limit bytes.
func readFile(path string, limit int64) ([]byte, error) {
	f, err := source.OpenFile(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if f.Size() > limit {
		return nil, bad("%s has %d bytes, at most %d are possible", path, f.Size(), limit)
	}
	if f.Size() == 0 {
		return nil, nil
	}
	r, err := f.ReadRange(context.Background(), 0, f.Size())
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b := make([]byte, f.Size())
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, err
	}
	return b, nil
}
