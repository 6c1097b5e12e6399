package points

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func write(t *testing.T, root, name, text string) {
	t.Helper()
	path := filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestEveryPointOfTheProductIsListedWithItsPlaces(t *testing.T) {
	root := t.TempDir()
	write(t, root, "a/a.go", "package a\nfunc f() {\n\tcrash.Point(\"a.f.before-x\")\n\tif true { go func() { crash.Point(`a.f.after-x`) }() }\n}\n")
	write(t, root, "a/b/b.go", "//go:build never\n\npackage b\nvar _ = func() { crash.Point(\"a.f.before-x\"); other.Point(\"x\"); Point(\"y\") }\n")
	for _, elsewhere := range []string{"a/a_test.go", "a/testdata/x.go", "tests/t.go", ".git/x.go"} {
		write(t, root, elsewhere, "package x\nfunc f() { crash.Point(\"x.y.z\") }\n")
	}
	list, err := List(root)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range list {
		got = append(got, p.Name+" "+strings.Join(p.Places, " "))
	}
	want := "a.f.after-x a/a.go:4\na.f.before-x a/a.go:3 a/b/b.go:4"
	if s := strings.Join(got, "\n"); s != want {
		t.Errorf("got\n%s\nwant\n%s", s, want)
	}
}

func TestPointThatCannotBeNamedFromOutsideIsAnError(t *testing.T) {
	for _, call := range []string{`crash.Point(name)`, `crash.Point("a.b." + "c")`, `crash.Point("a:b.c.d")`, `crash.Point("short")`, `crash.Point()`} {
		root := t.TempDir()
		write(t, root, "a.go", "package a\nfunc f() {\n\t"+call+"\n}\n")
		if list, err := List(root); err == nil || !strings.Contains(err.Error(), "a.go:3") {
			t.Errorf("%s: %v, %v", call, list, err)
		}
	}
}
