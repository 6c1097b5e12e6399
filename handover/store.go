package handover

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/state/crash"
)

// Errors of OpenStore.
var (
	// ErrNoSupervisor means that nothing which could hold descriptors started this process.
	ErrNoSupervisor = errors.New("no supervisor ($NOTIFY_SOCKET is not set)")
	// ErrNoStore means that the supervisor does not say it holds descriptors. Asking it anyway would look like success:
	// systemd drops what it has no room for without a word to the sender (service.c, service_add_fd_store, systemd 252).
	ErrNoStore = errors.New("the supervisor does not offer to hold file descriptors ($FDSTORE is not set)")
	// ErrIndirect means that the supervisor started another process, which started this one: it would drop what this one sends.
	ErrIndirect = errors.New("the supervisor did not start this process itself ($SYSTEMD_EXEC_PID is another's; from a shell, use exec)")
)

// answerTime is how long a supervisor may take to work off what it was sent. PID 1 may be busy for seconds while a machine boots.
const answerTime = 60 * time.Second

// A Store is the place in the supervisor where descriptors outlive this process. Its methods may be called from any goroutine.
type Store struct {
	socket   string
	room     int           // $FDSTORE: how many descriptors it holds at most
	watchdog time.Duration // $WATCHDOG_USEC
	wakes    string        // $HOLDFAST_WAKES

	mu       sync.Mutex      // one message, and the barrier behind it, at a time
	conn     *os.File        // unixgram, connected, non-blocking
	held     map[string]bool // the names the supervisor holds, or, after an error, may hold
	verified *verified       // by the last Verify
}

// OpenStore finds the supervisor by $NOTIFY_SOCKET and takes what the supervisor said out of the environment, so that no child
// mistakes itself for the daemon. Call it once, at start, after Inherited. The error is ErrNoSupervisor, ErrNoStore, ErrIndirect, or
// says what is wrong with the variables.
func OpenStore() (*Store, error) {
	env := map[string]string{}
	for _, v := range []string{"NOTIFY_SOCKET", "FDSTORE", "SYSTEMD_EXEC_PID", "WATCHDOG_USEC", "WATCHDOG_PID", wakesVariable} {
		env[v] = os.Getenv(v)
		if err := os.Unsetenv(v); err != nil {
			return nil, fmt.Errorf("take %s out of the environment: %w", v, err)
		}
	}
	socket, self := env["NOTIFY_SOCKET"], strconv.Itoa(os.Getpid())
	if socket == "" {
		return nil, ErrNoSupervisor
	}
	if socket[0] != '/' && socket[0] != '@' {
		return nil, fmt.Errorf("NOTIFY_SOCKET=%q is neither a path nor an abstract socket", socket)
	}
	if direct := env["SYSTEMD_EXEC_PID"]; direct != "" && direct != self { // systemd sets it since 248
		return nil, ErrIndirect
	}
	if env["FDSTORE"] == "" {
		return nil, ErrNoStore
	}
	room, err := strconv.Atoi(env["FDSTORE"])
	if err != nil || room < 1 {
		return nil, fmt.Errorf("FDSTORE=%q is not a number of descriptors: %w", env["FDSTORE"], ErrNoStore)
	}
	var watchdog time.Duration
	if usec := env["WATCHDOG_USEC"]; usec != "" && (env["WATCHDOG_PID"] == "" || env["WATCHDOG_PID"] == self) {
		n, err := strconv.ParseInt(usec, 10, 64)
		if err != nil || n < 1 || n > int64(math.MaxInt64/time.Microsecond) {
			return nil, fmt.Errorf("WATCHDOG_USEC=%q is not a number of microseconds", usec)
		}
		watchdog = time.Duration(n) * time.Microsecond
	}
	s, err := dialStore(socket)
	if err != nil {
		return nil, err
	}
	s.room, s.watchdog, s.wakes = room, watchdog, env[wakesVariable]
	passed.mu.Lock()
	defer passed.mu.Unlock()
	s.Holds(passed.names...)
	return s, nil
}

func dialStore(socket string) (*Store, error) {
	// Not package net, which sends control messages only on datagram sockets that are not connected: on such a one the kernel
	// does not say when a full receiver has room again.
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("connect to the supervisor: %w", err)
	}
	conn := os.NewFile(uintptr(fd), socket)
	// SockaddrUnix turns a leading "@" into the NUL of an abstract address.
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: socket}); err != nil {
		return nil, errors.Join(fmt.Errorf("connect to the supervisor at %s: %w", socket, err), conn.Close())
	}
	return &Store{socket: socket, conn: conn, held: map[string]bool{}}, nil
}

