package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/tests/link"
)

// An upgraded is what `holdfast upgrade --json` says.
type upgraded struct {
	PID   int           `json:"pid"`
	Pause time.Duration `json:"pause_ns"`
	Left  int           `json:"left"`
}

// upgrade puts another daemon in the place of this one.
func (h *testHost) upgrade(flags ...string) (u upgraded) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(h.must(append([]string{"upgrade", "--json"}, flags...)...)), &u); err != nil {
		h.t.Fatal(err)
	}
	return u
}

// readAll reads files 0 to n-1 of an image once each, side by side, and fails the test at a wrong byte or an error. It returns when all
// are read, having called meanwhile, again and again until then.
func (h *testHost) readAll(mnt string, m model, n int, meanwhile func()) {
	h.t.Helper()
	var wg sync.WaitGroup
	var left atomic.Int64
	left.Store(int64(n))
	for i := range n {
		wg.Go(func() {
			defer left.Add(-1)
			p := "f" + strconv.Itoa(i)
			got, err := readFile(filepath.Join(mnt, p))
			if err != nil || !bytes.Equal(got, m[p].content) {
				h.t.Errorf("%s: %v, %d bytes of %d, the first wrong one at %d", p, err, len(got), len(m[p].content), difference(got, m[p].content))
			}
		})
	}
	for left.Load() > 0 {
		meanwhile()
	}
	wg.Wait()
}

func TestUpgradesUnderReadersAreNotNoticed(t *testing.T) {
	h := newHost(t)
	const files = 8
	_, image, m := counted(t, h, link.Config{RTT: 30 * time.Millisecond, Rate: 2 << 20}, files)
	mnt := h.mount(image, "--prefetch=off")
	var pauses []time.Duration
	left := 0
	h.readAll(mnt, m, files, func() {
		u := h.upgrade()
		pauses = append(pauses, u.Pause)
		left += u.Left
	})
	if left == 0 {
		t.Errorf("%d upgrades with %d requests in flight while the image was read: too few to say anything", len(pauses), left)
	}
	slices.Sort(pauses)
	t.Logf("%d upgrades with %d requests in flight, pause %v in the middle, %v at most", len(pauses), left, pauses[len(pauses)/2], pauses[len(pauses)-1])
	dropCaches(t)
	m.compare(t, mnt)
	h.agreed()
}

// A daemon that finishes what it has in flight answers by number, and so does whoever has taken over: a third process that took the same
// requests over meanwhile would give their numbers to other readers, who would be answered for them (I2).
func TestUpgradeBeginsWhenTheDaemonBeforeHasEnded(t *testing.T) {
	h := newHost(t)
	const files = 8
	_, image, m := counted(t, h, link.Config{RTT: 500 * time.Millisecond}, files)
	mnt := h.mount(image, "--prefetch=off")
	seen := false // both at once
	for i := 0; i < files && !seen; i++ {
		name := "f" + strconv.Itoa(i)
		var wg sync.WaitGroup
		wg.Go(func() {
			if got, err := readFile(filepath.Join(mnt, name)); err != nil || !bytes.Equal(got, m[name].content) {
				t.Errorf("%s: %v, %d bytes of %d", name, err, len(got), len(m[name].content))
			}
		})
		h.until("the reader waits", func() bool { s, err := h.Status(); return err == nil && s.Pending > 0 })
		first := h.pid()
		wg.Go(func() {
			if out, err := h.Run("upgrade"); err != nil {
				t.Errorf("the first upgrade: %v: %s", err, out)
			}
		})
		h.until("another daemon answers", func() bool { s, err := h.Status(); return err == nil && s.PID != first })
		seen = runs(first)
		h.upgrade()
		if runs(first) {
			t.Error("the second upgrade is done, and the first daemon still runs")
		}
		wg.Wait()
	}
	if !seen {
		t.Error("no daemon outlived the beginning of its successor: nothing was shown")
	}
	dropCaches(t)
	m.compare(t, mnt)
}

// runs says whether a process is there and has not ended.
func runs(pid int) bool {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	return err == nil && !strings.Contains(string(b), ") Z ")
}

// agreed waits until records, supervisor and kernel agree: what is in flight may be on record a moment longer.
func (h *testHost) agreed() {
	h.t.Helper()
	var out string
	h.until("holdfast state check finds nothing", func() bool {
		var err error
		out, err = h.Run("state", "check")
		return err == nil
	})
	if out != "" {
		h.t.Errorf("holdfast state check ended well and said %s", out)
	}
}

