package convert

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A registryOutput pushes to a registry. The registry library retries what fails for a while.
type registryOutput struct {
	ref    name.Reference
	pusher *remote.Pusher
	tmp    string
	pushed *atomic.Int64 // bytes of blobs sent
}

// openPush asks the registry whether it will take a push before the work for one begins.
func openPush(ref name.Reference, keychain authn.Keychain, pushed *atomic.Int64) (*registryOutput, error) {
	if err := remote.CheckPushPermission(ref, keychain, remote.DefaultTransport); err != nil {
		return nil, fmt.Errorf("push to %s: %w", ref, err)
	}
	p, err := remote.NewPusher(remote.WithAuthFromKeychain(keychain), remote.WithUserAgent("holdfast"))
	if err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp("", "holdfast-convert-")
	if err != nil {
		return nil, err
	}
	return &registryOutput{ref: ref, pusher: p, tmp: tmp, pushed: pushed}, nil
}

func (o *registryOutput) dir() string  { return o.tmp }
func (o *registryOutput) Close() error { return os.RemoveAll(o.tmp) }

func (o *registryOutput) putFile(ctx context.Context, d ocispec.Descriptor, path string) error {
	l := &fileLayer{path: path, desc: d, pushed: o.pushed}
	if err := o.pusher.Upload(ctx, o.ref.Context(), l); err != nil {
		return fmt.Errorf("push blob %s to %s: %w", d.Digest, o.ref.Context(), err)
	}
	return os.Remove(path)
}

// putShared has the registry take the blob from the repository where it is, if that is one of the same registry and the registry
// does such things; else it is sent.
func (o *registryOutput) putShared(ctx context.Context, b DictionaryBlob) error {
	var l v1.Layer = &sharedLayer{ctx: ctx, b: b, pushed: o.pushed}
	if b.Repo != nil && b.Repo.Context().RegistryStr() == o.ref.Context().RegistryStr() {
		l = &remote.MountableLayer{Layer: l, Reference: b.Repo}
	}
	if err := o.pusher.Upload(ctx, o.ref.Context(), l); err != nil {
		return b.failed(fmt.Errorf("push to %s: %w", o.ref.Context(), err))
	}
	return nil
}

func (o *registryOutput) putBytes(ctx context.Context, d ocispec.Descriptor, b []byte) error {
	if err := o.pusher.Upload(ctx, o.ref.Context(), static.NewLayer(b, types.MediaType(d.MediaType))); err != nil {
		return fmt.Errorf("push blob %s to %s: %w", d.Digest, o.ref.Context(), err)
	}
	return nil
}

func (o *registryOutput) putManifest(ctx context.Context, d ocispec.Descriptor, b []byte) error {
	return o.push(ctx, o.ref.Context().Digest(d.Digest.String()), d, b)
}

func (o *registryOutput) putRoot(ctx context.Context, d ocispec.Descriptor, b []byte) error {
	return o.push(ctx, o.ref, d, b)
}

func (o *registryOutput) push(ctx context.Context, ref name.Reference, d ocispec.Descriptor, b []byte) error {
	if err := o.pusher.Push(ctx, ref, rawManifest{d, b}); err != nil {
		return fmt.Errorf("push manifest %s to %s: %w", d.Digest, ref, err)
	}
	return nil
}

// A rawManifest is a manifest as the registry library takes it.
type rawManifest struct {
	desc ocispec.Descriptor
	b    []byte
}

func (m rawManifest) RawManifest() ([]byte, error) { return m.b, nil }
func (m rawManifest) MediaType() (types.MediaType, error) {
	return types.MediaType(m.desc.MediaType), nil
}

// A fileLayer is a blob in a file as the registry library takes it.
type fileLayer struct {
	path   string
	desc   ocispec.Descriptor
	pushed *atomic.Int64
}

func (l *fileLayer) Digest() (v1.Hash, error) { return v1.NewHash(l.desc.Digest.String()) }
func (l *fileLayer) DiffID() (v1.Hash, error) { return l.Digest() }
func (l *fileLayer) Size() (int64, error)     { return l.desc.Size, nil }
func (l *fileLayer) MediaType() (types.MediaType, error) {
	return types.MediaType(l.desc.MediaType), nil
}
func (l *fileLayer) Uncompressed() (io.ReadCloser, error) { return l.Compressed() }

func (l *fileLayer) Compressed() (io.ReadCloser, error) {
	f, err := os.Open(l.path)
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{meter{f, l.pushed}, f}, nil
}
