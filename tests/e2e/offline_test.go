package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/daemon"
	"holdfast/fscache/plain"
	"holdfast/state"
	"holdfast/tests/link"
)

// killBoth kills keeper and daemon, and with them goes the last descriptor that the mounts of an engine depend on.
func (h *testHost) killBoth() {
	h.t.Helper()
	pid := h.pid()
	if err := errors.Join(h.KillKeeper(), unix.Kill(pid, unix.SIGKILL)); err != nil {
		h.t.Fatal(err)
	}
	h.until("the daemon is gone", func() bool { return unix.Kill(pid, 0) != nil })
}

// prefetched is what `prefetch --json` prints.
func (h *testHost) prefetched(args ...string) (p daemon.PrefetchInfo, err error) {
	h.t.Helper()
	out, err := h.Run(append([]string{"prefetch", "--json"}, args...)...)
	if e := json.Unmarshal([]byte(out), &p); e != nil {
		h.t.Fatalf("prefetch %v printed %q: %v, %v", args, out, e, err)
	}
	return p, err
}

func TestImageThatWasPrefetchedNeedsNoDaemonNoKeeperAndNoNetwork(t *testing.T) {
	h := newHost(t)
	l, image, m := counted(t, h, link.Config{}, 6)
	mnt := h.mount(image, "--prefetch=off")
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Add(1)
		go func() { // ends when the prefetch has; waited for below
			defer wg.Done()
			for {
				m.compare(t, mnt)
				select {
				case <-done:
					return
				default:
				}
			}
		}()
	}
	p, err := h.prefetched("--wait", mnt)
	if err != nil || !p.Done || p.Present != p.Size || p.Size < 6<<20 {
		t.Errorf("prefetch --wait: %+v, %v", p, err)
	}
	if h.engine() == "cachefiles" {
		h.kill() // the device must stay open: with its last descriptor gone the kernel gives EIO for what is there too
	} else {
		h.killBoth()
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	dropCaches(t)
	m.compare(t, mnt)
	close(done)
	wg.Wait()
	if h.unserved() {
		// The next daemon, which never had the lifeline, leaves such a mount as it is.
		if err := h.Restart("--engine", engineFlag()); err != nil {
			t.Fatal(err)
		}
	}
	dropCaches(t)
	m.compare(t, mnt)
	if s, err := h.Status(); err != nil || len(s.Mounts) != 1 || !s.Mounts[0].Complete {
		t.Errorf("afterwards: %+v, %v, want the mount, complete", s.Mounts, err)
	}
}

// unserved reports whether no daemon answers.
func (h *testHost) unserved() bool {
	_, err := h.Status()
	return err != nil
}

func TestPrefetchIsBegunOnceAskedForWhateverBecomesOfWhoAsked(t *testing.T) {
	f := newFaulty(t, 4)
	mnt := f.mount(f.image, "--prefetch=off")
	release := make(chan struct{})
	f.fail("/blobs/", func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		select {
		case <-release:
			next.ServeHTTP(w, r)
		case <-r.Context().Done():
		}
	})
	cmd := exec.Command(bin, "--root", filepath.Join(f.Dir, "root"), "--run", filepath.Join(f.Dir, "run"), "prefetch", "--wait", mnt)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f.until("the source is asked", func() bool { return f.met.Load() > 0 })
	if err := cmd.Process.Signal(unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil || !strings.Contains(stderr.String(), "the daemon goes on") {
		t.Errorf("interrupted: %v, %s", err, stderr.String())
	}
	f.kill() // nor does it take the daemon that was asked
	close(release)
	if err := f.WaitComplete(mnt); err != nil {
		t.Error(err)
	}
}

func TestPrefetchThatIsAskedForHasNoLimit(t *testing.T) {
	f := newFaulty(t, 4)
	mnt := f.mount(f.image, "--prefetch=on", "--prefetch-rate=1") // a byte a second
	if p, err := f.prefetched("--wait", f.image); err != nil || !p.Done {
		t.Errorf("%+v, %v", p, err)
	}
	if s, err := f.Status(); err != nil || len(s.Mounts) != 1 || s.Mounts[0].Dir != mnt || !s.Mounts[0].Complete {
		t.Errorf("%+v, %v", s.Mounts, err)
	}
}

func TestPrefetchThatCannotBeDoneFailsAndSaysWhy(t *testing.T) {
	f := newFaulty(t, 2)
	if _, err := f.Run("prefetch", f.image); err == nil || !strings.Contains(err.Error(), "mount it first") {
		t.Errorf("of an image that is not mounted: %v", err)
	}
	mnt := f.mount(f.image, "--prefetch=off")
	f.fail("/blobs/", func(w http.ResponseWriter, _ *http.Request, _ http.Handler) { w.WriteHeader(http.StatusNotFound) })
	p, err := f.prefetched("--wait", mnt)
	if err == nil || p.Done || !strings.Contains(p.Failed, "404") || !strings.Contains(err.Error(), "404") {
		t.Errorf("with a source that has not the blob: %+v, %v", p, err)
	}
	f.heal()
	if p, err := f.prefetched("--wait", mnt); err != nil || !p.Done || p.Failed != "" {
		t.Errorf("asked again, with a source that has: %+v, %v", p, err)
	}
}

