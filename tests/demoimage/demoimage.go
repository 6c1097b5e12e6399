// Package demoimage makes the real image that the demo and the benchmarks run on: Debian with Python, put together by
// mmdebstrap from Debian's own packages, as a tar and as an ordinary one-layer OCI image. It is made once and kept under
// the user's cache directory.
package demoimage

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/match"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	suite    = "bookworm"
	packages = "python3"
	// Tag is the image's tag in the OCI layout.
	Tag = "plain"
)

// An Image is the demo image on disk.
type Image struct {
	Tar    string // path of the root file system as an uncompressed tar
	Layout string // path of the OCI layout that holds it as an image tagged Tag, its layer gzipped
}

// Ensure returns the image, making it first where it is not cached: half a minute and a few hundred megabytes.
func Ensure(ctx context.Context) (*Image, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, fmt.Errorf("find the user's cache directory: %w", err)
	}
	key := sha256.Sum256([]byte(suite + "\n" + packages + "\n1"))
	dir := filepath.Join(cache, "holdfast", "demo", hex.EncodeToString(key[:8]))
	img := &Image{Tar: filepath.Join(dir, "root.tar"), Layout: filepath.Join(dir, "oci")}
	if _, err := os.Stat(dir); err == nil {
		return img, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "new-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	if err := build(ctx, tmp); err != nil {
		return nil, fmt.Errorf("make the demo image: %w", err)
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return nil, err
	}
	if err := os.Rename(tmp, dir); err != nil && !os.IsExist(err) {
		return nil, err
	}
	return img, nil
}

func build(ctx context.Context, dir string) error {
	tar := filepath.Join(dir, "root.tar")
	cmd := exec.CommandContext(ctx, "mmdebstrap", "--quiet", "--variant=minbase", "--include="+packages,
		"--customize-hook=rm -f \"$1/etc/resolv.conf\" \"$1/etc/hostname\"", suite, tar)
	cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH=1700000000")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("mmdebstrap (Debian package mmdebstrap): %w: %s", err, strings.TrimSpace(stderr.String()))
	}
	layer, err := tarball.LayerFromFile(tar, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return err
	}
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	img, err = mutate.ConfigFile(img, &v1.ConfigFile{
		Architecture: "amd64", OS: "linux",
		Config: v1.Config{Cmd: []string{"python3"}, Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}},
	})
	if err != nil {
		return err
	}
	if img, err = mutate.AppendLayers(img, layer); err != nil {
		return err
	}
	p, err := layout.Write(filepath.Join(dir, "oci"), empty.Index)
	if err != nil {
		return err
	}
	return p.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": Tag}))
}

// V1 opens the ordinary OCI image.
func (i *Image) V1() (v1.Image, error) {
	p, err := layout.FromPath(i.Layout)
	if err != nil {
		return nil, err
	}
	idx, err := p.ImageIndex()
	if err != nil {
		return nil, err
	}
	m, err := idx.IndexManifest()
	if err != nil {
		return nil, err
	}
	for _, d := range m.Manifests {
		if match.Name(Tag)(d) {
			return p.Image(d.Digest)
		}
	}
	return nil, fmt.Errorf("%s holds no image %q: remove it and run again", i.Layout, Tag)
}
