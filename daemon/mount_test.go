package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/fanotify"
	"holdfast/rafs/convert"
)

// needFanotify skips a test where the kernel was seen to lack what the fanotify engine needs, and fails it where
// anything else is missing.
func needFanotify(t testing.TB, dir string) {
	t.Helper()
	err := fanotify.Available(dir)
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOTBLK):
		t.Skipf("this kernel lacks the fanotify engine's feature: %v", err)
	case err != nil:
		t.Fatal(err)
	}
}

// A host is a daemon with its API on the fanotify engine and the running kernel. The lifeline outlives the daemon, as it does
// with a supervisor.
type host struct {
	t        *testing.T
	root     string
	client   *Client
	lifeline *os.File
	stop     func() error
	d        *Daemon
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, root: t.TempDir()}
	needFanotify(t, h.root)
	h.client = NewClient(filepath.Join(h.root, "run", "api.sock"))
	t.Cleanup(h.client.Close)
	t.Cleanup(func() {
		if h.lifeline != nil {
			h.lifeline.Close()
		}
	})
	h.start(nil)
	t.Cleanup(func() {
		if err := h.stop(); err != nil {
			t.Error(err)
		}
	})
	return h
}

// start starts a daemon: the first, or a successor.
func (h *host) start(change func(*Options)) {
	h.t.Helper()
	var group *os.File
	if h.lifeline != nil {
		group = dup(h.t, h.lifeline)
	}
	log := zaptest.NewLogger(h.t, zaptest.Level(zap.WarnLevel))
	cache := filepath.Join(h.root, "cache")
	if err := os.MkdirAll(cache, 0o700); err != nil {
		h.t.Fatal(err)
	}
	e, err := fanotify.Open(fanotify.Config{Dir: cache, Inherited: fscache.Inherited{Lifeline: group}, Log: log})
	if err != nil {
		h.t.Fatal(err)
	}
	if h.lifeline == nil {
		_, f := e.Lifeline()
		h.lifeline = dup(h.t, f)
	}
	ready := make(chan struct{})
	o := Options{Engine: e, Log: log, Release: "test", Root: h.root, Socket: h.client.socket, Ready: func() { close(ready) }}
	if change != nil {
		change(&o)
	}
	h.d, err = New(o)
	if err != nil {
		h.t.Fatal(errors.Join(err, e.Close()))
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.d.Run(ctx) }()
	h.stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	select {
	case <-ready:
	case err := <-done:
		h.t.Fatal(err)
	}
}

func dup(t *testing.T, f *os.File) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), f.Name())
}

// mountPoint makes a directory and sees to it that nothing is left mounted on it.
func (h *host) mountPoint(name string) string {
	h.t.Helper()
	dir := filepath.Join(h.root, "mnt", name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		for unix.Unmount(dir, unix.MNT_DETACH) == nil {
		}
	})
	return dir
}

// makeTree fills a directory with files of many sizes and returns what is in them.
func makeTree(t testing.TB, seed uint64) (dir string, files map[string][]byte) {
	t.Helper()
	dir, files = t.TempDir(), map[string][]byte{}
	rng := rand.New(rand.NewPCG(seed, 2))
	for i, n := range []int{0, 1, 100, 4095, 4096, 4097, 70_000, 1 << 20, 1<<20 + 1, 3_500_000, 9_000_000} {
		p := make([]byte, n)
		for k := range p {
			p[k] = byte(rng.Uint32N(20))
		}
		name := fmt.Sprintf("d%d/f%d", i%3, i)
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755), os.WriteFile(filepath.Join(dir, name), p, 0o644)); err != nil {
			t.Fatal(err)
		}
		files[name] = p
	}
	return dir, files
}

// makeImage converts a tree and returns the image's reference.
func makeImage(t testing.TB, tree string, o convert.Options) string {
	t.Helper()
	o.Source, o.Dest = "dir:"+tree, "oci:"+t.TempDir()+":test"
	if _, err := convert.Run(context.Background(), o); err != nil {
		t.Fatal(err)
	}
	return o.Dest
}

