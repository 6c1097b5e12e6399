package oci

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs/source"
)

func TestReferences(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for in, want := range map[string]string{
		"oci:/a/b":                  "oci:/a/b",
		"oci:/a/b:v1":               "oci:/a/b:v1",
		"oci:/a:b/c":                "oci:/a:b/c",
		"oci:/a:b/c:v1":             "oci:/a:b/c:v1",
		"oci:/a:b/":                 "oci:/a:b/",
		"oci:rel:v1":                "oci:" + filepath.Join(wd, "rel") + ":v1",
		"docker://localhost:5000/x": "docker://localhost:5000/x:latest",
		"docker://debian":           "docker://index.docker.io/library/debian:latest",
	} {
		r, err := ParseReference(in)
		if err != nil || r.String() != want {
			t.Errorf("%q: %q, %v, want %q", in, r, err, want)
			continue
		}
		if again, err := ParseReference(r.String()); err != nil || again.String() != want {
			t.Errorf("%q parsed again: %q, %v", r, again, err)
		}
	}
	for _, in := range []string{"", "oci", "oci:", "oci::v1", "oci:/a:", "oci:/a:b c", "docker:x", "docker://", "docker://UPPER/x", "docker://x:y:z", "dir:/a", "/a"} {
		if r, err := ParseReference(in); err == nil {
			t.Errorf("%q gives %q", in, r)
		}
	}
}

func TestLayoutTagsAreFoundAndOthersNamed(t *testing.T) {
	dir := t.TempDir()
	index := `{"manifests":[{"size":1,"annotations":{"org.opencontainers.image.ref.name":"a"}},{"size":2,"annotations":{"org.opencontainers.image.ref.name":"b"}},{"size":3,"annotations":{"org.opencontainers.image.ref.name":"b"}}]}`
	if err := os.WriteFile(filepath.Join(dir, "index.json"), []byte(index), 0o600); err != nil {
		t.Fatal(err)
	}
	for tag, want := range map[string]int{"a": 1, "b": 2, "c": 0, "": 0} {
		found, err := Open(Reference{Path: dir, Tag: tag}, source.Options{}).Find(t.Context())
		if len(found) != want || (err == nil) != (want > 0) {
			t.Errorf("tag %q: %+v, %v", tag, found, err)
		}
		if err != nil && (!errors.Is(err, ErrNotFound) || !source.IsPermanent(err) || !strings.Contains(err.Error(), `"a" "b" "b"`)) {
			t.Errorf("tag %q: %v", tag, err)
		}
	}
}

func FuzzReference(f *testing.F) {
	for _, s := range []string{"oci:/a:b/c:v1", "docker://localhost:5000/x@sha256:0", "oci:a:b/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseReference(s)
		if err != nil {
			return
		}
		if again, err := ParseReference(r.String()); err != nil || again.String() != r.String() {
			t.Errorf("%q gives %q, which gives %q, %v", s, r, again, err)
		}
	})
}

// Any manifest or index gives documents whose descriptors can be fetched, or a permanent error of ours.
func FuzzDocument(f *testing.F) {
	const d = `{"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2}`
	f.Add([]byte(`{"config":` + d + `,"layers":[` + d + `]}`))
	f.Add([]byte(`{"layers":[{"digest":"sha256:../x"}],"manifests":[{"platform":{"os":"linux"}},{}]}`))
	f.Fuzz(func(t *testing.T, p []byte) {
		if _, err := parseIndex(p); err != nil && (!errors.Is(err, ErrFormat) || !source.IsPermanent(err)) {
			t.Errorf("index: %v", err)
		}
		m, err := parseManifest(p)
		if err != nil {
			if !errors.Is(err, ErrFormat) || !source.IsPermanent(err) {
				t.Errorf("manifest: %v", err)
			}
			return
		}
		for _, d := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
			if hex := d.Digest.Encoded(); len(hex) != 64 || strings.Trim(hex, "0123456789abcdef") != "" || d.Size < 0 {
				t.Errorf("descriptor %+v", d)
			}
		}
	})
}
