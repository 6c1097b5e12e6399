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
		"oci:/a:b/c:v1":             "oci:/a:b/c:v1",
		"docker://localhost:5000/x": "docker://localhost:5000/x:latest",
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
	for _, in := range []string{"", "oci::v1", "docker://UPPER/x", "rafs:", "rafs:,x", "rafs:x,", "dir:/a", "/a"} {
		_, err := ParseReference(in)
		contains(t, err, "oci:PATH[:TAG]", "docker://HOST/REPOSITORY[:TAG]", "rafs:BOOTSTRAP[,BLOBDIR]")
		if !source.IsPermanent(err) {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func FuzzReference(f *testing.F) {
	for _, s := range []string{"oci:/a:b/c:v1", "rafs:a,b", "rafs:a,b,c"} {
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
