package convert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs/oci"
)

// dockerLayer begins the media types of layers of Docker's images (manifest schema 2).
const dockerLayer = "application/vnd.docker.image.rootfs."

// Limits on images; larger ones are refused before their layers are read.
const (
	maxLayers = 1024 // of one image
	maxImages = 256  // of one index
)

// A reference to one image of an index.
type imageRef struct {
	desc     ocispec.Descriptor
	platform *ocispec.Platform // nil: its configuration tells
}

// imagesOf returns the images that root stands for: those of an index, or itself.
func imagesOf(ctx context.Context, s *oci.Store, root ocispec.Descriptor) ([]imageRef, error) {
	if !oci.IsIndex(root) {
		return []imageRef{{desc: root}}, nil
	}
	idx, err := s.Index(ctx, root)
	if err != nil {
		return nil, err
	}
	var refs []imageRef
	for _, d := range idx.Manifests {
		if d.Platform != nil && d.Platform.OS == "unknown" {
			continue // attestations of BuildKit
		}
		if !oci.IsManifest(d) {
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
func openImage(ctx context.Context, s *oci.Store, ref imageRef) (inputImage, error) {
	m, err := s.Manifest(ctx, ref.desc)
	if err != nil {
		return inputImage{}, err
	}
	if len(m.Layers) > maxLayers {
		return inputImage{}, fmt.Errorf("manifest %s in %s has %d layers, at most %d are possible", ref.desc.Digest, s, len(m.Layers), maxLayers)
	}
	img := inputImage{annotations: m.Annotations, merge: true}
	for i, d := range m.Layers {
		if err := checkLayer(d); err != nil {
			return inputImage{}, fmt.Errorf("layer %d of manifest %s in %s: %w", i+1, ref.desc.Digest, s, err)
		}
		img.layers = append(img.layers, blobLayer(s, d))
	}
	img.config, err = readConfig(ctx, s, m.Config)
	if err == nil {
		err = json.Unmarshal(img.config, &img.platform)
	}
	if err != nil {
		return inputImage{}, fmt.Errorf("configuration %s of manifest %s in %s: %w", m.Config.Digest, ref.desc.Digest, s, err)
	}
	if ref.platform != nil {
		img.platform = *ref.platform
	}
	return img, nil
}

func readConfig(ctx context.Context, s *oci.Store, d ocispec.Descriptor) ([]byte, error) {
	if d.Size > oci.MaxDocument {
		return nil, fmt.Errorf("it has %d bytes, at most %d are possible", d.Size, oci.MaxDocument)
	}
	src := s.Blob(d.Digest.Encoded(), d.Size)
	defer src.Close()
	r := &resumer{ctx: ctx, src: src}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	return b, oci.CheckBytes(d, b)
}

func blobLayer(s *oci.Store, d ocispec.Descriptor) inputLayer {
	return inputLayer{name: d.Digest.String(), size: d.Size, read: func(ctx context.Context, r *layerReader) error {
		src := s.Blob(d.Digest.Encoded(), d.Size)
		defer src.Close()
		return r.readBlob(ctx, src, d.Digest.Encoded())
	}}
}

// checkLayer refuses what is not a tar, by its media type. How it is compressed its first bytes tell better.
func checkLayer(d ocispec.Descriptor) error {
	t := d.MediaType
	switch {
	case d.Annotations[oci.AnnotationBlob] != "" || t == oci.MediaTypeBlob || d.Annotations[oci.AnnotationBootstrap] != "":
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
