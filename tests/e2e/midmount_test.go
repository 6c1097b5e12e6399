package e2e

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/tests/link"
)

// helpers counts the processes of this machine that make a mount for a daemon.
func helpers(t *testing.T) (n int) {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lines {
		if b, err := os.ReadFile(l); err == nil && string(b) == "holdfast-mount\x00" {
			n++
		}
	}
	return n
}

// objects counts the cache objects that the daemon knows.
func (h *testHost) objects() int {
	h.t.Helper()
	var s struct {
		Objects []any `json:"objects"`
	}
	if err := json.Unmarshal([]byte(h.must("status", "--json")), &s); err != nil {
		h.t.Fatal(err)
	}
	return len(s.Objects)
}

func TestDaemonKilledInTheMiddleOfMountIsBackAndMounts(t *testing.T) {
	const kills = 20
	h := newHost(t)
	_, image, m := counted(t, h, link.Config{}, 1)
	h.must("umount", h.mount(image, "--prefetch=off")) // what is not cached by now takes longer, once
	began := time.Now()
	h.must("umount", h.mount(image, "--prefetch=off"))
	whole := time.Since(began)
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	mounted := 0
	for range kills {
		half, err := os.MkdirTemp(h.Dir, "half-")
		if err != nil {
			t.Fatal(err)
		}
		old := h.pid()
		done := make(chan error, 1)
		go func() { // ends with the command, whose daemon is killed
			_, err := h.Run("mount", "--prefetch=off", image, half)
			done <- err
		}()
		time.Sleep(time.Duration(random.Int64N(int64(whole)))) // when it dies, not what must have happened by then
		if err := unix.Kill(old, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		killed := time.Now()
		h.until("another daemon serves", func() bool {
			s, err := h.Status()
			return err == nil && s.PID != old
		})
		if took := time.Since(killed); took > 20*time.Second {
			t.Errorf("the next daemon served after %v", took)
		}
		<-done // whatever it says: the daemon may have died with the answer on its lips
		next := h.mount(image, "--prefetch=off")
		got, err := readFile(filepath.Join(next, "f0"))
		if err != nil || string(got) != string(m["f0"].content) {
			t.Errorf("the next mount: %v, or wrong bytes", err)
		}
		h.must("umount", next)
		// What was mounted when the daemon died is mounted, and the next one's.
		if slices.Contains(h.Mounts(), half) {
			mounted++
			h.must("umount", half)
		}
		if err := os.Remove(half); err != nil {
			t.Error(err)
		}
	}
	log, err := os.ReadFile(h.LogPath())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("seed %d: a mount takes %v; of %d, %d were mounted; %d times something was left of the daemon, and %d times it could not end",
		seed, whole, kills, mounted, bytes.Count(log, []byte("killed before it is started again")), bytes.Count(log, []byte("they never run again")))
	h.until("no process mounts", func() bool { return helpers(t) == 0 })
	h.until("the daemon sees that nothing is left", func() bool {
		h.must("umount", h.mount(image, "--prefetch=off"))
		return h.objects() == 0
	})
	if left := h.Mounts(); len(left) != 0 {
		t.Errorf("mounted: %s", strings.Join(left, ", "))
	}
	// newHost's cleanup sees that the keeper ends: nothing is held any more.
}
