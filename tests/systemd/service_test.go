package systemd

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestKilledDaemonIsBackBeforeAReaderSeesAnError(t *testing.T) {
	s := newSystem(t)
	const kills = 3
	im := s.image(2 * kills)
	dir := s.mount(im)
	held := s.holding()
	for i := range kills {
		s.whileWaiting(im, dir, func() { s.successor(s.signal(syscall.SIGKILL)) }, fmt.Sprintf("f%d", 2*i), fmt.Sprintf("f%d", 2*i+1))
		if got := s.held(); got < held {
			t.Errorf("systemd holds %d descriptors after the kill, %d before", got, held)
		}
	}
	dropCaches(t)
	s.read(im, dir).wait()
	if got := s.number("NRestarts"); got != kills {
		t.Errorf("systemd has restarted the daemon %d times, want %d", got, kills)
	}
}

func TestReloadIsAnUpgradeWhoseSuccessorIsSupervised(t *testing.T) {
	s := newSystem(t)
	im := s.image(3)
	dir := s.mount(im)
	old, upgraded := s.number("MainPID"), 0
	s.whileWaiting(im, dir, func() {
		s.systemctl("reload", service)
		upgraded = s.successor(old)
	}, "f0")
	if got := s.number("NRestarts"); got != 0 {
		t.Errorf("an upgrade counts as %d restarts: the daemon was gone in between", got)
	}
	if st, err := s.status(); err != nil || st.PID != upgraded {
		t.Errorf("the API is answered by process %d (%v), the service's main process is %d", st.PID, err, upgraded)
	}
	s.until("the predecessor ends", func() bool { return syscall.Kill(old, 0) != nil })
	s.whileWaiting(im, dir, func() {
		if killed := s.signal(syscall.SIGKILL); killed != upgraded {
			t.Errorf("process %d was killed, not the successor %d", killed, upgraded)
		}
		s.successor(upgraded)
	}, "f1")
	if got := s.number("NRestarts"); got != 1 {
		t.Errorf("systemd has restarted the killed successor %d times, want once", got)
	}
	s.whileWaiting(im, dir, func() {
		pid := s.number("MainPID")
		s.systemctl("reload", service)
		s.successor(pid)
	}, "f2")
	dropCaches(t)
	s.read(im, dir).wait()
	// A main process that is not systemd's child is killed at once where it should be told to stop (service.c, main_pid_alien): the
	// successor has to be an orphan, and so PID 1's child, before it becomes the main process.
	s.systemctl("stop", service)
	if got := s.show("Result"); got != "success" {
		t.Errorf("the result of stopping a successor is %q", got)
	}
	s.systemctl("start", service)
}

func TestSystemdThatReloadsOrReexecutesItselfForgetsNothing(t *testing.T) {
	s := newSystem(t)
	im := s.image(4)
	dir := s.mount(im)
	held := s.holding()
	for i, verb := range []string{"daemon-reload", "daemon-reexec"} {
		s.whileWaiting(im, dir, func() {
			pid := s.number("MainPID")
			s.systemctl(verb)
			if got := s.number("MainPID"); got != pid {
				t.Errorf("%s changed the main process from %d to %d", verb, pid, got)
			}
			if got := s.held(); got < held {
				t.Errorf("systemd holds %d descriptors after %s, %d before", got, verb, held)
			}
			s.successor(s.signal(syscall.SIGKILL)) // which needs them
		}, fmt.Sprintf("f%d", 2*i))
		// And while there is no daemon to be reloaded: it dies, and is not back when systemd begins.
		s.whileWaiting(im, dir, func() {
			pid := s.signal(syscall.SIGKILL)
			s.systemctl(verb)
			s.successor(pid)
		}, fmt.Sprintf("f%d", 2*i+1))
	}
	dropCaches(t)
	s.read(im, dir).wait()
}

func TestFrozenDaemonIsReplacedByTheWatchdog(t *testing.T) {
	s := newSystem(t)
	s.set("WatchdogSec=5s")
	im := s.image(1)
	dir := s.mount(im)
	s.whileWaiting(im, dir, func() { s.successor(s.signal(syscall.SIGSTOP)) }, "f0")
	if got := s.number("NRestarts"); got != 1 {
		t.Errorf("systemd has restarted the daemon %d times, want once", got)
	}
	// One that is well is left alone.
	pid := s.number("MainPID")
	time.Sleep(11 * time.Second) // the time in which the watchdog would have bitten twice
	if got := s.number("MainPID"); got != pid {
		t.Errorf("the watchdog ended process %d, which was well; now it is %d", pid, got)
	}
}

func TestRestartKeepsWhatSystemdHolds(t *testing.T) {
	s := newSystem(t)
	im := s.image(3)
	dir := s.mount(im)
	held := s.holding()
	for i, verb := range []string{"restart", "try-restart", "kill"} {
		s.whileWaiting(im, dir, func() {
			pid := s.number("MainPID")
			s.systemctl(verb, service)
			s.successor(pid)
			if got := s.held(); got < held {
				t.Errorf("systemd holds %d descriptors after %s, %d before", got, verb, held)
			}
		}, fmt.Sprintf("f%d", i))
	}
	if log := s.journal(); strings.Contains(log, "timed out. Killing") {
		t.Errorf("systemd did not give the daemon the time that it asked for:\n%s", log)
	}
	dropCaches(t)
	s.read(im, dir).wait()
}

func TestStoppedServiceLeavesMountsAndIsStartedByTheNextMiss(t *testing.T) {
	s := newSystem(t)
	im := s.image(3)
	whole := s.mount(im, "--prefetch=on")
	s.complete(whole)
	s.domain += "-part"
	part := s.mount(im)
	s.read(im, part, "f0").wait()
	held := s.holding()
	s.systemctl("stop", service)
	if got := s.show("ActiveState"); got != "inactive" {
		t.Fatalf("the service is %s after a stop", got)
	}
	// systemd 254 and later keeps what it holds (FileDescriptorStorePreserve=); before, docs/systemd.md says what that costs.
	want := 0
	if s.systemdVersion() >= 254 {
		want = held
	}
	if got := s.held(); got != want {
		t.Errorf("systemd holds %d descriptors of the stopped service, want %d of %d", got, want, held)
	}
	dropCaches(t)
	s.read(im, whole).wait()
	s.read(im, part, "f0").wait()
	if got := s.show("ActiveState"); got != "inactive" {
		t.Errorf("readers of what is cached started the service: it is %s", got)
	}
	if want == 0 && !s.kernelOpensAnew() {
		// What docs/systemd.md says is lost is lost with an errno: never zeros, never silence.
		if err := im.check(part, "f1"); !errors.Is(err, syscall.EIO) {
			t.Errorf("a reader of an object that nobody holds any more got %v, want %v", err, syscall.EIO)
		}
		return
	}
	s.read(im, part).wait()
	if got := s.show("ActiveState"); got != "active" {
		t.Errorf("the service is %s after a reader's miss", got)
	}
	s.systemctl("stop", service)
	s.systemctl("start", service)
	dropCaches(t)
	s.read(im, whole).wait()
	s.read(im, part).wait()
}

// The kernel culls in the working directory of the thread that tells it to.
func TestServiceMayCull(t *testing.T) {
	s := newSystem(t)
	im := s.image(2)
	dir := s.mount(im)
	s.read(im, dir).wait()
	s.must("holdfast", "umount", dir)
	s.must("holdfast", "images", "rm", im.ref)
	if j := s.journal(); strings.Contains(j, "cull an object") {
		t.Errorf("what was unmounted cannot be culled:\n%s", j)
	}
}
