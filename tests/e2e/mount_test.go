package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/tests/link"
	"holdfast/tests/registry"
)

// seeds are the random trees of a run: HOLDFAST_SEED replays one.
func seeds(t *testing.T, n int) []uint64 {
	t.Helper()
	if s := os.Getenv("HOLDFAST_SEED"); s != "" {
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("HOLDFAST_SEED: %v", err)
		}
		return []uint64{v}
	}
	base := uint64(time.Now().UnixNano())
	out := make([]uint64, n)
	for i := range out {
		out[i] = base + uint64(i)
	}
	return out
}

func TestRandomTreesShowTheSameThroughTheKernel(t *testing.T) {
	h := newHost(t)
	variants := [][]string{
		{},
		{"--compression", "lz4", "--digest", "sha256", "--chunk-size", "64KiB"},
		{"--compression", "none", "--chunk-size", "4KiB"},
		{"--chunk-size", "16MiB"},
	}
	for i, seed := range seeds(t, 8) {
		m := randomTree(seed)
		tarball := filepath.Join(h.Dir, "tree.tar")
		m.writeTar(t, tarball)
		image := "oci:" + filepath.Join(h.Dir, "image") + ":t" + strconv.FormatUint(seed, 10)
		h.must(append(append([]string{"convert"}, variants[i%len(variants)]...), "tar:"+tarball, image)...)
		h.must("check", image)
		dir := h.mount(image, "--prefetch=off")
		m.compare(t, dir)
		dropCaches(t)
		m.compare(t, dir) // from the cache files
		h.must("umount", dir)
		if t.Failed() {
			t.Fatalf("replay with HOLDFAST_SEED=%d go test -run %s ./tests/e2e (variant %d)", seed, t.Name(), i%len(variants))
		}
	}
}

func TestNydusImageIsServedByteForByte(t *testing.T) {
	fixtures := os.Getenv("HOLDFAST_FIXTURES")
	if fixtures == "" {
		fixtures = filepath.Join("..", "..", "..", "shared", "fixtures")
	}
	dir := filepath.Join(fixtures, "nydus")
	oracle, err := os.ReadFile(filepath.Join(dir, "decoded", "rafs-v6-2.2.json"))
	if err != nil {
		t.Skipf("no fixtures beside the repository: %v", err)
	}
	var want struct {
		Files []struct {
			Path, Type, Sha256 string
			Size, Mtime        int64
		}
	}
	if err := json.Unmarshal(oracle, &want); err != nil {
		t.Fatal(err)
	}
	h := newHost(t)
	blobs := filepath.Join(dir, "rafs-v6")
	image := "rafs:" + filepath.Join(blobs, "rafs-v6-2.2.boot") + "," + blobs
	h.must("check", image)
	mnt := h.mount(image)
	files := 0
	for _, f := range want.Files {
		if f.Type != "reg" {
			continue
		}
		files++
		got, err := readFile(filepath.Join(mnt, f.Path))
		sum := sha256.Sum256(got)
		if err != nil || int64(len(got)) != f.Size || hex.EncodeToString(sum[:]) != f.Sha256 {
			t.Errorf("%s: %d bytes, %v, sha256 %x: want %d bytes, %s", f.Path, len(got), err, sum, f.Size, f.Sha256)
		}
	}
	if files == 0 {
		t.Error("the oracle names no file")
	}
}