func TestKilledSuccessorIsSupervised(t *testing.T) {
	h := newHost(t)
	_, image, m := counted(t, h, link.Config{}, 3)
	mnt := h.mount(image, "--prefetch=off")
	for i := range 3 {
		u := h.upgrade()
		if got := h.pid(); got != u.PID {
			t.Fatalf("process %d serves, want the successor, %d", got, u.PID)
		}
		h.kill()
		p := "f" + strconv.Itoa(i)
		if got, err := readFile(filepath.Join(mnt, p)); err != nil || !bytes.Equal(got, m[p].content) {
			t.Errorf("%s after the successor was killed: %v, or wrong bytes", p, err)
		}
	}
	h.agreed()
}

func TestUpgradeThatFailsLeavesTheOldDaemonServing(t *testing.T) {
	h := newHost(t)
	_, image, m := counted(t, h, link.Config{}, 4)
	mnt := h.mount(image, "--prefetch=off")
	old := h.pid()
	script := func(name, text string) string {
		path := filepath.Join(h.Dir, name)
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for i, tt := range []struct{ name, binary, says string }{
		{"not there", filepath.Join(h.Dir, "nothing"), "no such file"},
		{"not a program", filepath.Join(mnt, "f0"), "f0"},
		{"ends at once", script("ends", "exit 3"), "before it dialled"},
		{"of another root", script("other", "exec "+bin+" --root "+filepath.Join(h.Dir, "elsewhere")+" --run "+filepath.Join(h.Dir, "run")+" serve"), "was started for"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, err := h.Run("upgrade", "--binary", tt.binary)
			if err == nil || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), "serves on") {
				t.Errorf("upgrade: %v, %s; want an error about %q, and that the old one serves on", err, out, tt.says)
			}
			began := time.Now()
			if got := h.pid(); got != old {
				t.Errorf("process %d serves, want %d", got, old)
			}
			p := "f" + strconv.Itoa(i)
			if got, err := readFile(filepath.Join(mnt, p)); err != nil || !bytes.Equal(got, m[p].content) {
				t.Errorf("%s: %v, or wrong bytes", p, err)
			}
			t.Logf("status and a miss took %v after the failure", time.Since(began))
		})
	}
	h.upgrade()
	h.agreed()
}

func TestUnmountedAfterAnUpgradeNothingIsLeft(t *testing.T) {
	h := newHost(t)
	_, image, _ := counted(t, h, link.Config{}, 1)
	mnt := h.mount(image, "--prefetch=off")
	h.upgrade()
	h.must("umount", mnt)
	h.upgrade()
	again := h.mount(image, "--prefetch=on")
	if err := h.WaitComplete(again); err != nil {
		t.Fatal(err)
	}
	h.upgrade()
	h.agreed()
	h.must("umount", again)
	h.agreed()
	// newHost's cleanup sees that the keeper ends: nothing is held any more.
}

func TestDaemonThatLostItsLifelineLetsNobodyReadZeros(t *testing.T) {
	h := newHost(t)
	_, image, m := counted(t, h, link.Config{}, 2)
	mnt := h.mount(image, "--prefetch=off")
	open, err := os.Open(filepath.Join(mnt, "f1"))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if got, err := readFile(filepath.Join(mnt, "f0")); err != nil || !bytes.Equal(got, m["f0"].content) {
		t.Fatalf("f0: %v, or wrong bytes", err)
	}
	daemon := h.pid()
	if err := errors.Join(h.KillKeeper(), unix.Kill(daemon, unix.SIGKILL)); err != nil {
		t.Fatal(err)
	}
	h.until("the daemon is gone", func() bool { return unix.Kill(daemon, 0) != nil })
	if err := h.Restart("--engine", engineFlag()); err != nil {
		t.Fatal(err)
	}
	if n := len(h.Mounts()); n != 0 {
		t.Errorf("%d images are still mounted", n)
	}
	b := make([]byte, 64<<10)
	if n, err := open.ReadAt(b, 0); err == nil || n > 0 && !bytes.Equal(b[:n], m["f1"].content[:n]) {
		t.Errorf("a reader from before read %d bytes, %v; want an error, and none that is wrong", n, err)
	}
	out := h.must("status")
	if !strings.Contains(out, "lost") || !strings.Contains(out, mnt) {
		t.Errorf("holdfast status does not say what was lost:\n%s", out)
	}
	// With cachefiles the reader keeps the dead cache's object, which no new mount of the blob can do without.
	if err := open.Close(); err != nil {
		t.Fatal(err)
	}
	h.until("the image can be mounted again", func() bool {
		dir, err := os.MkdirTemp(h.Dir, "mnt-")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.Run("mount", "--prefetch=off", image, dir); err != nil {
			t.Log(err)
			return false
		}
		m.compare(t, dir)
		return true
	})
}