// Holds says that the supervisor holds these names beside what it passed to this process: what a predecessor stored.
func (s *Store) Holds(names ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range names {
		s.held[name] = true
	}
}

// Room is how many more descriptors the supervisor would hold. What socket units passed is counted as if it took room, which errs
// on the safe side: the environment does not tell it apart.
func (s *Store) Room() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.room - len(s.held)
}

// ErrFull means that the supervisor would drop another descriptor without a word (service_add_fd_store, systemd 252).
var ErrFull = errors.New("the supervisor's store of file descriptors is full: raise FileDescriptorStoreMax= of the unit, " +
	"and run systemctl daemon-reload and restart")

// Push gives the supervisor a copy of f to hold under name, which must not be held yet, and returns when the supervisor has worked
// it off. The caller keeps f. After an error the supervisor may or may not hold it: Remove it before it is pushed again.
func (s *Store) Push(name string, f *os.File) error { return s.PushAll([]NamedFile{{name, f}}) }

// PushAll is Push of several, each under its own name, with one wait for all. What there is no room for as a whole is not begun.
func (s *Store) PushAll(files []NamedFile) error {
	b, err := newBarrier()
	if err != nil {
		return fmt.Errorf("store file descriptors: %w", err)
	}
	defer b.close()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.check(files); err != nil {
		return fmt.Errorf("store file descriptors: %w", err)
	}
	for _, f := range files {
		crash.Point("handover.store.before-push")
		s.held[f.Name] = true
		// FDPOLL=0: without it systemd drops a descriptor that polls as hung up or in error, which a lifeline may do in passing.
		if err := s.sendFile("FDSTORE=1\nFDNAME="+f.Name+"\nFDPOLL=0", f.File); err != nil {
			return fmt.Errorf("store file descriptor %q: %w", f.Name, err)
		}
	}
	if len(files) == 0 {
		return nil
	}
	crash.Point("handover.store.before-barrier")
	if err := s.barrier(b); err != nil {
		return fmt.Errorf("store file descriptors (%q and %d more): %w", files[0].Name, len(files)-1, err)
	}
	crash.Point("handover.store.after-barrier")
	return nil
}

// check says whether all of files can be pushed. It runs under mu.
func (s *Store) check(files []NamedFile) error {
	seen := make(map[string]bool, len(files))
	for _, f := range files {
		if err := checkName(f.Name); err != nil {
			return err
		}
		if s.held[f.Name] || seen[f.Name] {
			return fmt.Errorf("one is already stored as %q", f.Name)
		}
		seen[f.Name] = true
	}
	if len(s.held)+len(files) > s.room {
		return fmt.Errorf("%d more than %d of at most %d: %w", len(files), len(s.held), s.room, ErrFull)
	}
	return nil
}

// Remove makes the supervisor close what it holds under name, and returns when the supervisor has worked that off.
func (s *Store) Remove(name string) error {
	if err := checkName(name); err != nil {
		return fmt.Errorf("remove a stored file descriptor: %w", err)
	}
	b, err := newBarrier()
	if err != nil {
		return fmt.Errorf("remove stored file descriptor %q: %w", name, err)
	}
	defer b.close()
	s.mu.Lock()
	defer s.mu.Unlock()
	crash.Point("handover.store.before-remove")
	if err := errors.Join(s.send("FDSTOREREMOVE=1\nFDNAME="+name, nil), s.barrier(b)); err != nil {
		return fmt.Errorf("remove stored file descriptor %q: %w", name, err)
	}
	crash.Point("handover.store.after-remove")
	delete(s.held, name)
	return nil
}

// MainPID tells the supervisor that the process with that id, which this one started, is the daemon from now on, and returns when the
// supervisor has worked that off. By default a supervisor drops all that other processes send: what this process still has
// to tell it, it tells before.
func (s *Store) MainPID(pid int) error {
	b, err := newBarrier()
	if err != nil {
		return fmt.Errorf("tell the supervisor of process %d: %w", pid, err)
	}
	defer b.close()
	s.mu.Lock()
	defer s.mu.Unlock()
	crash.Point("handover.store.before-mainpid")
	if err := errors.Join(s.send("MAINPID="+strconv.Itoa(pid), nil), s.barrier(b)); err != nil {
		return fmt.Errorf("tell the supervisor of process %d: %w", pid, err)
	}
	crash.Point("handover.store.after-mainpid")
	return nil
}

