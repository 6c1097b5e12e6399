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

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs/oci"
)

// An output is where an image is written to. Nothing of it can be seen under its tag before putRoot.
type output interface {
	// dir is a directory for blobs that are being written, on the file system they will stay on.
	dir() string
	// putFile stores a blob and takes its file, which lies in dir. It may be called from several goroutines.
	putFile(ctx context.Context, d ocispec.Descriptor, path string) error
	// putShared stores a blob of another image, unless it is there. It may be called from several goroutines.
	putShared(ctx context.Context, b DictionaryBlob) error
	// putBytes stores a small blob.
	putBytes(ctx context.Context, d ocispec.Descriptor, b []byte) error
	// putManifest stores a manifest or an index; what it refers to is stored already.
	putManifest(ctx context.Context, d ocispec.Descriptor, b []byte) error
	// putRoot gives the tag to a manifest or an index.
	putRoot(ctx context.Context, d ocispec.Descriptor, b []byte) error
	// Close removes what is left of a conversion that did not come to putRoot.
	Close() error
}

// descriptor returns the descriptor of b.
func descriptor(mediaType string, b []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
}

// A layoutOutput writes to an OCI image layout, which it makes if need be. Files are written beside their place and renamed;
// index.json comes last. Nothing is fsynced: after a power cut "holdfast check" tells whether the image is whole. Of two
// conversions to one layout at the same time, one may lose its tag.
type layoutOutput struct {
	path, tag string
	tmp       string
	made      []string // directories that were not there before, outer ones first
}

func openLayout(path, tag string) (_ *layoutOutput, err error) {
	if _, err := oci.ReadIndex(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	entries, err := os.ReadDir(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	isIndex := func(e os.DirEntry) bool { return e.Name() == ocispec.ImageIndexFile }
	if len(entries) > 0 && !slices.ContainsFunc(entries, isIndex) {
		return nil, fmt.Errorf("%s has files in it, but is not an OCI image layout: name another directory", path)
	}
	o := &layoutOutput{path: path, tag: tag}
	defer func() {
		if err != nil {
			o.Close()
		}
	}()
	for _, dir := range []string{path, filepath.Join(path, ocispec.ImageBlobsDir), o.blobs()} {
		switch err := os.Mkdir(dir, 0o755); {
		case err == nil:
			o.made = append(o.made, dir)
		case !errors.Is(err, os.ErrExist):
			return nil, fmt.Errorf("make OCI layout: %w", err)
		}
	}
	if o.tmp, err = os.MkdirTemp(path, ".convert-"); err != nil {
		return nil, fmt.Errorf("make OCI layout: %w", err)
	}
	return o, nil
}

func (o *layoutOutput) blobs() string {
	return filepath.Join(o.path, ocispec.ImageBlobsDir, digest.SHA256.String())
}

func (o *layoutOutput) dir() string { return o.tmp }

func (o *layoutOutput) putFile(_ context.Context, d ocispec.Descriptor, path string) error {
	return os.Rename(path, filepath.Join(o.blobs(), d.Digest.Encoded()))
}

// putShared believes a file that has the blob's name and size: whoever wrote it to the layout had to check it.
func (o *layoutOutput) putShared(ctx context.Context, b DictionaryBlob) (err error) {
	d := b.descriptor()
	if info, err := os.Stat(filepath.Join(o.blobs(), d.Digest.Encoded())); err == nil && info.Mode().IsRegular() && info.Size() == d.Size {
		return nil
	}
	tmp := filepath.Join(o.tmp, d.Digest.Encoded())
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	r := b.open(ctx)
	_, err = io.Copy(f, r)
	if err = errors.Join(err, r.Close(), f.Close()); err != nil {
		return b.failed(err)
	}
	return o.putFile(ctx, d, tmp)
}

func (o *layoutOutput) putBytes(ctx context.Context, d ocispec.Descriptor, b []byte) error {
	tmp := filepath.Join(o.tmp, d.Digest.Encoded())
	if err := os.WriteFile(tmp, b, 0o644); err != nil {
		return err
	}
	return o.putFile(ctx, d, tmp)
}

func (o *layoutOutput) putManifest(ctx context.Context, d ocispec.Descriptor, b []byte) error {
	return o.putBytes(ctx, d, b)
}

func (o *layoutOutput) putRoot(ctx context.Context, d ocispec.Descriptor, b []byte) error {
	if err := o.putBytes(ctx, d, b); err != nil {
		return err
	}
	version, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}
	if err := o.replace(ocispec.ImageLayoutFile, version); err != nil {
		return err
	}
	idx, err := oci.ReadIndex(o.path)
	if errors.Is(err, os.ErrNotExist) {
		idx = ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	} else if err != nil {
		return err
	}
	idx.Manifests = slices.DeleteFunc(idx.Manifests, func(e ocispec.Descriptor) bool {
		return e.Annotations[ocispec.AnnotationRefName] == o.tag
	})
	d.Annotations = map[string]string{ocispec.AnnotationRefName: o.tag}
	idx.Manifests = append(idx.Manifests, d)
	if b, err = json.Marshal(idx); err != nil {
		return err
	}
	if err := o.replace(ocispec.ImageIndexFile, b); err != nil {
		return err
	}
	o.made = nil
	return nil
}

// replace writes a file of the layout in one step.
func (o *layoutOutput) replace(name string, b []byte) error {
	tmp := filepath.Join(o.tmp, name)
	if err := os.WriteFile(tmp, b, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(o.path, name))
}

// Close removes the temporary files, and the layout's directories if they were made for nothing.
func (o *layoutOutput) Close() error {
	var err error
	if o.tmp != "" {
		err = os.RemoveAll(o.tmp)
		o.tmp = ""
	}
	for _, dir := range slices.Backward(o.made) {
		os.Remove(dir) // fails, as it should, where a blob was stored
	}
	o.made = nil
	return err
}