// compare reads every file of a mounted image, several at a time.
func compare(t *testing.T, dir string, files map[string][]byte) {
	t.Helper()
	var wg sync.WaitGroup
	for name, want := range files {
		for range 2 {
			wg.Go(func() {
				got, err := os.ReadFile(filepath.Join(dir, name))
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %v, or %d bytes that differ", name, err, len(got))
				}
			})
		}
	}
	wg.Wait()
}

func dropCaches(t *testing.T) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
}

func TestRealMountShowsTheTree(t *testing.T) {
	h := newHost(t)
	tree, files := makeTree(t, 1)
	ref := makeImage(t, tree, convert.Options{})
	dir := h.mountPoint("a")
	m, err := h.client.Mount(t.Context(), MountRequest{Image: ref, Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	compare(t, dir, files)
	found := 0
	if err := filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			found++
		}
		return err
	}); err != nil || found != len(files) {
		t.Errorf("%d files in the mount, want %d (%v)", found, len(files), err)
	}
	s, err := h.client.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if s.Mounts != 1 || s.Fetched == 0 || s.Served == 0 || s.Mismatches != 0 || s.Refused != 0 || len(s.Sources) == 0 {
		t.Errorf("status %+v", s)
	}
	images, err := h.client.Images(t.Context())
	if err != nil || len(images) != 1 || images[0].Digest != m.Image || len(images[0].Mounts) != 1 || images[0].Present == 0 {
		t.Errorf("images %+v, %v", images, err)
	}
	f, err := os.Open(filepath.Join(dir, "d0/f0"))
	if err != nil {
		t.Fatal(err)
	}
	wantCode(t, h.client.Umount(t.Context(), dir), CodeConflict, "open")
	f.Close()
	if err := h.client.Umount(t.Context(), dir); err != nil {
		t.Error(err)
	}
	wantCode(t, h.client.Umount(t.Context(), dir), CodeNotFound, dir)
	if !h.d.mounts.empty() || len(h.d.objects.all()) != 0 {
		t.Error("something is left of the mount")
	}
}

