package convert

import (
	"errors"
	"fmt"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"

	"holdfast/rafs/oci"
)

// A location is a SOURCE.
type location struct {
	scheme string // "dir" or "tar"; "" for an image
	path   string // of the first two
	image  oci.Reference
}

// parseSource parses dir:PATH, tar:PATH, oci:PATH[:TAG] or docker://REF.
func parseSource(s string) (location, error) {
	scheme, rest, _ := strings.Cut(s, ":")
	if (scheme == "dir" || scheme == "tar") && rest != "" {
		return location{scheme: scheme, path: rest}, nil
	}
	ref, err := oci.ParseReference(s)
	if err != nil {
		return location{}, fmt.Errorf("source %q: %w: want dir:PATH, tar:PATH, oci:PATH[:TAG] or docker://REF", s, err)
	}
	return location{image: ref}, nil
}

// parseDest parses oci:PATH:TAG or docker://REF.
func parseDest(s string) (oci.Reference, error) {
	ref, err := oci.ParseReference(s)
	if err == nil && ref.Name == nil && ref.Tag == "" {
		err = errors.New("it has no tag")
	}
	if _, digest := ref.Name.(name.Digest); err == nil && digest {
		err = errors.New("nobody knows the digest before the image is made: write a tag")
	}
	if err != nil {
		return ref, fmt.Errorf("destination %q: %w: want oci:PATH:TAG or docker://REF", s, err)
	}
	return ref, nil
}
