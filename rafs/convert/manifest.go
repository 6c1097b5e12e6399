package convert

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs/oci"
)

// Files of the bootstrap layer.
const (
	bootstrapDir   = "image/"
	bootstrapName  = "image.boot"
	blobMetaSuffix = ".blob.meta" // after the hex digest of a blob layer
)

// A packed document is ready to be stored.
type document struct {
	desc ocispec.Descriptor
	body []byte
}

func newDocument(mediaType string, v any) (document, error) {
	b, err := json.Marshal(v)
	return document{descriptor(mediaType, b), b}, err
}

// A packedFile is a file of the bootstrap layer.
type packedFile struct {
	name string
	body []byte
}

// bootstrapLayer packs the last layer of an image, and returns it with its DiffID: the bootstrap first, and after it,
// as nydus-snapshotter appends its files (pkg/converter, Merge), the chunk information of the blobs in the order of their
// layers (FORMATS.md 1.7), which saves nydusd a request for each; that of a chunk dictionary's blobs it asks for. Who wants the bootstrap alone can stop there. The headers say nothing that the content does not.
func bootstrapLayer(files []packedFile) (document, digest.Digest, error) {
	var out bytes.Buffer
	z, err := gzip.NewWriterLevel(&out, gzip.DefaultCompression)
	if err != nil {
		return document{}, "", err
	}
	diff := digest.SHA256.Digester()
	t := tar.NewWriter(io.MultiWriter(diff.Hash(), z))
	if err := t.WriteHeader(packedHeader("", 0o755, tar.TypeDir, 0)); err != nil {
		return document{}, "", err
	}
	for _, f := range files {
		if err := t.WriteHeader(packedHeader(f.name, 0o444, tar.TypeReg, len(f.body))); err != nil {
			return document{}, "", err
		}
		if _, err := t.Write(f.body); err != nil {
			return document{}, "", err
		}
	}
	if err := t.Close(); err != nil {
		return document{}, "", err
	}
	if err := z.Close(); err != nil {
		return document{}, "", err
	}
	d := document{descriptor(ocispec.MediaTypeImageLayerGzip, out.Bytes()), out.Bytes()}
	d.desc.Annotations = map[string]string{oci.AnnotationBootstrap: "true", oci.AnnotationVersion: "6"}
	return d, diff.Digest(), nil
}

func packedHeader(name string, mode int64, typ byte, size int) *tar.Header {
	return &tar.Header{Name: bootstrapDir + name, Mode: mode, Typeflag: typ, Size: int64(size), ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR}
}

// blobDescriptor is the descriptor of a blob layer, whose DiffID is its digest.
func blobDescriptor(b madeBlob) ocispec.Descriptor { return describeBlob(b.info.ID, b.size) }

func describeBlob(id string, size int64) ocispec.Descriptor {
	return ocispec.Descriptor{
		MediaType:   oci.MediaTypeBlob,
		Digest:      digest.NewDigestFromEncoded(digest.SHA256, id),
		Size:        size,
		Annotations: map[string]string{oci.AnnotationBlob: "true"},
	}
}

// rewriteConfig returns a configuration for other layers; everything else in it stays, fields unknown here included. kept
// says which of the source's layers live on as a blob layer, shared how many layers of a chunk dictionary come after those.
func rewriteConfig(config []byte, diffIDs []digest.Digest, kept []bool, shared int) (document, error) {
	fields := make(map[string]json.RawMessage)
	if err := json.Unmarshal(config, &fields); err != nil {
		return document{}, fmt.Errorf("read the image's configuration: %w", err)
	}
	var err error
	if fields["rootfs"], err = json.Marshal(ocispec.RootFS{Type: "layers", DiffIDs: diffIDs}); err != nil {
		return document{}, err
	}
	if h := fields["history"]; h != nil {
		if fields["history"], err = rewriteHistory(h, kept, shared); err != nil {
			return document{}, err
		}
		if fields["history"] == nil {
			delete(fields, "history")
		}
	}
	return newDocument(ocispec.MediaTypeImageConfig, fields)
}

// rewriteHistory marks the steps whose layers are gone as empty, and adds those of shared layers and the bootstrap's. A history
// that does not fit its layers is dropped: nil.
func rewriteHistory(old json.RawMessage, kept []bool, shared int) (json.RawMessage, error) {
	var steps []map[string]json.RawMessage
	if err := json.Unmarshal(old, &steps); err != nil {
		return nil, fmt.Errorf("read the history in the image's configuration: %w", err)
	}
	i := 0
	for _, s := range steps {
		if s == nil || string(s["empty_layer"]) == "true" {
			continue
		}
		if i == len(kept) {
			return nil, nil
		}
		if !kept[i] {
			s["empty_layer"] = json.RawMessage("true")
		}
		i++
	}
	if len(steps) == 0 || i != len(kept) {
		return nil, nil
	}
	add := func(comment string) {
		steps = append(steps, map[string]json.RawMessage{
			"created_by": json.RawMessage(`"holdfast convert"`),
			"comment":    json.RawMessage(comment),
		})
	}
	for range shared {
		add(`"chunk dictionary"`)
	}
	add(`"RAFS bootstrap"`)
	return json.Marshal(steps)
}

// newManifest packs an image's manifest.
func newManifest(config ocispec.Descriptor, layers []ocispec.Descriptor, annotations map[string]string) (document, error) {
	return newDocument(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		MediaType:   ocispec.MediaTypeImageManifest,
		Config:      config,
		Layers:      layers,
		Annotations: maps.Clone(annotations),
	})
}

// newIndex packs the index of images for several platforms.
func newIndex(manifests []ocispec.Descriptor) (document, error) {
	return newDocument(ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: manifests,
	})
}

// rafsPlatform is p as it stands in a descriptor of a RAFS image, which runtimes that cannot mount one skip.
func rafsPlatform(p ocispec.Platform) *ocispec.Platform {
	p.OSFeatures = slices.Clone(p.OSFeatures)
	if !slices.Contains(p.OSFeatures, oci.FeatureRAFS) {
		p.OSFeatures = append(p.OSFeatures, oci.FeatureRAFS)
	}
	return &p
}
