package image

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"

	"holdfast/rafs/source"
)

// The schemes of references.
const (
	schemeLayout   = "oci"
	schemeRegistry = "docker"
	schemeRAFS     = "rafs"
)

// A Reference says where an image is; see the package comment for how it is written.
type Reference struct {
	scheme string
	path   string         // absolute: of the layout, or of the bootstrap
	tag    string         // of an image in a layout; "" for the only one
	blobs  string         // absolute: the directory of blobs of a rafs reference
	name   name.Reference // of an image in a registry
}

// tagPattern is what the OCI image specification 1.1 allows in org.opencontainers.image.ref.name, less slash and colon.
var tagPattern = regexp.MustCompile(`^[A-Za-z0-9]+([-._@+]+[A-Za-z0-9]+)*$`)

// ParseReference parses s. Relative paths are taken from the working directory. Errors list the accepted forms.
func ParseReference(s string) (Reference, error) {
	r, err := parseReference(s)
	if err != nil {
		return Reference{}, source.Permanent(fmt.Errorf("image %q: %w: want oci:PATH[:TAG], docker://HOST/REPOSITORY[:TAG] or rafs:BOOTSTRAP[,BLOBDIR]", s, err))
	}
	return r, nil
}

func parseReference(s string) (Reference, error) {
	scheme, rest, ok := strings.Cut(s, ":")
	r := Reference{scheme: scheme, path: rest}
	var err error
	switch {
	case !ok:
		return r, fmt.Errorf("no scheme")
	case rest == "":
		return r, fmt.Errorf("nothing after the scheme")
	case scheme == schemeLayout:
		if i := strings.LastIndexByte(rest, ':'); i >= 0 && !strings.Contains(rest[i:], "/") {
			r.path, r.tag = rest[:i], rest[i+1:]
			if !tagPattern.MatchString(r.tag) {
				return r, fmt.Errorf("%q cannot be a tag", r.tag)
			}
		}
	case scheme == schemeRegistry && strings.HasPrefix(rest, "//"):
		r.path = ""
		if r.name, err = name.ParseReference(rest[2:]); err != nil {
			return r, err
		}
		return r, nil
	case scheme == schemeRAFS:
		r.blobs = filepath.Dir(rest)
		if i := strings.LastIndexByte(rest, ','); i >= 0 {
			r.path, r.blobs = rest[:i], rest[i+1:]
		}
		if r.blobs == "" {
			return r, fmt.Errorf("the directory of blobs is missing")
		}
		if r.blobs, err = filepath.Abs(r.blobs); err != nil {
			return r, err
		}
	default:
		return r, fmt.Errorf("unknown scheme %q", scheme)
	}
	if r.path == "" {
		return r, fmt.Errorf("the path is missing")
	}
	r.path, err = filepath.Abs(r.path)
	return r, err
}

// String returns the reference with absolute paths; ParseReference gives the same Reference for it.
func (r Reference) String() string {
	switch {
	case r.name != nil:
		return schemeRegistry + "://" + r.name.Name()
	case r.scheme == schemeRAFS:
		return schemeRAFS + ":" + r.path + "," + r.blobs
	case r.tag != "":
		return schemeLayout + ":" + r.path + ":" + r.tag
	case strings.Contains(filepath.Base(r.path), ":"):
		return schemeLayout + ":" + r.path + "/"
	}
	return schemeLayout + ":" + r.path
}
