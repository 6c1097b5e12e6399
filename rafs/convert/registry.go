package convert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs/source"
)

// Media types of Docker's distribution (manifest schema 2), which registries still hold most images in.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerLayer    = "application/vnd.docker.image.rootfs."
)

var manifestTypes = []string{ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest, dockerIndex, dockerManifest}

// Limits on documents of images; larger ones are refused before they are read.
const (
	maxDocument = source.MaxManifest // bytes of a manifest, index or configuration
	maxLayers   = 1024               // of one image
	maxImages   = 256                // of one index
)

// ErrNotFound means that a layout has no image of the name asked for.
var ErrNotFound = errors.New("no such image")

// A store is where the manifests and blobs of an image are read from.
type store interface {
	// document returns a manifest, an index or a configuration, whose digest is the caller's to check.
	document(ctx context.Context, d ocispec.Descriptor) ([]byte, error)
	// blob returns a layer's source.
	blob(d ocispec.Descriptor) source.Source
	// String names the store in errors.
	String() string
	// Close frees what the store holds.
	Close() error
}

// A layoutStore is an OCI image layout (OCI image specification 1.1, image-layout.md).
type layoutStore struct{ dir string }

func (s layoutStore) String() string { return s.dir }
func (s layoutStore) Close() error   { return nil }

func (s layoutStore) path(d ocispec.Descriptor) string {
	return filepath.Join(s.dir, ocispec.ImageBlobsDir, d.Digest.Algorithm().String(), d.Digest.Encoded())
}

func (s layoutStore) document(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	return readSmall(s.path(d), maxDocument)
}

func (s layoutStore) blob(d ocispec.Descriptor) source.Source {
	return source.NewFile(s.path(d), d.Size)
}

// readSmall reads a file of at most limit bytes.
func readSmall(path string, limit int64) ([]byte, error) {
	f, size, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("read %s: it has %d bytes, at most %d are possible", path, size, limit)
	}
	return b, err
}

// root returns what the tag stands for; without one, the only image there is.
func (s layoutStore) root(tag string) (ocispec.Descriptor, error) {
	idx, err := readIndex(s.dir)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var tags []string
	for _, d := range idx.Manifests {
		t := d.Annotations[ocispec.AnnotationRefName]
		if tag != "" && t == tag || tag == "" && len(idx.Manifests) == 1 {
			return d, nil
		}
		tags = append(tags, t)
	}
	if tag == "" {
		return ocispec.Descriptor{}, fmt.Errorf("%w: %s holds %d images: name one of the tags %q", ErrNotFound, s.dir, len(idx.Manifests), tags)
	}
	return ocispec.Descriptor{}, fmt.Errorf("%w: %s has no tag %q, only %q", ErrNotFound, s.dir, tag, tags)
}

// readIndex reads the index.json of a layout.
func readIndex(dir string) (ocispec.Index, error) {
	path := filepath.Join(dir, ocispec.ImageIndexFile)
	b, err := readSmall(path, maxDocument)
	if errors.Is(err, os.ErrNotExist) {
		return ocispec.Index{}, fmt.Errorf("%s is not an OCI image layout: %w", dir, err)
	}
	if err != nil {
		return ocispec.Index{}, err
	}
	var idx ocispec.Index
	if err := json.Unmarshal(b, &idx); err != nil {
		return ocispec.Index{}, fmt.Errorf("read %s: %w", path, err)
	}
	return idx, nil
}

// A registryStore is a repository of a registry.
type registryStore struct{ repo *source.Repository }

func openRegistry(ref name.Reference, keychain authn.Keychain) registryStore {
	return registryStore{source.NewRepository(ref.Context(), source.Options{Keychain: keychain})}
}

func (s registryStore) String() string { return "docker://" + s.repo.String() }
func (s registryStore) Close() error   { return s.repo.Close() }

func (s registryStore) document(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if slices.Contains(manifestTypes, d.MediaType) {
		m, err := s.repo.Manifest(ctx, d.Digest.String(), manifestTypes)
		return m.Body, err
	}
	b := &resumer{ctx: ctx, src: s.blob(d)}
	defer b.Close()
	return io.ReadAll(b)
}

func (s registryStore) blob(d ocispec.Descriptor) source.Source {
	return s.repo.Blob(d.Digest.String(), d.Size)
}

// root returns what a reference stands for.
func (s registryStore) root(ctx context.Context, ref name.Reference) (ocispec.Descriptor, error) {
	m, err := s.repo.Manifest(ctx, ref.Identifier(), manifestTypes)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.Digest(m.Digest), Size: int64(len(m.Body))}, nil
}

// checkDescriptor refuses descriptors that nothing can be fetched by: digests become parts of paths and URLs.
func checkDescriptor(d ocispec.Descriptor) error {
	if err := d.Digest.Validate(); err != nil {
		return fmt.Errorf("descriptor with digest %.100q: %w", d.Digest, err)
	}
	if d.Digest.Algorithm() != digest.SHA256 {
		return fmt.Errorf("descriptor with digest %s: only sha256 is supported", d.Digest)
	}
	if d.Size < 0 {
		return fmt.Errorf("descriptor of %s with size %d", d.Digest, d.Size)
	}
	return nil
}

