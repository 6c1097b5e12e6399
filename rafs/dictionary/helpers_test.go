package dictionary

import (
	"context"
	"encoding/json"
	"io"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs/oci"
	"holdfast/rafs/source"
)

// ctx is that of tests, whose rapid.T has none of its own that outlives a draw.
var ctx = context.Background()

// manifestOf reads the manifest of an image in a layout.
func manifestOf(t tb, ref string) (*oci.Store, ocispec.Manifest) {
	t.Helper()
	r, err := oci.ParseReference(ref)
	if err != nil {
		t.Fatalf("%v", err)
	}
	s := oci.Open(r, source.Options{})
	found, err := s.Find(ctx)
	if err != nil {
		t.Fatalf("%v", err)
	}
	m, err := s.Manifest(ctx, found[0])
	if err != nil {
		t.Fatalf("%v", err)
	}
	return s, m
}

// configOf reads the configuration of an image in a layout.
func configOf(t tb, ref string) (config ocispec.Image) {
	t.Helper()
	s, m := manifestOf(t, ref)
	defer s.Close()
	src := s.Blob(m.Config.Digest.Encoded(), m.Config.Size)
	defer src.Close()
	r, err := src.ReadRange(ctx, 0, m.Config.Size)
	if err != nil {
		t.Fatalf("%v", err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err == nil {
		err = json.Unmarshal(b, &config)
	}
	if err != nil {
		t.Fatalf("%v", err)
	}
	return config
}
