package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs/source"
)

// Media types of documents beside OCI's.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
)

var documentTypes = []string{ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, dockerManifest, dockerIndex}

// How RAFS images are packed (FORMATS.md 1.12).
const (
	annotationBootstrap = "containerd.io/snapshot/nydus-bootstrap"
	annotationBlob      = "containerd.io/snapshot/nydus-blob"
	annotationVersion   = "containerd.io/snapshot/nydus-fs-version"
	blobMediaType       = "application/vnd.oci.image.layer.nydus.blob.v1"
	featureNydus        = "nydus.remoteimage.v1" // in os.features of the platform
)

// bootstrapTypes are the media types a bootstrap's layer may have.
var bootstrapTypes = []string{
	ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip,
	"application/vnd.docker.image.rootfs.diff.tar", "application/vnd.docker.image.rootfs.diff.tar.gzip",
}

var (
	// ErrFormat is wrapped by errors about manifests, layers and saved images that are damaged or crafted.
	ErrFormat = errors.New("damaged image")
	// ErrNotRAFS is wrapped by the error about an image that is no RAFS image; it says how to make one of it.
	ErrNotRAFS = errors.New("not a RAFS image")
)

// bad returns a permanent error that wraps [ErrFormat].
func bad(format string, args ...any) error {
	return source.Permanent(fmt.Errorf("%w: %w", ErrFormat, fmt.Errorf(format, args...)))
}

// descriptor describes a manifest that a registry sent.
func descriptor(m source.Manifest) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.Digest(m.Digest), Size: int64(len(m.Body))}
}

// checkDescriptor refuses a descriptor by which nothing can be fetched.
func checkDescriptor(what string, d ocispec.Descriptor) error {
	if err := d.Digest.Validate(); err != nil || d.Digest.Algorithm() != digest.SHA256 {
		return bad("%s: digest %.100q, want sha256:<64 hex digits>", what, d.Digest)
	}
	if d.Size <= 0 {
		return bad("%s %s: size %d", what, d.Digest, d.Size)
	}
	return nil
}

// fetchManifest follows d, through an index if it is one, to the manifest of the image for this machine, and returns
// it with its digest.
func fetchManifest(ctx context.Context, s store, d ocispec.Descriptor) (ocispec.Manifest, string, error) {
	b, err := fetchDocument(ctx, s, d)
	if err != nil {
		return ocispec.Manifest{}, "", err
	}
	if d.MediaType == ocispec.MediaTypeImageIndex || d.MediaType == dockerIndex {
		idx, err := parseIndex(b)
		if err == nil {
			d, err = choose(idx.Manifests)
		}
		if err != nil {
			return ocispec.Manifest{}, "", fmt.Errorf("index %s: %w", d.Digest, err)
		}
		if b, err = fetchDocument(ctx, s, d); err != nil {
			return ocispec.Manifest{}, "", err
		}
	}
	if d.MediaType != ocispec.MediaTypeImageManifest && d.MediaType != dockerManifest {
		return ocispec.Manifest{}, "", bad("%s is of type %.100q, want the manifest of an image", d.Digest, d.MediaType)
	}
	m, err := parseManifest(b)
	if err != nil {
		return ocispec.Manifest{}, "", fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	return m, d.Digest.String(), nil
}

// fetchDocument returns the document that d describes, checked against it.
func fetchDocument(ctx context.Context, s store, d ocispec.Descriptor) ([]byte, error) {
	if err := checkDescriptor("manifest", d); err != nil {
		return nil, err
	}
	b, err := s.document(ctx, d)
	if err != nil {
		return nil, err
	}
	if got := digest.FromBytes(b); got != d.Digest || int64(len(b)) != d.Size {
		return nil, bad("manifest %s: the content has digest %s, and %d bytes instead of %d: fetch the image again", d.Digest, got, len(b), d.Size)
	}
	return b, nil
}

func parseIndex(b []byte) (ocispec.Index, error) {
	var idx ocispec.Index
	if err := json.Unmarshal(b, &idx); err != nil {
		return idx, bad("not an index: %w", err)
	}
	if idx.MediaType != "" && idx.MediaType != ocispec.MediaTypeImageIndex && idx.MediaType != dockerIndex {
		return idx, bad("it calls itself %.100q, want an index", idx.MediaType)
	}
	return idx, nil
}

// parseManifest parses a manifest and checks its layers' descriptors.
func parseManifest(b []byte) (ocispec.Manifest, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return m, bad("not a manifest: %w", err)
	}
	if m.MediaType != "" && m.MediaType != ocispec.MediaTypeImageManifest && m.MediaType != dockerManifest {
		return m, bad("it calls itself %.100q, want a manifest", m.MediaType)
	}
	for i, l := range m.Layers {
		if err := checkDescriptor(fmt.Sprintf("layer %d", i), l); err != nil {
			return m, err
		}
	}
	return m, nil
}