// readDocument reads a manifest, an index or a configuration, checks it against its descriptor and parses it into v.
func readDocument(ctx context.Context, s store, d ocispec.Descriptor, v any) ([]byte, error) {
	if err := checkDescriptor(d); err != nil {
		return nil, err
	}
	if d.Size > maxDocument {
		return nil, fmt.Errorf("%s in %s has %d bytes, at most %d are possible", d.Digest, s, d.Size, maxDocument)
	}
	b, err := s.document(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("read %s in %s: %w", d.Digest, s, err)
	}
	if got := digest.FromBytes(b); got != d.Digest || int64(len(b)) != d.Size {
		return nil, fmt.Errorf("read %s in %s: %w: its digest is %s, its size %d instead of %d: fetch the image again", d.Digest, s, errDamaged, got, len(b), d.Size)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return nil, fmt.Errorf("read %s in %s: %w", d.Digest, s, err)
	}
	return b, nil
}

// A reference to one image of an index.
type imageRef struct {
	desc     ocispec.Descriptor
	platform *ocispec.Platform // nil: its configuration tells
}

// imagesOf returns the images that root stands for: those of an index, or itself.
func imagesOf(ctx context.Context, s store, root ocispec.Descriptor) ([]imageRef, error) {
	switch root.MediaType {
	case ocispec.MediaTypeImageManifest, dockerManifest:
		return []imageRef{{desc: root}}, nil
	case ocispec.MediaTypeImageIndex, dockerIndex:
	default:
		return nil, fmt.Errorf("%s in %s is of type %.100q, not an image or an index of images", root.Digest, s, root.MediaType)
	}
	var idx ocispec.Index
	if _, err := readDocument(ctx, s, root, &idx); err != nil {
		return nil, err
	}
	var refs []imageRef
	for _, d := range idx.Manifests {
		if d.Platform != nil && d.Platform.OS == "unknown" {
			continue // attestations of BuildKit
		}
		if d.MediaType != ocispec.MediaTypeImageManifest && d.MediaType != dockerManifest {
			return nil, fmt.Errorf("index %s in %s: %s is of type %.100q, not an image", root.Digest, s, d.Digest, d.MediaType)
		}
		refs = append(refs, imageRef{d, d.Platform})
	}
	if len(refs) == 0 || len(refs) > maxImages {
		return nil, fmt.Errorf("index %s in %s holds %d images, want 1 to %d", root.Digest, s, len(refs), maxImages)
	}
	return refs, nil
}

// openImage reads an image's manifest and configuration.
func openImage(ctx context.Context, s store, ref imageRef) (inputImage, error) {
	var m ocispec.Manifest
	if _, err := readDocument(ctx, s, ref.desc, &m); err != nil {
		return inputImage{}, err
	}
	if len(m.Layers) > maxLayers {
		return inputImage{}, fmt.Errorf("manifest %s in %s has %d layers, at most %d are possible", ref.desc.Digest, s, len(m.Layers), maxLayers)
	}
	var platform ocispec.Platform
	img := inputImage{annotations: m.Annotations, merge: true}
	for i, d := range m.Layers {
		if err := checkLayer(d); err != nil {
			return inputImage{}, fmt.Errorf("layer %d of manifest %s in %s: %w", i+1, ref.desc.Digest, s, err)
		}
		img.layers = append(img.layers, blobLayer(s, d))
	}
	var err error
	if img.config, err = readDocument(ctx, s, m.Config, &platform); err != nil {
		return inputImage{}, fmt.Errorf("configuration of manifest %s: %w", ref.desc.Digest, err)
	}
	if ref.platform != nil {
		platform = *ref.platform
	}
	img.platform = platform
	return img, nil
}

func blobLayer(s store, d ocispec.Descriptor) inputLayer {
	return inputLayer{name: d.Digest.String(), size: d.Size, read: func(ctx context.Context, r *layerReader) error {
		src := s.blob(d)
		defer src.Close()
		return r.readBlob(ctx, src, d.Digest.Encoded())
	}}
}

// checkLayer refuses what is not a tar, by its media type. How it is compressed its first bytes tell better.
func checkLayer(d ocispec.Descriptor) error {
	if err := checkDescriptor(d); err != nil {
		return err
	}
	t := d.MediaType
	switch {
	case d.Annotations[annotationBlob] != "" || t == mediaTypeBlob || d.Annotations[annotationBootstrap] != "":
		return errors.New("it is a layer of a RAFS image: there is nothing to convert, mount it as it is")
	case strings.HasSuffix(t, "+encrypted"):
		return errors.New("it is encrypted: decrypt the image first")
	case strings.HasPrefix(t, ocispec.MediaTypeImageLayer), strings.HasPrefix(t, "application/vnd.oci.image.layer.nondistributable.v1.tar"):
		return nil
	case strings.HasPrefix(t, dockerLayer) && strings.Contains(t, "diff.tar"):
		return nil
	}
	return fmt.Errorf("it is of type %.100q, not a layer of a container image", t)
}