// counted is a registry behind a link, with an image of n files of 1 MiB in it.
func counted(t *testing.T, h *testHost, cfg link.Config, n int) (l *link.Link, image string, m model) {
	t.Helper()
	reg, err := registry.Start(filepath.Join(h.Dir, "registry"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { reg.Close() })
	m = bigFiles(n)
	tarball := filepath.Join(h.Dir, "big.tar")
	m.writeTar(t, tarball)
	h.must("convert", "tar:"+tarball, "docker://"+reg.Addr()+"/big:1")
	if l, err = link.Start(reg.Addr(), cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, "docker://" + l.Addr() + "/big:1", m
}

func TestConcurrentReadersOfASlowRegistryFetchEachChunkOnce(t *testing.T) {
	h := newHost(t)
	const files, readers = 6, 16
	l, image, m := counted(t, h, link.Config{RTT: 20 * time.Millisecond, Rate: 8 << 20}, files)
	mnt := h.mount(image, "--prefetch=off")
	_, before := l.Bytes()
	var wg sync.WaitGroup
	for i := range readers {
		wg.Add(1)
		go func() { // ends when all files are read; waited for below
			defer wg.Done()
			for j := range files {
				p := "f" + strconv.Itoa((i+j)%files)
				got, err := readFile(filepath.Join(mnt, p))
				if err != nil || !bytes.Equal(got, m[p].content) {
					t.Errorf("reader %d, %s: %d bytes, %v, first difference at %d", i, p, len(got), err, difference(got, m[p].content))
				}
			}
		}()
	}
	wg.Wait()
	_, after := l.Bytes()
	// The content does not compress: each chunk is 1 MiB in the registry. Headers are the rest.
	if fetched, want := after-before, int64(files<<20); fetched < want || fetched > want+want/20 {
		t.Errorf("%d readers of %d bytes made the registry send %d", readers, want, fetched)
	}
}

func TestSlowImageDoesNotDelayAnother(t *testing.T) {
	f := newFaulty(t, 2)
	tarball := filepath.Join(f.Dir, "small.tar")
	randomTree(1).writeTar(t, tarball)
	fast := "oci:" + filepath.Join(f.Dir, "image") + ":small"
	f.must("convert", "tar:"+tarball, fast)
	slowDir, fastDir := f.mount(f.image, "--prefetch=off"), f.mount(fast, "--prefetch=off")

	release := make(chan struct{})
	f.fail("/blobs/", func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		select {
		case <-release:
			next.ServeHTTP(w, r)
		case <-r.Context().Done():
		}
	})
	const name = "f0"
	slowDone := make(chan error, 1)
	go func() { slowDone <- f.read(slowDir, name) }() // ends when the slow file is read; waited for below
	f.until("the slow image's source is asked", func() bool { return f.met.Load() > 0 })
	randomTree(1).compare(t, fastDir)
	if len(slowDone) > 0 {
		t.Error("the slow reader was done before its source answered")
	}
	close(release)
	if err := <-slowDone; err != nil {
		t.Error(err)
	}
}

func TestPrefetchCompletesAnImageThatThenNeedsNoSource(t *testing.T) {
	h := newHost(t)
	l, image, m := counted(t, h, link.Config{}, 4)
	mnt := h.mount(image)
	if err := h.WaitComplete(mnt); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	dropCaches(t)
	m.compare(t, mnt)
}

func TestUnreachableSourceGivesEIOAfterTheDeadlineAndTheNextReadTriesAgain(t *testing.T) {
	h := newHost(t, "--read-deadline", "2s")
	reg, err := registry.Start(filepath.Join(h.Dir, "registry"))
	if err != nil {
		t.Fatal(err)
	}
	addr := reg.Addr()
	m := bigFiles(1)
	tarball := filepath.Join(h.Dir, "big.tar")
	m.writeTar(t, tarball)
	h.must("convert", "tar:"+tarball, "docker://"+addr+"/big:1")
	mnt := h.mount("docker://"+addr+"/big:1", "--prefetch=off")
	if err := reg.Close(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if _, err := readFile(filepath.Join(mnt, "f0")); err == nil || !strings.Contains(err.Error(), "input/output error") {
		t.Errorf("read from an unreachable source: %v, want EIO", err)
	}
	if d := time.Since(start); d < 2*time.Second || d > 3*time.Second {
		t.Errorf("EIO after %v, with a read deadline of 2 s", d)
	}
	again, err := registry.StartAt(filepath.Join(h.Dir, "registry"), addr)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	got, err := readFile(filepath.Join(mnt, "f0"))
	if err != nil || !bytes.Equal(got, m["f0"].content) {
		t.Errorf("read after the source came back: %d bytes, %v", len(got), err)
	}
}

func TestSameImageOnTwoDirectoriesSharesItsBlobs(t *testing.T) {
	h := newHost(t)
	l, image, m := counted(t, h, link.Config{}, 3)
	one, two := h.mount(image, "--prefetch=off"), h.mount(image, "--prefetch=off")
	m.compare(t, one)
	_, before := l.Bytes()
	m.compare(t, two)
	if _, after := l.Bytes(); after-before > 64<<10 {
		t.Errorf("reading the second mount fetched %d bytes again", after-before)
	}
	h.must("umount", one)
	m.compare(t, two)
}

func TestMountRefusesWhatItCannotMount(t *testing.T) {
	h := newHost(t)
	tarball := filepath.Join(h.Dir, "small.tar")
	bigFiles(1).writeTar(t, tarball)
	layout := filepath.Join(h.Dir, "image")
	image := "oci:" + layout + ":small"
	h.must("convert", "tar:"+tarball, image)
	mnt := h.mount(image)
	file := filepath.Join(h.Dir, "a-file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(h.Dir, "empty")
	if err := os.Mkdir(empty, 0o755); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		args []string
		want string // in the error
	}{
		{"a mounted directory", []string{image, mnt}, mnt},
		{"a missing directory", []string{image, filepath.Join(h.Dir, "missing")}, "missing"},
		{"a file", []string{image, file}, "a-file"},
		{"a missing tag", []string{"oci:" + layout + ":none", empty}, "none"},
		{"a missing layout", []string{"oci:" + layout + "x:small", empty}, layout + "x"},
		{"an unknown kind of image", []string{"floppy:a", empty}, "floppy"},
		{"a domain with a slash", []string{"--domain", "a/b", image, empty}, "a/b"},
		{"a domain that climbs", []string{"--domain", "..", image, empty}, ".."},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := h.Run(append([]string{"mount"}, tt.args...)...)
			if err == nil {
				t.Fatal("mounted")
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("the error does not name %q: %v", tt.want, err)
			}
		})
	}
	bigFiles(1).compare(t, mnt)
}
