package oci

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
)

// The schemes of references.
const (
	schemeLayout   = "oci"
	schemeRegistry = "docker"
)

// A Reference says where an image is; see the package comment for how it is written.
type Reference struct {
	Path string         // of a layout, absolute
	Tag  string         // of an image in a layout; "" for the only one
	Name name.Reference // of an image in a registry; nil for one in a layout
}

// tagPattern is what the OCI image specification 1.1 allows in the annotation org.opencontainers.image.ref.name, less the
// slash and the colon, which would make "oci:PATH:TAG" ambiguous.
var tagPattern = regexp.MustCompile(`^[A-Za-z0-9]+([-._@+]+[A-Za-z0-9]+)*$`)

// ParseReference parses s. Relative paths are taken from the working directory. Errors do not repeat s, nor tell the
// accepted forms, which the caller may have more of.
func ParseReference(s string) (Reference, error) {
	scheme, rest, ok := strings.Cut(s, ":")
	switch {
	case !ok:
		return Reference{}, errors.New("no scheme")
	case rest == "":
		return Reference{}, errors.New("nothing after the scheme")
	case scheme == schemeLayout:
		return parseLayout(rest)
	case scheme == schemeRegistry && strings.HasPrefix(rest, "//"):
		n, err := name.ParseReference(rest[2:])
		return Reference{Name: n}, err
	}
	return Reference{}, fmt.Errorf("unknown scheme %q", scheme)
}

func parseLayout(s string) (Reference, error) {
	r := Reference{Path: s}
	if i := strings.LastIndexByte(s, ':'); i >= 0 && !strings.Contains(s[i:], "/") {
		r.Path, r.Tag = s[:i], s[i+1:]
		if !tagPattern.MatchString(r.Tag) {
			return Reference{}, fmt.Errorf("%q cannot be a tag: use letters, digits and -._@+ between them", r.Tag)
		}
	}
	if r.Path == "" {
		return Reference{}, errors.New("the path is missing")
	}
	var err error
	r.Path, err = filepath.Abs(r.Path)
	return r, err
}

// String returns the reference with an absolute path; [ParseReference] gives the same Reference for it.
func (r Reference) String() string {
	switch {
	case r.Name != nil:
		return schemeRegistry + "://" + r.Name.Name()
	case r.Tag != "":
		return schemeLayout + ":" + r.Path + ":" + r.Tag
	case strings.Contains(filepath.Base(r.Path), ":"):
		return schemeLayout + ":" + r.Path + "/"
	}
	return schemeLayout + ":" + r.Path
}
