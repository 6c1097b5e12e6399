package systemd

import (
	"testing"
	"time"
)

func TestCommandStartsTheDaemon(t *testing.T) {
	s := newSystem(t)
	if _, err := s.status(); err != nil {
		t.Error(err)
	}
	if got := s.show("ActiveState"); got != "active" {
		t.Errorf("the service is %s after a command", got)
	}
	if st, err := s.status(); err != nil || st.PID != s.number("MainPID") {
		t.Errorf("the API is answered by process %d (%v), the service's main process is %d", st.PID, err, s.number("MainPID"))
	}
}

func TestIdleDaemonEndsAndTheNextMissBringsItBack(t *testing.T) {
	s := newSystem(t, `idle-exit = "2s"`)
	im := s.image(4)
	dir := s.mount(im)
	s.read(im, dir, "f0").wait()
	for _, name := range []string{"f1", "f2"} {
		s.until("the idle daemon ends", func() bool { return s.show("ActiveState") == "inactive" })
		if got := s.show("Result"); got != "success" {
			t.Errorf("the result of an idle exit is %q", got)
		}
		dropCaches(t)
		s.read(im, dir, "f0").wait()
		if got := s.show("ActiveState"); got != "inactive" {
			t.Errorf("a reader of what is cached started the service: it is %s", got)
		}
		s.read(im, dir, name).wait()
		if got := s.show("ActiveState"); got != "active" {
			t.Errorf("the service is %s after a reader's miss", got)
		}
	}
	s.until("the idle daemon ends", func() bool { return s.show("ActiveState") == "inactive" })
	second := s.mount(im) // the API brings it back too
	s.read(im, second).wait()
	s.read(im, dir).wait()
}

func TestDaemonWithReadersWaitingIsNotIdle(t *testing.T) {
	s := newSystem(t, `idle-exit = "1s"`)
	im := s.image(1)
	dir := s.mount(im)
	var pid int
	s.whileWaiting(im, dir, func() {
		pid = s.number("MainPID")
		time.Sleep(5 * time.Second) // the time in which an idle daemon would have ended
	}, "f0")
	if got := s.number("NRestarts"); got != 0 || s.show("MainPID") != "0" && s.number("MainPID") != pid {
		t.Errorf("the daemon ended under its reader: %d restarts", got)
	}
}
