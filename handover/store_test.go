package handover

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

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
			closeAll([]int{f.fd})
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
	done := make(chan error, 1)
	go func() { done <- s.Push("x", os.Stderr) }()
	for _, held := range []int{1, 1} { // the descriptor, then the barrier
		select {
		case err := <-done:
			t.Fatal("Push returned before the supervisor answered: ", err)
		case <-readable(t, h):
		}
		h.mu.Lock()
		more := h.next(make([]byte, maxDatagram+1), make([]byte, 256))
		h.mu.Unlock()
		if !more || len(h.held) != held {
			t.Fatalf("a datagram: %v, held %d, want %d", more, len(h.held), held)
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// readable returns a channel that closes when a datagram waits.
func readable(t *testing.T, h *holder) <-chan struct{} {
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

func FuzzParseMessage(f *testing.F) {
	for _, s := range []string{"FDSTORE=1\nFDNAME=fanotify\nFDPOLL=0", "BARRIER=1", "READY=1\nSTATUS=3 mounts\n", "FDSTOREREMOVE=1\nFDNAME=x", "", "=", "\xff"} {
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
		if m.barrier && (m.store || m.remove) || m.store && m.remove {
			t.Fatalf("%q: two orders in one: %+v", b, m)
		}
	})
}

func FuzzParseControl(f *testing.F) {
	f.Add(unix.UnixRights(3, 4))
	f.Add(unix.UnixCredentials(&unix.Ucred{Pid: 1}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		fds, _, err := parseControl(b)
		if err == nil && len(fds)*4 > len(b) {
			t.Fatalf("%d descriptors out of %d bytes", len(fds), len(b))
		}
	})
}
