package handover

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
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
	mu   sync.Mutex // one message, and the barrier behind it, at a time
	conn *os.File   // unixgram, connected, non-blocking
}

// OpenStore finds the supervisor by $NOTIFY_SOCKET and takes what the supervisor said out of the environment, so that no child
// mistakes itself for the daemon. Call it once, at start. The error is ErrNoSupervisor, ErrNoStore, ErrIndirect, or says what is
// wrong with the variables.
func OpenStore() (*Store, error) {
	socket, room, direct := os.Getenv("NOTIFY_SOCKET"), os.Getenv("FDSTORE"), os.Getenv("SYSTEMD_EXEC_PID")
	for _, v := range []string{"NOTIFY_SOCKET", "FDSTORE", "SYSTEMD_EXEC_PID"} {
		if err := os.Unsetenv(v); err != nil {
			return nil, fmt.Errorf("take %s out of the environment: %w", v, err)
		}
	}
	if socket == "" {
		return nil, ErrNoSupervisor
	}
	if socket[0] != '/' && socket[0] != '@' {
		return nil, fmt.Errorf("NOTIFY_SOCKET=%q is neither a path nor an abstract socket", socket)
	}
	if direct != "" && direct != strconv.Itoa(os.Getpid()) { // systemd sets it since 248
		return nil, ErrIndirect
	}
	if room == "" {
		return nil, ErrNoStore
	}
	if n, err := strconv.Atoi(room); err != nil || n < 1 {
		return nil, fmt.Errorf("FDSTORE=%q is not a number of descriptors: %w", room, ErrNoStore)
	}
	return dialStore(socket)
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
	return &Store{conn: conn}, nil
}

// Push gives the supervisor a copy of f to hold under name, which must not be held yet, and returns when the supervisor has worked
// it off. The caller keeps f. After an error the supervisor may or may not hold it.
func (s *Store) Push(name string, f *os.File) error {
	if err := checkName(name); err != nil {
		return fmt.Errorf("store a file descriptor: %w", err)
	}
	// FDPOLL=0: without it systemd drops a descriptor that polls as hung up or in error, which a lifeline may do in passing.
	err := s.sendFile("FDSTORE=1\nFDNAME="+name+"\nFDPOLL=0", f)
	if err != nil {
		return fmt.Errorf("store file descriptor %q: %w", name, err)
	}
	return nil
}

// Remove makes the supervisor close what it holds under name, and returns when the supervisor has worked that off.
func (s *Store) Remove(name string) error {
	if err := checkName(name); err != nil {
		return fmt.Errorf("remove a stored file descriptor: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := errors.Join(s.send("FDSTOREREMOVE=1\nFDNAME="+name, nil), s.barrier()); err != nil {
		return fmt.Errorf("remove stored file descriptor %q: %w", name, err)
	}
	return nil
}

// Notify tells the supervisor a state, such as "READY=1" or "STATUS=3 mounts", without waiting for it to read that.
func (s *Store) Notify(state string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.send(state, nil)
}

// Close ends the connection; what the supervisor holds it goes on holding.
func (s *Store) Close() error { return s.conn.Close() }

func (s *Store) sendFile(text string, f *os.File) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	// Not f.Fd(), which may make the shared open file description blocking.
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	if err := raw.Control(func(fd uintptr) { sendErr = s.send(text, unix.UnixRights(int(fd))) }); err != nil {
		return err
	}
	if sendErr != nil {
		return sendErr
	}
	return s.barrier()
}

// barrier returns when the supervisor has worked off all that was sent before (sd_notify_barrier(3), systemd 246).
func (s *Store) barrier() error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	err = func() error {
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
