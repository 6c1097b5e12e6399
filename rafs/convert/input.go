package convert

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs/source"
)

// An inputImage is an image of the source: one platform's.
type inputImage struct {
	platform    ocispec.Platform
	config      []byte            // its configuration, JSON
	annotations map[string]string // of its manifest
	layers      []inputLayer      // lowest first
	merge       bool              // the layers are layers: whiteouts in them have a meaning
}

// An inputLayer is a layer of the source.
type inputLayer struct {
	name string // for errors; empty: the source has no layers that people know of
	size int64  // bytes that read reads; 0: not known before
	read func(ctx context.Context, r *layerReader) error
}

// single returns the image that a directory or a tar makes: one layer and a configuration that says nothing but the
// platform, this machine's.
func single(l inputLayer) (inputImage, error) {
	p := ocispec.Platform{Architecture: runtime.GOARCH, OS: "linux"}
	config, err := json.Marshal(map[string]any{"architecture": p.Architecture, "os": p.OS, "config": struct{}{}})
	return inputImage{platform: p, config: config, layers: []inputLayer{l}}, err
}

func dirImage(path string) (inputImage, error) {
	return single(inputLayer{read: func(ctx context.Context, r *layerReader) error {
		return r.readDir(ctx, path)
	}})
}

func tarImage(path string) (inputImage, error) {
	f, info, err := source.OpenRegular(path)
	if err != nil {
		return inputImage{}, err
	}
	f.Close()
	return single(inputLayer{size: info.Size(), read: func(ctx context.Context, r *layerReader) error {
		f, _, err := source.OpenRegular(path)
		if err != nil {
			return err
		}
		defer f.Close()
		return r.readTarStream(ctx, f)
	}})
}

// parsePlatform parses OS/ARCH[/VARIANT].
func parsePlatform(s string) (ocispec.Platform, error) {
	parts := strings.Split(s, "/")
	if len(parts) < 2 || len(parts) > 3 || slices.Contains(parts, "") {
		return ocispec.Platform{}, fmt.Errorf("platform %q: want OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT, for example linux/arm64", s)
	}
	p := ocispec.Platform{OS: parts[0], Architecture: parts[1]}
	if len(parts) == 3 {
		p.Variant = parts[2]
	}
	return p, nil
}

func platformString(p ocispec.Platform) string {
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

// wanted reports whether p is one of the platforms; all are when none is named. Without a variant a name stands for all.
func wanted(p ocispec.Platform, platforms []ocispec.Platform) bool {
	return len(platforms) == 0 || slices.ContainsFunc(platforms, func(w ocispec.Platform) bool {
		return w.OS == p.OS && w.Architecture == p.Architecture && (w.Variant == "" || w.Variant == p.Variant)
	})
}
