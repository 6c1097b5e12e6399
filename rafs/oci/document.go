package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs/source"
)

// Media types of Docker's distribution (manifest schema 2), which registries still hold most images in.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
)

var documentTypes = []string{ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest, dockerIndex, dockerManifest}

// How RAFS images are packed (FORMATS.md 1.12).
const (
	MediaTypeBlob       = "application/vnd.oci.image.layer.nydus.blob.v1"
	AnnotationBlob      = "containerd.io/snapshot/nydus-blob"
	AnnotationBootstrap = "containerd.io/snapshot/nydus-bootstrap"
	AnnotationVersion   = "containerd.io/snapshot/nydus-fs-version"
	FeatureRAFS         = "nydus.remoteimage.v1" // in os.features of the platform
)

// MaxDocument is how large an index, a manifest or a configuration may be, in bytes; larger ones are not read.
const MaxDocument = source.MaxManifest

var (
	// ErrFormat is wrapped by errors about content that is damaged or crafted.
	ErrFormat = errors.New("damaged image")
	// ErrNotFound is wrapped by errors about images that a layout or an index does not have.
	ErrNotFound = errors.New("no such image")
)

// bad returns a permanent error that wraps [ErrFormat].
func bad(format string, args ...any) error {
	return source.Permanent(fmt.Errorf("%w: %w", ErrFormat, fmt.Errorf(format, args...)))
}

// IsIndex reports whether d describes an index of images.
func IsIndex(d ocispec.Descriptor) bool {
	return d.MediaType == ocispec.MediaTypeImageIndex || d.MediaType == dockerIndex
}

// IsManifest reports whether d describes the manifest of one image.
func IsManifest(d ocispec.Descriptor) bool {
	return d.MediaType == ocispec.MediaTypeImageManifest || d.MediaType == dockerManifest
}

// CheckBytes compares the bytes that a descriptor led to with it.
func CheckBytes(d ocispec.Descriptor, b []byte) error {
	if got := digest.FromBytes(b); got != d.Digest || int64(len(b)) != d.Size {
		return bad("the content has digest %s, and %d bytes instead of %d: fetch the image again", got, len(b), d.Size)
	}
	return nil
}

// Index returns the index that d describes. What it refers to is not checked.
func (s *Store) Index(ctx context.Context, d ocispec.Descriptor) (ocispec.Index, error) {
	b, err := s.document(ctx, d)
	if err != nil {
		return ocispec.Index{}, fmt.Errorf("index %.100s in %s: %w", d.Digest, s, err)
	}
	idx, err := parseIndex(b)
	if err != nil {
		return idx, fmt.Errorf("index %s in %s: %w", d.Digest, s, err)
	}
	return idx, nil
}

// Manifest returns the manifest that d describes. Its layers' and configuration's digests and sizes are such that they can be
// fetched.
func (s *Store) Manifest(ctx context.Context, d ocispec.Descriptor) (ocispec.Manifest, error) {
	if !IsManifest(d) {
		return ocispec.Manifest{}, bad("%.100s in %s is of type %.100q, not an image or an index of images", d.Digest, s, d.MediaType)
	}
	b, err := s.document(ctx, d)
	if err != nil {
		return ocispec.Manifest{}, fmt.Errorf("manifest %.100s in %s: %w", d.Digest, s, err)
	}
	m, err := parseManifest(b)
	if err != nil {
		return m, fmt.Errorf("manifest %s in %s: %w", d.Digest, s, err)
	}
	return m, nil
}

// document returns the manifest or index that d describes, checked against it.
func (s *Store) document(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if err := checkDescriptor(d); err != nil {
		return nil, err
	}
	if d.Size > MaxDocument {
		return nil, bad("%d bytes, at most %d are possible", d.Size, MaxDocument)
	}
	var b []byte
	var err error
	if s.repo != nil {
		var m source.Manifest
		m, err = s.repo.Manifest(ctx, d.Digest.String(), documentTypes)
		b = m.Body
	} else {
		b, err = readDocument(s.path(d.Digest.Encoded()))
	}
	if err != nil {
		return nil, err
	}
	return b, CheckBytes(d, b)
}

// checkDescriptor refuses descriptors that nothing can be fetched by: digests become parts of paths and addresses.
func checkDescriptor(d ocispec.Descriptor) error {
	if err := d.Digest.Validate(); err != nil {
		return bad("digest %.100q, want sha256:<64 hex digits>: %w", d.Digest, err)
	}
	if d.Digest.Algorithm() != digest.SHA256 {
		return bad("digest %.100q: only sha256 is supported", d.Digest)
	}
	if d.Size < 0 {
		return bad("%s: size %d", d.Digest, d.Size)
	}
	return nil
}

func parseIndex(b []byte) (ocispec.Index, error) {
	var idx ocispec.Index
	if err := json.Unmarshal(b, &idx); err != nil {
		return idx, bad("not an index: %w", err)
	}
	if idx.MediaType != "" && !IsIndex(ocispec.Descriptor{MediaType: idx.MediaType}) {
		return idx, bad("it calls itself %.100q, want an index", idx.MediaType)
	}
	return idx, nil
}

// parseManifest parses a manifest and checks its descriptors.
func parseManifest(b []byte) (ocispec.Manifest, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return m, bad("not a manifest: %w", err)
	}
	if m.MediaType != "" && !IsManifest(ocispec.Descriptor{MediaType: m.MediaType}) {
		return m, bad("it calls itself %.100q, want a manifest", m.MediaType)
	}
	for i, l := range m.Layers {
		if err := checkDescriptor(l); err != nil {
			return m, fmt.Errorf("layer %d: %w", i+1, err)
		}
	}
	if err := checkDescriptor(m.Config); err != nil {
		return m, fmt.Errorf("configuration: %w", err)
	}
	return m, nil
}
