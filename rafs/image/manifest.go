package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"runtime"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs/oci"
	"holdfast/rafs/source"
)

// bootstrapTypes are the media types a bootstrap's layer may have.
var bootstrapTypes = []string{
	ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip,
	"application/vnd.docker.image.rootfs.diff.tar", "application/vnd.docker.image.rootfs.diff.tar.gzip",
}

var (
	// ErrFormat is wrapped by errors about manifests, layers and saved images that are damaged or crafted, those of package oci too.
	ErrFormat = oci.ErrFormat
	// ErrNotRAFS is wrapped by the error about an image that is no RAFS image; it says how to make one of it.
	ErrNotRAFS = errors.New("not a RAFS image")
)

// bad returns a permanent error that wraps [ErrFormat].
func bad(format string, args ...any) error {
	return source.Permanent(fmt.Errorf("%w: %w", ErrFormat, fmt.Errorf(format, args...)))
}

// fetchManifest finds the manifest of the image for this machine, through an index if there is one, and returns it with
// its digest.
func fetchManifest(ctx context.Context, s *oci.Store) (ocispec.Manifest, string, error) {
	found, err := s.Find(ctx)
	if err != nil {
		return ocispec.Manifest{}, "", err
	}
	d, err := choose(found)
	if err == nil && oci.IsIndex(d) {
		var idx ocispec.Index
		if idx, err = s.Index(ctx, d); err == nil {
			d, err = choose(idx.Manifests)
		}
	}
	if err != nil {
		return ocispec.Manifest{}, "", err
	}
	m, err := s.Manifest(ctx, d)
	return m, d.Digest.String(), err
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
		if slices.Contains(p.OSFeatures, oci.FeatureRAFS) {
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
		case l.Annotations[oci.AnnotationBootstrap] == "true":
			boot, found = l, true
		case l.MediaType == oci.MediaTypeBlob || l.Annotations[oci.AnnotationBlob] == "true":
			blobs[l.Digest.Encoded()] = l
		}
	}
	if !found {
		return boot, nil, source.Permanent(fmt.Errorf("%w: no layer is marked as a bootstrap: make a RAFS image of it with: holdfast convert %s DEST", ErrNotRAFS, ref))
	}
	if v, ok := boot.Annotations[oci.AnnotationVersion]; ok && v != "6" {
		return boot, nil, source.Permanent(fmt.Errorf("%w: layer %s is RAFS version %.20q, only 6 is read: convert the original image with: holdfast convert", ErrNotRAFS, boot.Digest, v))
	}
	if !slices.Contains(bootstrapTypes, boot.MediaType) {
		return boot, nil, bad("bootstrap layer %s has media type %.100q, want one of %s", boot.Digest, boot.MediaType, strings.Join(bootstrapTypes, ", "))
	}
	return boot, blobs, nil
}

// fetchBootstrap reads the bootstrap out of its layer, and checks the layer's digest.
func fetchBootstrap(ctx context.Context, s *oci.Store, d ocispec.Descriptor) ([]byte, error) {
	if d.Size == 0 || d.Size > maxBootstrap {
		return nil, bad("bootstrap layer %s has %d bytes, 1 to %d are possible", d.Digest, d.Size, maxBootstrap)
	}
	src := s.Blob(d.Digest.Encoded(), d.Size)
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
