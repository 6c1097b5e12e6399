package image

import (
	"os"
	"path/filepath"
	"testing"

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
		"rafs:/a/boot":              "rafs:/a/boot,/a",
		"rafs:/a/boot,/blobs":       "rafs:/a/boot,/blobs",
		"rafs:/a,b/boot,/blobs":     "rafs:/a,b/boot,/blobs",
		"rafs:boot":                 "rafs:" + filepath.Join(wd, "boot") + "," + wd,
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
}

func TestBadReferencesListTheForms(t *testing.T) {
	for _, in := range []string{"", "oci", "oci:", "oci::v1", "oci:/a:", "oci:/a:b c", "docker:x", "docker://", "docker://UPPER/x", "docker://x:y:z", "rafs:", "rafs:,x", "rafs:x,", "dir:/a", "/a"} {
		_, err := ParseReference(in)
		contains(t, err, "oci:PATH[:TAG]", "docker://HOST/REPOSITORY[:TAG]", "rafs:BOOTSTRAP[,BLOBDIR]")
		if !source.IsPermanent(err) {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func FuzzReference(f *testing.F) {
	for _, s := range []string{"oci:/a:b/c:v1", "docker://localhost:5000/x@sha256:0", "rafs:a,b"} {
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
