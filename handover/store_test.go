package handover

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"
)

func itoa(n int) string { return strconv.Itoa(n) }

// testHolder returns a holder nobody reads for, and a function that sends it a message with copies of one descriptor.
func testHolder(t *testing.T) (*holder, func(text string, fds int)) {
	t.Helper()
	h, err := newHolder(filepath.Join(t.TempDir(), "s"), zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := dialStore(h.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, f := range h.held {
			closeAll([]int{int(f.fd)})
		}
		if err := errors.Join(conn.Close(), h.close()); err != nil {
			t.Error(err)
		}
	})
	return h, func(text string, fds int) {
		t.Helper()
		var oob []byte
		if fds > 0 {
			list := make([]int, fds)
			for i := range list {
				list[i] = int(os.Stderr.Fd())
			}
			oob = unix.UnixRights(list...)
		}
		if err := conn.write(text, oob); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPushSendsABarrierBehindTheDescriptor(t *testing.T) {
	h, _ := testHolder(t)
	h.pid = os.Getpid()
	s, err := dialStore(h.path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.room = 1
	done := make(chan error, 1)
	go func() { done <- s.Push("x", os.Stderr) }()
	for _, held := range []int{1, 1} { // the descriptor, then the barrier
		select {
		case err := <-done:
			t.Fatal("Push returned before the supervisor answered: ", err)
		case <-waiting(t, h):
		}
		h.mu.Lock()
		more := h.next()
		h.mu.Unlock()
		if !more || len(h.held) != held {
			t.Fatalf("a datagram: %v, held %d, want %d", more, len(h.held), held)
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// waiting returns a channel that closes when a datagram waits.
func waiting(t *testing.T, h *holder) <-chan struct{} {
	ch := make(chan struct{})
	raw, err := h.sock.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(ch)
		_ = raw.Read(func(fd uintptr) bool {
			_, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
			return err == nil
		})
	}()
	return ch
}

func TestOpenStoreRefusesASupervisorThatWouldNotHold(t *testing.T) {
	tests := []struct {
		name                 string
		socket, room, direct string
		want                 error
	}{
		{"none", "", "", "", ErrNoSupervisor},
		{"store disabled, or systemd before 254", "/nonexistent", "", "", ErrNoStore},
		{"no room", "/nonexistent", "0", "", ErrNoStore},
		{"not a number", "/nonexistent", "many", "", ErrNoStore},
		{"through a shell", "/nonexistent", "1", "1", ErrIndirect},
		{"gone", "/nonexistent", "1", itoa(os.Getpid()), os.ErrNotExist},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("NOTIFY_SOCKET", tt.socket)
			t.Setenv("FDSTORE", tt.room)
			t.Setenv("SYSTEMD_EXEC_PID", tt.direct)
			if _, err := OpenStore(); !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
			if v := os.Getenv("NOTIFY_SOCKET"); v != "" {
				t.Fatalf("NOTIFY_SOCKET is left at %q for children to use", v)
			}
		})
	}
}

// storeOf returns a store with that much room, and the holder at its other end, which works off what it is sent.
func storeOf(t *testing.T, room int) (*Store, *holder) {
	t.Helper()
	h, _ := testHolder(t)
	h.pid = os.Getpid()
	go h.receive() // ends when the holder is closed
	t.Setenv("NOTIFY_SOCKET", h.path)
	t.Setenv("FDSTORE", itoa(room))
	t.Setenv("SYSTEMD_EXEC_PID", "")
	s, err := OpenStore()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, h
}

func TestNothingIsPushedThatTheSupervisorWouldDrop(t *testing.T) {
	s, h := storeOf(t, 4)
	s.Holds("of-a-predecessor")
	if err := s.PushAll([]NamedFile{{"a", os.Stderr}, {"b", os.Stderr}}); err != nil {
		t.Fatal(err)
	}
	if n := s.Room(); n != 1 {
		t.Fatalf("room for %d", n)
	}
	if err := s.PushAll([]NamedFile{{"c", os.Stderr}, {"d", os.Stderr}}); !errors.Is(err, ErrFull) || !strings.Contains(err.Error(), "FileDescriptorStoreMax=") {
		t.Fatalf("got %v", err)
	}
	for _, twice := range [][]NamedFile{{{"a", os.Stderr}}, {{"c", os.Stderr}, {"c", os.Stderr}}, {{"of-a-predecessor", os.Stderr}}} {
		if err := s.PushAll(twice); err == nil || errors.Is(err, ErrFull) {
			t.Fatalf("%v: got %v", twice, err)
		}
	}
	if n, names := h.listing(); n != 2 || strings.Join(names, ",") != "a,b" {
		t.Fatalf("held: %q", names)
	}
	if err := s.Remove("a"); err != nil {
		t.Fatal(err)
	}
	if err := s.PushAll([]NamedFile{{"a", os.Stderr}, {"c", os.Stderr}}); err != nil {
		t.Fatal(err)
	}
	if n := s.Room(); n != 0 {
		t.Fatalf("room for %d", n)
	}
}

func TestInheritedDescriptorsTakeRoom(t *testing.T) {
	passed.names = []string{"a", "b"}
	defer func() { passed.names = nil }()
	s, _ := storeOf(t, 3)
	if n := s.Room(); n != 1 {
		t.Fatalf("room for %d", n)
	}
	if err := s.Push("a", os.Stderr); err == nil {
		t.Fatal("pushed twice")
	}
}

func TestPushAndRemoveWaitWhileNoDescriptorIsLeft(t *testing.T) {
	s, h := storeOf(t, 1)
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	limit := func(cur uint64) {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: cur, Max: old.Max}); err != nil {
			t.Fatal(err)
		}
	}
	defer limit(old.Cur)
	for _, do := range []func() error{func() error { return s.Push("x", os.Stderr) }, func() error { return s.Remove("x") }} {
		done := make(chan error, 1)
		limit(0)
		go func() { done <- do() }()
		select {
		case err := <-done:
			t.Fatalf("it ended without a descriptor: %v", err)
		case <-time.After(3 * barrierPause):
		}
		limit(old.Cur)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	if n, names := h.listing(); n != 0 {
		t.Errorf("held: %q", names)
	}
}

func TestManyDescriptorsCostOneBarrier(t *testing.T) {
	h, _ := testHolder(t)
	h.pid = os.Getpid()
	s, err := dialStore(h.path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.room = 3
	done := make(chan error, 1)
	go func() { done <- s.PushAll([]NamedFile{{"a", os.Stderr}, {"b", os.Stderr}, {"c", os.Stderr}}) }()
	for i, held := range []int{1, 2, 3, 3} { // the descriptors, then the barrier
		<-waiting(t, h)
		h.mu.Lock()
		more := h.next()
		h.mu.Unlock()
		if !more || len(h.held) != held {
			t.Fatalf("datagram %d: %v, held %d, want %d", i, more, len(h.held), held)
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestWatchdogIsSaidTwiceInItsTime(t *testing.T) {
	tests := []struct {
		usec, pid string
		want      time.Duration
		bad       bool
	}{
		{"", "", 0, false}, {"3000000", itoa(os.Getpid()), 1500 * time.Millisecond, false}, {"3000000", "", 1500 * time.Millisecond, false},
		{"3000000", "1", 0, false}, {"x", "1", 0, false}, {"x", "", 0, true}, {"0", "", 0, true}, {"-1", "", 0, true}, {"9223372036854775807", "", 0, true},
	}
	for _, tt := range tests {
		h, _ := testHolder(t)
		t.Setenv("NOTIFY_SOCKET", h.path)
		t.Setenv("FDSTORE", "1")
		t.Setenv("SYSTEMD_EXEC_PID", "")
		t.Setenv("WATCHDOG_USEC", tt.usec)
		t.Setenv("WATCHDOG_PID", tt.pid)
		s, err := OpenStore()
		if (err != nil) != tt.bad {
			t.Errorf("%q for %q: %v", tt.usec, tt.pid, err)
			continue
		}
		for _, v := range []string{"WATCHDOG_USEC", "WATCHDOG_PID"} {
			if got := os.Getenv(v); got != "" {
				t.Errorf("%s is left at %q for children to use", v, got)
			}
		}
		if err == nil {
			if got := s.Watchdog(); got != tt.want {
				t.Errorf("%q for %q: %v, want %v", tt.usec, tt.pid, got, tt.want)
			}
			s.Close()
		}
	}
}

func TestSuccessorIsStartedWithTheSupervisorOfItsPredecessor(t *testing.T) {
	t.Setenv("WATCHDOG_USEC", "3000000")
	t.Setenv("WATCHDOG_PID", itoa(os.Getpid()))
	s, _ := storeOf(t, 5)
	env := s.Environment()
	for _, v := range env {
		name, value, _ := strings.Cut(v, "=")
		t.Setenv(name, value)
	}
	again, err := OpenStore()
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if err := again.Push("x", os.Stderr); err != nil {
		t.Fatal(err)
	}
	if again.Room() != 4 || again.Watchdog() != s.Watchdog() || s.Watchdog() != 1500*time.Millisecond {
		t.Fatalf("room %d, watchdog %v, from %q", again.Room(), again.Watchdog(), env)
	}
}

func TestVerifyNoticesWhatSystemdDropped(t *testing.T) {
	s, _ := storeOf(t, 10)
	theirs := 1
	count := func() (int, error) { return theirs, nil }
	s.Holds("of-a-socket-unit", "in-the-store")
	if err := s.verify(count); err != nil {
		t.Fatal(err)
	}
	if err := s.PushAll([]NamedFile{{"a", os.Stderr}, {"b", os.Stderr}}); err != nil {
		t.Fatal(err)
	}
	theirs = 2
	if err := s.verify(count); err == nil || !strings.Contains(err.Error(), "holds 2 descriptors where there should be 3") {
		t.Fatalf("got %v", err)
	}
	theirs = 3
	if err := s.verify(count); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove("a"); err != nil {
		t.Fatal(err)
	}
	if err := s.verify(count); err == nil {
		t.Fatal("one too many was not noticed")
	}
	theirs = 9
	s.verified = nil
	if err := s.verify(count); err == nil {
		t.Fatal("more than there can be was not noticed")
	}
	if err := s.Verify(t.Context()); err != nil {
		t.Fatalf("a keeper was asked over D-Bus: %v", err)
	}
}

func TestUnitIsFoundInTheControlGroup(t *testing.T) {
	tests := []struct{ text, want string }{
		{"0::/system.slice/holdfast.service\n", "holdfast.service"},
		{"0::/system.slice/holdfast.service/child\n", "holdfast.service"},
		{"0::/system.slice/system-hf.slice/hf@a\\x2db.service\n", "hf@a\\x2db.service"},
		{"0::/system.slice/_cpu.service\n", "cpu.service"},
		{"3:cpu:/other.service\n1:name=systemd:/system.slice/holdfast.service\n0::/\n", "holdfast.service"},
		{"0::/user.slice/session-1.scope\n", ""}, {"0::/\n", ""}, {"", ""}, {"noise", ""},
	}
	for _, tt := range tests {
		if got, err := unitOf(tt.text); got != tt.want || (err != nil) != (tt.want == "") {
			t.Errorf("%q: %q, %v", tt.text, got, err)
		}
	}
}

func TestAbstractSocketIsReached(t *testing.T) {
	// Autobind: the kernel chooses a free abstract name.
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: "@holdfast-test-" + itoa(os.Getpid()), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", l.LocalAddr().String())
	t.Setenv("FDSTORE", "1")
	t.Setenv("SYSTEMD_EXEC_PID", "")
	s, err := OpenStore()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Notify("READY=1"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	n, err := l.Read(b)
	if err != nil || string(b[:n]) != "READY=1" {
		t.Fatalf("received %q, %v", b[:n], err)
	}
}

func TestInheritedRefusesWhatItWouldHaveToGuess(t *testing.T) {
	tests := []struct {
		count, names string
		want         string // the names, comma-separated, or "error: " and a part of it
	}{
		{"0", "", ""},
		{"1", "fanotify", "fanotify"},
		{"2", "fanotify:object-1", "fanotify,object-1"},
		{"2", "fanotify", "error: 1 names for LISTEN_FDS=2"},
		{"1", "a:b", "error: 2 names for LISTEN_FDS=1"},
		{"1", "", "error: has 1 to 255 bytes"},
		{"2", "fanotify:fanotify", `error: two descriptors are named "fanotify"`},
		{"-1", "", "error: not a number"},
		{"9999999999999999999", "", "error: not a number"},
		{"1048577", "", "error: not a number"},
		{"", "", "error: not a number"},
		{"1", "a\nb", "error: printable"},
	}
	for _, tt := range tests {
		got, err := inheritedNames(tt.count, tt.names)
		if part, ok := strings.CutPrefix(tt.want, "error: "); ok {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("%q %q: got %v, want an error with %q", tt.count, tt.names, err, part)
			}
		} else if err != nil || strings.Join(got, ",") != tt.want {
			t.Errorf("%q %q: got %q, %v, want %q", tt.count, tt.names, got, err, tt.want)
		}
	}
}

func TestDescriptorsForAnotherProcessAreNotTaken(t *testing.T) {
	t.Setenv("LISTEN_PID", "1")
	t.Setenv("LISTEN_FDS", "1")
	t.Setenv("LISTEN_FDNAMES", "x")
	files, err := Inherited()
	if len(files) != 0 || err != nil {
		t.Fatalf("got %v, %v", files, err)
	}
	if v := os.Getenv("LISTEN_FDS"); v != "" {
		t.Fatalf("LISTEN_FDS is left at %q for children to use", v)
	}
}

func TestInheritingADescriptorThatIsNotThereIsAnError(t *testing.T) {
	t.Setenv("LISTEN_PID", itoa(os.Getpid()))
	t.Setenv("LISTEN_FDS", "1000")
	t.Setenv("LISTEN_FDNAMES", strings.TrimSuffix(strings.Repeat("x:", 1000), ":"))
	if _, err := Inherited(); err == nil {
		t.Fatal("no error")
	}
}

func TestInheritingWorksUnderASmallLimitOfOpenFiles(t *testing.T) {
	for _, tt := range []struct {
		limit, fds int
		want       string
	}{{64, 20, "20 <nil>"}, {64, 50, "50 <nil>"}} {
		script := fmt.Sprintf("ulimit -n %d; LISTEN_PID=$$ exec %s role=inherit", tt.limit, os.Args[0])
		cmd := exec.Command("/bin/sh", "-c", script)
		names := make([]string, tt.fds)
		for i := range names {
			names[i] = fmt.Sprint("o", i)
			cmd.ExtraFiles = append(cmd.ExtraFiles, os.Stderr)
		}
		cmd.Env = append(os.Environ(), "LISTEN_FDS="+itoa(tt.fds), "LISTEN_FDNAMES="+strings.Join(names, ":"))
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), tt.want) {
			t.Errorf("%d descriptors: %s, %v; want %q", tt.fds, out, err, tt.want)
		}
	}
}

func FuzzParseMessage(f *testing.F) {
	for _, s := range []string{"FDSTORE=1\nFDNAME=fanotify\nFDPOLL=0", "BARRIER=1", "READY=1\nSTATUS=3 mounts\n", "FDSTOREREMOVE=1\nFDNAME=x", "MAINPID=17", "RELOADING=1\nWATCHDOG=1", "", "=", "\xff"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseMessage(b)
		if err != nil {
			return
		}
		if (m.store || m.remove) && checkName(m.name) != nil {
			t.Fatalf("%q: name %q let through", b, m.name)
		}
		if m.barrier && (m.store || m.remove || m.mainPID != 0) || m.store && m.remove {
			t.Fatalf("%q: two orders in one: %+v", b, m)
		}
	})
}

func FuzzParseControl(f *testing.F) {
	f.Add(unix.UnixRights(3, 4))
	f.Add(unix.UnixCredentials(&unix.Ucred{Pid: 1}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		fds, _, err := parseControl(b, nil)
		if err == nil && len(fds)*4 > len(b) {
			t.Fatalf("%d descriptors out of %d bytes", len(fds), len(b))
		}
	})
}
