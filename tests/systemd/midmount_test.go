package systemd

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// helper finds the process that makes a mount for the daemon; 0: there is none.
func helper(t *testing.T) int {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lines {
		if b, err := os.ReadFile(l); err == nil && string(b) == "holdfast-mount\x00" {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(l)))
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	return 0
}

// asleep says whether a thread of a process sleeps uninterruptibly.
func asleep(pid int) bool {
	stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, s := range stats {
		if b, err := os.ReadFile(s); err == nil && strings.Contains(string(b), ") D ") {
			return true
		}
	}
	return false
}

// systemd waits TimeoutStopSec= for what SIGKILL did not end, tries again, and then starts the service all the same.
func TestDaemonKilledInTheMiddleOfMountIsBackAndMounts(t *testing.T) {
	const tries, most = 20, 30 * time.Second
	s := newSystem(t)
	im := s.image(2)
	dir := s.mount(im)
	caught := 0
	for i := 0; i < tries && caught == 0; i++ {
		half, err := os.MkdirTemp(s.dir, "half-")
		if err != nil {
			t.Fatal(err)
		}
		old := s.number("MainPID")
		done := make(chan struct{})
		go func() { // ends with the command, whose daemon is killed
			defer close(done)
			_ = command("holdfast", "mount", "--domain="+s.domain, im.ref, half)
		}()
		// Stopped while the kernel waits for its answer, it does not give it. It may be too late for that: then it is tried again.
		pid := 0
		for mounting := true; mounting && !asleep(pid); {
			if pid == 0 {
				pid = helper(t)
			} else if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err != nil {
				break
			}
			select {
			case <-done:
				mounting = false
			default:
			}
		}
		if err := syscall.Kill(old, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond) // what it had answered already goes on
		if asleep(pid) {
			caught++
		}
		reader := s.read(im, dir, fmt.Sprintf("f%d", i%2)) // of another mount, who waits with it
		began := time.Now()
		s.successor(s.signal(syscall.SIGKILL)) // which ends a stopped one too
		took := time.Since(began)
		t.Logf("the next daemon served after %v; the mount slept: %v", took, caught > 0)
		if took > most {
			t.Errorf("the next daemon served after %v, want %v at the most", took, most)
		}
		reader.wait()
		<-done
		s.until("nothing makes a mount", func() bool { return helper(t) == 0 })
		s.must("holdfast", "umount", s.mount(im))
	}
	if caught == 0 {
		t.Errorf("in %d tries no daemon was killed while a mount slept", tries)
	}
	if got := len(s.mounts()); got > 2 {
		t.Errorf("%d images are mounted", got)
	}
}
