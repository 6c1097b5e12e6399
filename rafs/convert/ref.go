package convert

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
)

// A location is a SOURCE or DEST as it is written on the command line.
type location struct {
	scheme string // "dir", "tar", "oci", "docker"
	path   string // of the first three
	tag    string // of oci; may be empty in a source
	ref    name.Reference
}

// tagPattern is what the OCI image specification 1.1 allows in the annotation org.opencontainers.image.ref.name, less the
// slash and the colon, which would make "oci:PATH:TAG" ambiguous.
var tagPattern = regexp.MustCompile(`^[A-Za-z0-9]+([-._@+]+[A-Za-z0-9]+)*$`)

// parseSource parses dir:PATH, tar:PATH, oci:PATH[:TAG] or docker://REF.
func parseSource(s string) (location, error) {
	scheme, rest, _ := strings.Cut(s, ":")
	switch {
	case rest == "":
	case scheme == "dir", scheme == "tar":
		return location{scheme: scheme, path: rest}, nil
	case scheme == "oci":
		return parseLayout(rest)
	case scheme == "docker" && strings.HasPrefix(rest, "//"):
		return parseRegistry(rest)
	}
	return location{}, fmt.Errorf("source %q: want dir:PATH, tar:PATH, oci:PATH[:TAG] or docker://REF", s)
}

// parseDest parses oci:PATH:TAG or docker://REF.
func parseDest(s string) (location, error) {
	scheme, rest, _ := strings.Cut(s, ":")
	switch {
	case rest == "":
	case scheme == "oci":
		l, err := parseLayout(rest)
		if err == nil && l.tag == "" {
			err = fmt.Errorf("destination %q has no tag: write oci:PATH:TAG", s)
		}
		return l, err
	case scheme == "docker" && strings.HasPrefix(rest, "//"):
		l, err := parseRegistry(rest)
		if _, digest := l.ref.(name.Digest); err == nil && digest {
			err = fmt.Errorf("destination %q is a digest, which nobody knows before the image is made: write a tag", s)
		}
		return l, err
	}
	return location{}, fmt.Errorf("destination %q: want oci:PATH:TAG or docker://REF", s)
}

func parseLayout(s string) (location, error) {
	l := location{scheme: "oci", path: s}
	if i := strings.LastIndexByte(s, ':'); i >= 0 && !strings.Contains(s[i:], "/") {
		l.path, l.tag = s[:i], s[i+1:]
		if !tagPattern.MatchString(l.tag) {
			return location{}, fmt.Errorf("oci:%s: %q cannot be a tag: use letters, digits and -._@+ between them", s, l.tag)
		}
	}
	if l.path == "" {
		return location{}, fmt.Errorf("oci:%s: the path is missing", s)
	}
	return l, nil
}

func parseRegistry(s string) (location, error) {
	ref, err := name.ParseReference(strings.TrimPrefix(s, "//"))
	if err != nil {
		return location{}, fmt.Errorf("docker:%s: %w", s, err)
	}
	return location{scheme: "docker", ref: ref}, nil
}

func (l location) String() string {
	switch {
	case l.ref != nil:
		return "docker://" + l.ref.String()
	case l.tag != "":
		return l.scheme + ":" + l.path + ":" + l.tag
	}
	return l.scheme + ":" + l.path
}