// cacheFiles lists the files of the cache that hold blobs.
func (h *testHost) cacheFiles() (list []string) {
	h.t.Helper()
	err := filepath.WalkDir(filepath.Join(h.Dir, "root", "cache"), func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && len(d.Name()) >= 64 {
			list = append(list, p)
		}
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return list
}

// editMiddle changes the middle of a file.
func editMiddle(t *testing.T, path string, change func(f *os.File, at int64) error) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err == nil {
		err = change(f, fi.Size()/2&^4095)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func flip(f *os.File, at int64) error {
	p := make([]byte, 1)
	if _, err := f.ReadAt(p, at); err != nil {
		return err
	}
	p[0] ^= 1
	_, err := f.WriteAt(p, at)
	return err
}

func punch(f *os.File, at int64) error {
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, 4096)
}

// offlineImage is a host with a complete image in its cache, after a boot, and no daemon.
func offlineImage(t *testing.T) (b *bootable, image string, m model, mnt string) {
	t.Helper()
	b = newBootable(t)
	l, image, m := counted(t, b.testHost, link.Config{}, 4)
	mnt = b.mount(image, "--prefetch=off")
	if p, err := b.prefetched("--wait", mnt); err != nil || !p.Done {
		t.Fatalf("%+v, %v", p, err)
	}
	b.crash(mnt)
	b.newBoot(t, 2)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	dropCaches(t)
	// What ends a host expects one: a daemon, and the directory as it was.
	t.Cleanup(func() {
		if b.unserved() {
			b.restart("--remount", "no")
		}
	})
	return b, image, m, mnt
}

// engineOf is the engine whose cache there is, while no daemon runs.
func (b *bootable) engineOf() string {
	if _, err := os.Stat(filepath.Join(b.Dir, "root", "cache", "fanotify")); err == nil {
		return "fanotify"
	}
	return "cachefiles"
}

func TestCompleteImageIsMountedOfflineAfterABoot(t *testing.T) {
	b, image, m, mnt := offlineImage(t)
	vouched := "0 B checked by digest"
	if b.engineOf() == "cachefiles" {
		vouched = "4.0 MiB checked by digest"
	}
	if out := b.must("mount", "--offline", image, mnt); !strings.Contains(out, vouched) {
		t.Errorf("what was prefetched and synced before the boot: %s, want %s", out, vouched)
	}
	dropCaches(t)
	m.compare(t, b.path(mnt))
	b.must("umount", mnt)
	r, err := state.ReadState(filepath.Join(b.Dir, "root", "state.db"))
	if err != nil || slices.ContainsFunc(r.Mounts, func(m state.Mount) bool { return m.Stage == state.StageOffline }) {
		t.Errorf("on record after its unmounting: %+v, %v", r.Mounts, err)
	}
	// What has been touched since is checked by digest; what was checked is not checked again, in another boot neither. And the image
	// may be named by its digest.
	if err := os.Chmod(b.cacheFiles()[0], 0o400); err != nil {
		t.Fatal(err)
	}
	var out string
	for boot, want := range []string{" 4.0 MiB checked by digest", " 0 B checked by digest"} {
		b.newBoot(t, 3+boot)
		if out = b.must("mount", "--offline", image, mnt); !strings.Contains(out, want) {
			t.Errorf("in boot %d: %s, want%s", 3+boot, out, want)
		}
		b.must("umount", mnt)
	}
	b.must("mount", "--offline", strings.Fields(out)[1], mnt)
	m.compare(t, b.path(mnt))
	b.must("umount", mnt)
}

func TestOfflineMountRefusesHolesAndWrongBytes(t *testing.T) {
	b, image, m, mnt := offlineImage(t)
	b.must("mount", "--offline", image, mnt) // which vouches for the files until they are touched
	b.must("umount", mnt)
	refused := func(what, want string) {
		t.Helper()
		if _, err := b.Run("mount", "--offline", image, mnt); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want it refused with %q", what, err, want)
		}
	}
	file := b.cacheFiles()[0]
	editMiddle(t, file, flip)
	refused("a bit flipped", "0 are missing and 1048576 damaged")
	editMiddle(t, file, flip)
	b.must("mount", "--offline", image, mnt)
	m.compare(t, b.path(mnt))
	b.must("umount", mnt)
	editMiddle(t, file, punch)
	refused("a hole", "1048576 are missing and 0 damaged")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	refused("no file", "are missing")
}

func TestDaemonThatBeginsLeavesAnOfflineMountAlone(t *testing.T) {
	b, image, m, mnt := offlineImage(t)
	b.must("mount", "--offline", image, mnt)
	before := stamps(t, b.cacheFiles())
	b.restart("--remount", "no")
	if _, err := b.Run("mount", "--offline", image, mnt); err == nil {
		t.Error("mounted offline while a daemon runs")
	}
	if s := b.must("status"); !strings.Contains(s, "mounted without a daemon") {
		t.Errorf("status does not tell of it:\n%s", s)
	}
	b.kill()
	dropCaches(t)
	m.compare(t, b.path(mnt))
	if after := stamps(t, b.cacheFiles()); after != before {
		t.Errorf("cache files were touched:\n%s\nthey were\n%s", after, before)
	}
	b.must("umount", mnt)
	if s := b.must("status"); strings.Contains(s, "mounted without a daemon") {
		t.Errorf("after its unmounting status tells of it:\n%s", s)
	}
}

// stamps says which files these are, and when they were touched.
func stamps(t *testing.T, files []string) (all string) {
	t.Helper()
	for _, p := range files {
		f, err := plain.Open(p)
		if err != nil {
			t.Fatal(err)
		}
		s, err := f.Stamp()
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		all += p + ": " + s + "\n"
	}
	return all
}
