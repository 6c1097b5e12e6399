package mutant

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func program(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":  "module m\n\ngo 1.26\n",
		"main.go": "package main\n\nfunc main() { println(first, second()) }\n\nconst first = 1\n",
		"b/b.go":  "package b\n\nconst X = 2\n\nvar Y = 2\n",
		"c.go":    "package main\n\nimport \"m/b\"\n\nfunc second() int { return b.X }\n",
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestBuildHasTheMutationAndTheSourceHasNot(t *testing.T) {
	root := program(t)
	m := Mutation{"m", []Edit{
		{"main.go", "const first = 1", "const first = 10"}, {"b/b.go", "const X = 2", "const X = 20"}, {"main.go", "first = 10", "first = 11"},
	}}
	overlay, err := m.Overlay(root, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for want, args := range map[string][]string{"11 20\n": {"-overlay", overlay}, "1 2\n": nil} {
		cmd := exec.Command("go", append(append([]string{"run"}, args...), ".")...)
		cmd.Dir = root
		if out, err := cmd.CombinedOutput(); err != nil || string(out) != want {
			t.Errorf("go run %v: %q, %v, want %q", args, out, err, want)
		}
	}
}

func TestMutationOfWhatIsNotThereOnceIsAnError(t *testing.T) {
	root := program(t)
	for _, e := range []Edit{{"b/b.go", "= 2", "= 3"}, {"b/b.go", "const Z", ""}, {"missing.go", "x", "y"}} {
		if _, err := (Mutation{"gone", []Edit{e}}).Overlay(root, t.TempDir()); err == nil || !strings.Contains(err.Error(), "gone") || !strings.Contains(err.Error(), e.File) {
			t.Errorf("%+v: %v", e, err)
		}
	}
}
