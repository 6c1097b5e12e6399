package image

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"holdfast/rafs/oci"
	"holdfast/rafs/source"
)

const schemeRAFS = "rafs"

// A Reference says where an image is; see the package comment for how it is written.
type Reference struct {
	image oci.Reference // of an image in a layout or registry
	boot  string        // absolute: the bootstrap of a rafs reference; "" otherwise
	blobs string        // absolute: its directory of blobs
}

// ParseReference parses s. Relative paths are taken from the working directory. Errors list the accepted forms.
func ParseReference(s string) (Reference, error) {
	r, err := parseReference(s)
	if err != nil {
		return Reference{}, source.Permanent(fmt.Errorf("image %q: %w: want oci:PATH[:TAG], docker://HOST/REPOSITORY[:TAG] or rafs:BOOTSTRAP[,BLOBDIR]", s, err))
	}
	return r, nil
}

func parseReference(s string) (Reference, error) {
	boot, ok := strings.CutPrefix(s, schemeRAFS+":")
	if !ok {
		ref, err := oci.ParseReference(s)
		return Reference{image: ref}, err
	}
	blobs := filepath.Dir(boot)
	if i := strings.LastIndexByte(boot, ','); i >= 0 {
		boot, blobs = boot[:i], boot[i+1:]
	}
	switch {
	case boot == "":
		return Reference{}, errors.New("the path is missing")
	case blobs == "":
		return Reference{}, errors.New("the directory of blobs is missing")
	}
	boot, err := filepath.Abs(boot)
	if err != nil {
		return Reference{}, err
	}
	blobs, err = filepath.Abs(blobs)
	return Reference{boot: boot, blobs: blobs}, err
}

// String returns the reference with absolute paths; ParseReference gives the same Reference for it.
func (r Reference) String() string {
	if r.boot != "" {
		return schemeRAFS + ":" + r.boot + "," + r.blobs
	}
	return r.image.String()
}
