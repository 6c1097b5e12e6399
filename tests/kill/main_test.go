package kill

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"holdfast/tests/host"
	"holdfast/tests/killer"
	"holdfast/tests/link"
	"holdfast/tests/load"
	"holdfast/tests/registry"
)

// seed is that of everything random here.
var seed = uint64(time.Now().UnixNano()) % 1_000_000

// image is what the readers of a case read: enough that a case does not run out of pages that nobody has read.
var image = load.Image{Layers: 3, Files: 8, Size: 64 << 10}

// self is this binary, which is also the tracer.
var self string

// scratch holds what all cases share: binaries and images. The directory is removed at the end.
var scratch string

func TestMain(m *testing.M) {
	killer.Role()
	os.Exit(func() int {
		if s := os.Getenv("HOLDFAST_SEED"); s != "" {
			var err error
			if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
				fmt.Fprintln(os.Stderr, "HOLDFAST_SEED:", err)
				return 2
			}
		}
		var err error
		if self, err = os.Executable(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		if scratch, err = host.WorkDir(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(scratch)
		return m.Run()
	}())
}

// root is the source tree: tests run in their package's directory.
func root() string { return filepath.Join("..", "..") }

// binary is the holdfast that the environment names, or one that is built with the tags.
func binary(t *testing.T, variable, tags string) string {
	t.Helper()
	if bin := os.Getenv(variable); bin != "" {
		return bin
	}
	bin, err := built(tags)
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

var builds sync.Map // by tags: func() (string, error)

func built(tags string) (string, error) {
	once, _ := builds.LoadOrStore(tags, sync.OnceValues(func() (string, error) {
		return build(filepath.Join(scratch, "holdfast-"+tags), "-tags="+tags)
	}))
	return once.(func() (string, error))()
}

// build builds holdfast at path with more arguments for go build.
func build(path string, args ...string) (string, error) {
	cmd := exec.Command("go", append(append([]string{"build", "-o", path}, args...), "holdfast/cmd/holdfast")...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build holdfast: %w: %s", err, out)
	}
	return path, nil
}

func pointsBinary(t *testing.T) string { return binary(t, "HOLDFAST_BIN_POINTS", "crashpoints") }
func plainBinary(t *testing.T) string  { return binary(t, "HOLDFAST_BIN", "") }

var layouts sync.Map // by load.Image: func() (string, error)

// A source is an image, and where it is.
type source struct {
	ref string
	load.Image
}

// layout is an OCI layout with an image, made once.
func layout(t *testing.T, i load.Image) source {
	t.Helper()
	ref := "oci:" + filepath.Join(scratch, fmt.Sprintf("layout-%s-%d-%d-%d", i.Name, i.Layers, i.Files, i.Size)) + ":image"
	once, _ := layouts.LoadOrStore(i, sync.OnceValue(func() error { return i.Convert(context.Background(), ref) }))
	if err := once.(func() error)(); err != nil {
		t.Fatal(err)
	}
	return source{ref, i}
}

var slowOnce = sync.OnceValues(func() (*registry.Registry, error) {
	return registry.Start(filepath.Join(scratch, "registry"))
})

// slow is an image, of another name than the one given, in a registry across a link with a round-trip time, for requests that are in flight for as long. The
// registry and its links live as long as this process.
func slow(t *testing.T, i load.Image, rtt time.Duration) source {
	t.Helper()
	i.Name = "slow"
	reg, err := slowOnce()
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("/image:%d-%d-%d", i.Layers, i.Files, i.Size)
	if err := i.Convert(t.Context(), "docker://"+reg.Addr()+name); err != nil {
		t.Fatal(err)
	}
	l, err := link.Start(reg.Addr(), link.Config{RTT: rtt})
	if err != nil {
		t.Fatal(err)
	}
	return source{"docker://" + l.Addr() + name, i}
}

// random gives the random numbers of one purpose.
func random(purpose string) *rand.Rand {
	var n uint64
	for _, c := range purpose {
		n = n*31 + uint64(c)
	}
	return rand.New(rand.NewPCG(seed, n))
}

// full says whether everything is to be run rather than a sample.
func full() bool { return os.Getenv("HOLDFAST_DRILL") == "full" }

// inVM says whether this is the test machine, where everything takes long.
func inVM() bool { return os.Getenv("HOLDFAST_VM") != "" }

// patience bounds every wait for the daemon or the keeper, and the waits of readers (O3).
func patience() time.Duration {
	if inVM() {
		return 2 * time.Minute
	}
	return 15 * time.Second
}

// budget is how long a sampled drill may take.
func budget(t *testing.T, otherwise time.Duration) time.Duration {
	t.Helper()
	s := os.Getenv("HOLDFAST_BUDGET")
	if s == "" {
		return otherwise
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatalf("HOLDFAST_BUDGET: %v", err)
	}
	return d
}

// part is which part of the cases is to be run, of how many: the first is 1.
func part(t *testing.T) (part, parts int) {
	t.Helper()
	s := os.Getenv("HOLDFAST_PART")
	if s == "" {
		return 1, 1
	}
	if n, err := fmt.Sscanf(s, "%d/%d", &part, &parts); n != 2 || err != nil || part < 1 || part > parts {
		t.Fatalf("HOLDFAST_PART=%q: want 1/2, for example", s)
	}
	return part, parts
}

// number is a number in the environment.
func number(t *testing.T, variable string, otherwise int) int {
	t.Helper()
	s := os.Getenv(variable)
	if s == "" {
		return otherwise
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return n
}

// engine is what serve is told; it skips where none works, which `holdfast doctor` has to prove by trying.
func engine(t *testing.T, bin string) string {
	t.Helper()
	if e := os.Getenv("HOLDFAST_ENGINE"); e != "" {
		return e
	}
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root, and this is not root")
	}
	if err := host.Doctor(bin, scratch); err != nil {
		t.Skipf("this kernel offers no engine, as holdfast doctor found by trying: %v", err)
	}
	return "auto"
}
