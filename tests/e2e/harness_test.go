package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"holdfast/tests/host"
)

// bin is the holdfast binary under test.
var bin string

func TestMain(m *testing.M) {
	if os.Getenv(readElsewhere) != "" {
		serveElsewhere()
		os.Exit(0)
	}
	os.Exit(func() int {
		if bin = os.Getenv("HOLDFAST_BIN"); bin == "" {
			dir, err := os.MkdirTemp("", "holdfast-e2e-")
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			defer os.RemoveAll(dir)
			bin = filepath.Join(dir, "holdfast")
			cmd := exec.Command("go", "build", "-o", bin, "holdfast/cmd/holdfast")
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := cmd.CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "build holdfast: %v: %s\n", err, out)
				return 1
			}
		}
		return m.Run()
	}())
}

// testHost is a host whose failures end the test.
type testHost struct {
	*host.Host
	t *testing.T
}

// workDir makes a directory for a host, which is removed when the test ends, and says which engine to use. It skips where the
// kernel offers no engine, which `holdfast doctor` has to prove by trying; with HOLDFAST_ENGINE set there is no skipping.
func workDir(t *testing.T) (dir, engine string) {
	t.Helper()
	dir, err := host.WorkDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	if engine = engineFlag(); engine == "auto" {
		if os.Geteuid() != 0 {
			t.Skip("mounting needs root, and this is not root")
		}
		if err := host.Doctor(bin, dir); err != nil {
			t.Skipf("this kernel offers no engine, as holdfast doctor found by trying: %v", err)
		}
	}
	return dir, engine
}

// engineFlag is the engine that tests ask for.
func engineFlag() string {
	if e := os.Getenv("HOLDFAST_ENGINE"); e != "" {
		return e
	}
	return "auto"
}

// newHost starts a keeper and a daemon with more flags for serve, and stops them when the test ends.
func newHost(t *testing.T, serve ...string) *testHost {
	t.Helper()
	dir, engine := workDir(t)
	return startHost(t, bin, dir, append([]string{"--engine", engine}, serve...)...)
}

// startHost is newHost with a program and a directory of the caller's.
func startHost(t *testing.T, bin, dir string, serve ...string) *testHost {
	t.Helper()
	return startHostWith(t, host.Options{Bin: bin, Dir: dir, Serve: serve})
}

// startHostWith is startHost with more to say.
func startHostWith(t *testing.T, o host.Options) *testHost {
	t.Helper()
	h, err := host.StartWith(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Stop(); err != nil {
			t.Errorf("stop: %v", err)
		}
		if t.Failed() {
			t.Logf("the daemon's log:\n%s", h.Log())
		}
	})
	return &testHost{h, t}
}

func (h *testHost) must(args ...string) string {
	h.t.Helper()
	out, err := h.Run(args...)
	if err != nil {
		h.t.Fatalf("%v\nthe daemon's log:\n%s", err, h.Log())
	}
	return out
}

// mount mounts image on a new directory and returns it.
func (h *testHost) mount(image string, flags ...string) string {
	h.t.Helper()
	dir, err := os.MkdirTemp(h.Dir, "mnt-")
	if err != nil {
		h.t.Fatal(err)
	}
	h.must(append(append([]string{"mount"}, flags...), image, dir)...)
	return dir
}

// dropCaches makes the kernel ask for data again.
func dropCaches(t *testing.T) {
	t.Helper()
	if err := host.DropCaches(); err != nil {
		t.Fatal(err)
	}
}