// choose picks the image for this machine: a RAFS one where the index says which are, else the first.
func choose(ds []ocispec.Descriptor) (ocispec.Descriptor, error) {
	if len(ds) == 1 {
		return ds[0], nil
	}
	var found *ocispec.Descriptor
	var names []string
	for i, d := range ds {
		p := d.Platform
		if p == nil {
			names = append(names, "none")
			continue
		}
		names = append(names, p.OS+"/"+p.Architecture)
		if p.OS != "linux" || p.Architecture != runtime.GOARCH {
			continue
		}
		if slices.Contains(p.OSFeatures, featureNydus) {
			return d, nil
		}
		if found == nil {
			found = &ds[i]
		}
	}
	if found == nil {
		return ocispec.Descriptor{}, bad("no image for linux/%s, only for %.300q", runtime.GOARCH, names)
	}
	return *found, nil
}

// splitLayers finds the bootstrap's layer, which is the last one marked as such, and the blobs' by id.
func splitLayers(ref string, m ocispec.Manifest) (boot ocispec.Descriptor, blobs map[string]ocispec.Descriptor, err error) {
	blobs = make(map[string]ocispec.Descriptor)
	found := false
	for _, l := range m.Layers {
		switch {
		case l.Annotations[annotationBootstrap] == "true":
			boot, found = l, true
		case l.MediaType == blobMediaType || l.Annotations[annotationBlob] == "true":
			blobs[l.Digest.Encoded()] = l
		}
	}
	if !found {
		return boot, nil, source.Permanent(fmt.Errorf("%w: no layer is marked as a bootstrap: make a RAFS image of it with: holdfast convert %s DEST", ErrNotRAFS, ref))
	}
	if v, ok := boot.Annotations[annotationVersion]; ok && v != "6" {
		return boot, nil, source.Permanent(fmt.Errorf("%w: layer %s is RAFS version %.20q, only 6 is read: convert the original image with: holdfast convert", ErrNotRAFS, boot.Digest, v))
	}
	if !slices.Contains(bootstrapTypes, boot.MediaType) {
		return boot, nil, bad("bootstrap layer %s has media type %.100q, want one of %s", boot.Digest, boot.MediaType, strings.Join(bootstrapTypes, ", "))
	}
	return boot, blobs, nil
}

// fetchBootstrap reads the bootstrap out of its layer, and checks the layer's digest.
func fetchBootstrap(ctx context.Context, s store, d ocispec.Descriptor) ([]byte, error) {
	if d.Size > maxBootstrap {
		return nil, bad("bootstrap layer %s has %d bytes, at most %d are possible", d.Digest, d.Size, maxBootstrap)
	}
	src := s.blob(d.Digest.Encoded(), d.Size)
	defer src.Close()
	r, err := src.ReadRange(ctx, 0, d.Size)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	verifier := d.Digest.Verifier()
	raw := &tracked{r: io.TeeReader(r, verifier)}
	b, err := unpack(raw, d.Size)
	if raw.err == nil {
		_, _ = io.Copy(io.Discard, raw) // the rest is only wanted in the digest; its error stays in raw
	}
	switch {
	case raw.err != nil: // of the source, and the reason for whatever unpack says
		return nil, fmt.Errorf("bootstrap layer: %w", raw.err)
	case !verifier.Verified():
		return nil, bad("bootstrap layer %s in %s: the content has another digest: fetch the image again", d.Digest, src)
	case err != nil:
		return nil, fmt.Errorf("bootstrap layer %s: %w", d.Digest, err)
	}
	return b, nil
}

// tracked remembers the first error but io.EOF of a reader, so that it is not lost in those of a decoder above.
type tracked struct {
	r   io.Reader
	err error
}

func (t *tracked) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	if err != nil && err != io.EOF && t.err == nil {
		t.err = err
	}
	return n, err
}

// idPattern is what a blob's id must be before it is part of a path or an address.
var idPattern = regexp.MustCompile(`^[0-9a-f]{1,64}$`)