// Environment is what a successor must be started with to have the same supervisor. SYSTEMD_EXEC_PID, which names this process, and
// what announces descriptors are not part of it.
func (s *Store) Environment() []string {
	env := []string{"NOTIFY_SOCKET=" + s.socket, "FDSTORE=" + strconv.Itoa(s.room)}
	if s.watchdog > 0 {
		env = append(env, "WATCHDOG_USEC="+strconv.FormatInt(s.watchdog.Microseconds(), 10))
	}
	if s.wakes != "" {
		env = append(env, wakesVariable+"="+s.wakes)
	}
	return env
}

// Wakes says whether the supervisor starts this service again when the descriptor it holds under a name is readable and the service has ended.
func (s *Store) Wakes(name string) bool {
	return s.wakes == "*" || slices.Contains(strings.Split(s.wakes, ":"), name)
}

// Watchdog is how often to say WATCHDOG=1: half of what the supervisor allows before it kills this process (sd_watchdog_enabled(3)). Zero: it
// does not watch.
func (s *Store) Watchdog() time.Duration { return s.watchdog / 2 }

// Notify tells the supervisor a state, such as "READY=1" or "STATUS=3 mounts", without waiting for it to read that.
func (s *Store) Notify(state string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.send(state, nil)
}

// Close ends the connection; what the supervisor holds it goes on holding.
func (s *Store) Close() error { return s.conn.Close() }

func (s *Store) sendFile(text string, f *os.File) error {
	// Not f.Fd(), which may make the shared open file description blocking.
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	err = raw.Control(func(fd uintptr) { sendErr = s.send(text, unix.UnixRights(int(fd))) })
	return errors.Join(err, sendErr)
}

// A barrier is a pipe, whose writing end the supervisor closes when it gets there.
type barrier struct{ r, w *os.File }

// How often a pipe is tried for that cannot be had for want of descriptors.
const (
	barrierPause = 10 * time.Millisecond
	barrierTries = int(answerTime / barrierPause)
)

// newBarrier makes one, before anything is sent that it is for. Where no descriptor is left it waits as for a supervisor that is busy: an
// object that is neither held nor let go has readers who get errors. It runs without mu, which the watchdog needs.
func newBarrier() (b barrier, err error) {
	for range barrierTries {
		b.r, b.w, err = os.Pipe()
		if !errors.Is(err, unix.EMFILE) && !errors.Is(err, unix.ENFILE) {
			return b, err
		}
		time.Sleep(barrierPause)
	}
	return b, fmt.Errorf("no file descriptor is left (raise LimitNOFILE=): %w", err)
}

// close closes what is open.
func (b barrier) close() {
	_ = b.r.Close()
	_ = b.w.Close()
}

// barrier returns when the supervisor has worked off all that was sent before (sd_notify_barrier(3), systemd 246).
func (s *Store) barrier(b barrier) error {
	r, w := b.r, b.w
	err := func() error {
		defer w.Close()
		raw, err := w.SyscallConn()
		if err != nil {
			return err
		}
		var sendErr error
		err = raw.Control(func(fd uintptr) { sendErr = s.send("BARRIER=1", unix.UnixRights(int(fd))) })
		return errors.Join(err, sendErr)
	}()
	if err != nil {
		return err
	}
	if err := r.SetReadDeadline(time.Now().Add(answerTime)); err != nil {
		return err
	}
	n, err := r.Read(make([]byte, 1))
	switch {
	case err == io.EOF:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("the supervisor did not answer within %v", answerTime)
	case err == nil:
		return fmt.Errorf("the supervisor wrote %d bytes where it should only close", n)
	}
	return err
}

func (s *Store) send(text string, oob []byte) error {
	if strings.ContainsRune(text, 0) || len(text) > maxDatagram {
		return fmt.Errorf("a message to the supervisor has at most %d bytes and no NUL", maxDatagram)
	}
	return s.write(text, oob)
}

func (s *Store) write(text string, oob []byte) error {
	if err := s.conn.SetWriteDeadline(time.Now().Add(answerTime)); err != nil {
		return err
	}
	raw, err := s.conn.SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	err = raw.Write(func(fd uintptr) bool {
		sendErr = unix.EINTR
		for sendErr == unix.EINTR {
			sendErr = unix.Sendmsg(int(fd), []byte(text), oob, nil, unix.MSG_NOSIGNAL)
		}
		return sendErr != unix.EAGAIN
	})
	if err = errors.Join(err, sendErr); err != nil {
		return fmt.Errorf("send to the supervisor: %w", err)
	}
	return nil
}