func TestDaemonRestartKeepsMountsAndWhatIsCached(t *testing.T) {
	h := newHost(t)
	tree, files := makeTree(t, 3)
	ref := makeImage(t, tree, convert.Options{ChunkSize: 64 << 10})
	dir, gone := h.mountPoint("a"), h.mountPoint("gone")
	for _, d := range []string{dir, gone} {
		if _, err := h.client.Mount(t.Context(), MountRequest{Image: ref, Dir: d}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.ReadFile(filepath.Join(dir, "d1/f10")); err != nil {
		t.Fatal(err)
	}
	if err := h.stop(); err != nil {
		t.Fatal(err)
	}
	before := h.present()
	if err := unix.Unmount(gone, 0); err != nil {
		t.Fatal(err)
	}
	dropCaches(t)
	h.start(nil)
	if after := h.present(); after != before || after == 0 {
		t.Errorf("%d bytes present after the restart, %d before", after, before)
	}
	compare(t, dir, files)
	list, err := h.client.Mounts(t.Context())
	if err != nil || len(list) != 1 || list[0].Dir != dir || list[0].Broken != "" {
		t.Errorf("mounts after the restart: %+v, %v", list, err)
	}
	if err := h.client.Umount(t.Context(), dir); err != nil {
		t.Error(err)
	}
	if !h.d.mounts.empty() {
		t.Error("the mount that was taken over lingers")
	}
}

// present is how many bytes all objects have.
func (h *host) present() (n int64) {
	for _, o := range h.d.objects.all() {
		present, _ := o.presentBytes()
		n += present
	}
	return n
}

func TestSameImageMountedTwiceSharesItsBlobsInADomainOnly(t *testing.T) {
	h := newHost(t)
	tree, files := makeTree(t, 4)
	ref := makeImage(t, tree, convert.Options{})
	a, b, c := h.mountPoint("a"), h.mountPoint("b"), h.mountPoint("c")
	for _, r := range []MountRequest{{Image: ref, Dir: a}, {Image: ref, Dir: b}, {Image: ref, Dir: c, Domain: "other"}} {
		if _, err := h.client.Mount(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	compare(t, a, files)
	first := h.fetched()
	compare(t, b, files)
	if n := h.fetched(); n != first {
		t.Errorf("the second mount fetched %d bytes", n-first)
	}
	compare(t, c, files)
	if n := h.fetched(); n != 2*first {
		t.Errorf("another domain's mount fetched %d bytes, want %d", n-first, first)
	}
	if err := h.client.Umount(t.Context(), a); err != nil {
		t.Error(err)
	}
	dropCaches(t)
	compare(t, b, files)
	for _, dir := range []string{b, c} {
		if err := h.client.Umount(t.Context(), dir); err != nil {
			t.Error(err)
		}
	}
}

func (h *host) fetched() int64 {
	h.t.Helper()
	s, err := h.client.Status(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	return s.Fetched
}

func TestPrefetchCompletesAnImageThatThenNeedsNoDaemon(t *testing.T) {
	h := newHost(t)
	tree, files := makeTree(t, 5)
	ref := makeImage(t, tree, convert.Options{})
	dir := h.mountPoint("a")
	on := true
	if _, err := h.client.Mount(t.Context(), MountRequest{Image: ref, Dir: dir, Prefetch: &on}); err != nil {
		t.Fatal(err)
	}
	h.d.mounts.list()[0].prefetch.wg.Wait()
	h.d.background.Wait()
	if list, err := h.client.Mounts(t.Context()); err != nil || len(list) != 1 || !list[0].Complete {
		t.Errorf("after the prefetch: %+v, %v", list, err)
	}
	if err := h.stop(); err != nil {
		t.Fatal(err)
	}
	compare(t, dir, files)
	if err := unix.Unmount(dir, 0); err != nil {
		t.Error(err)
	}
}

func TestImageOfAnotherBuilderIsServedToTheByte(t *testing.T) {
	dir, err := filepath.Abs("../../shared/fixtures/nydus")
	if err != nil {
		t.Fatal(err)
	}
	const id = "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef"
	want, err := os.ReadFile(filepath.Join(dir, "decoded", id+".decoded"))
	if errors.Is(err, fs.ErrNotExist) {
		t.Skipf("the fixtures are not there: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	h := newHost(t)
	mnt, on := h.mountPoint("a"), true
	if _, err := h.client.Mount(t.Context(), MountRequest{Image: "rafs:" + dir + "/rafs-v6/rafs-v6-2.2.boot", Dir: mnt, Prefetch: &on}); err != nil {
		t.Fatal(err)
	}
	h.d.mounts.list()[0].prefetch.wg.Wait()
	o := h.d.objects.get(fscache.Key{Domain: LocalDomain, ID: id})
	got := make([]byte, o.size())
	if err := h.d.engine.ReadAt(o.key, got, 0); err != nil {
		t.Fatal(err)
	}
	if n := min(len(got), len(want)); !bytes.Equal(got[:n], want[:n]) || len(got) < len(want) {
		t.Errorf("the cache object (%d bytes) is not the decoded blob (%d bytes)", len(got), len(want))
	}
	files := 0
	err = filepath.WalkDir(mnt, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			files++
			_, err = os.ReadFile(path)
		}
		return err
	})
	if err != nil || files == 0 {
		t.Errorf("%d files read, %v", files, err)
	}
	if err := h.client.Umount(t.Context(), mnt); err != nil {
		t.Error(err)
	}
}

// wantCode checks an error of the API: its code, and that it says text and, where there is something to do, what.
func wantCode(t *testing.T, err error, code, text string) {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) || e.Code != code || !strings.Contains(e.Error(), text) {
		t.Errorf("error %v, want code %s and %q in it", err, code, text)
	}
}
