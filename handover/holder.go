package handover

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// maxHeld bounds the descriptors a keeper holds: the daemon's lifeline, and one per open cache object.
const maxHeld = 16384

// maxPassed is how many descriptors the kernel lets one message carry (SCM_MAX_FD in include/net/scm.h, since Linux 2.6.38).
const maxPassed = 253

// A holder is the notify socket and the descriptors that came through it. It is one datagram's work at a time: receiving and working
// off are one step under mu, so that whoever finds the socket empty under mu knows that all that was sent has been worked off.
type holder struct {
	log  *zap.Logger
	path string
	sock *os.File // unixgram, non-blocking, SO_PASSCRED
	done chan struct{}

	mu     sync.Mutex
	closed bool
	pid    int // whose messages are taken; 0: nobody's
	held   []heldFD
	ready  bool // the process with pid has said READY=1
}

// A heldFD is a raw number rather than an *os.File: the runtime would watch a pollable one with epoll, and wake this process at
// every request the daemon is about to answer.
type heldFD struct {
	name string
	fd   int
}

// newHolder binds the socket at path, which must not exist or be left over: the caller holds the lock beside it.
func newHolder(path string, log *zap.Logger) (*holder, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("make the notify socket: %w", err)
	}
	h := &holder{log: log, path: path, sock: os.NewFile(uintptr(fd), path), done: make(chan struct{})}
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrUnix{Name: path})
	}
	if errors.Is(err, unix.EINVAL) {
		err = fmt.Errorf("%w (a socket's path has at most 107 bytes: choose a shorter --run)", err)
	}
	if err == nil {
		err = os.Chmod(path, 0o600)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("bind the notify socket %s: %w", path, err), h.sock.Close())
	}
	return h, nil
}

// receive works off datagrams until close. Its owner is Keep, which waits for done.
func (h *holder) receive() {
	defer close(h.done)
	raw, err := h.sock.SyscallConn()
	if err == nil {
		err = raw.Read(func(uintptr) bool {
			h.drain()
			return false // wait until there is more
		})
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.closed {
		h.log.Error("the notify socket failed: what is held stays held, nothing more is taken", zap.Error(err))
	}
}

// drain works off all that has been sent, and returns the number of descriptors held then.
func (h *holder) drain() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	buf := make([]byte, maxDatagram+1)
	oob := make([]byte, unix.CmsgSpace(maxPassed*4)+unix.CmsgSpace(unix.SizeofUcred))
	for h.next(buf, oob) {
	}
	return len(h.held)
}

// next works off one datagram, and says whether there was one. It runs under mu.
func (h *holder) next(buf, oob []byte) bool {
	raw, err := h.sock.SyscallConn()
	if err != nil {
		return false
	}
	var n, oobn, flags int
	var recvErr error
	err = raw.Control(func(fd uintptr) {
		for {
			n, oobn, flags, _, recvErr = unix.Recvmsg(int(fd), buf, oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
			if recvErr != unix.EINTR {
				return
			}
		}
	})
	if err = errors.Join(err, recvErr); err != nil {
		if !errors.Is(err, unix.EAGAIN) && !h.closed {
			h.log.Error("receive a notification", zap.Error(err))
		}
		return false
	}
	fds, from, err := parseControl(oob[:oobn])
	if err == nil {
		err = h.process(buf[:n], fds, from, flags)
	}
	if err != nil {
		closeAll(fds)
		h.log.Warn("notification dropped, with the descriptors in it", zap.Error(err), zap.Int("descriptors", len(fds)))
	}
	return true
}

// process works off one datagram. It owns fds if and only if it returns nil.
func (h *holder) process(b []byte, fds []int, from *unix.Ucred, flags int) error {
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return fmt.Errorf("it was truncated (flags %#x)", flags)
	}
	// The kernel fills in the credentials; only root can claim another process's.
	if from == nil || h.pid == 0 || int(from.Pid) != h.pid {
		return fmt.Errorf("it is not from the process that this keeper started (%d) but from %+v", h.pid, from)
	}
	m, err := parseMessage(b)
	if err != nil {
		return fmt.Errorf("malformed: %w", err)
	}
	switch {
	case m.barrier:
		if len(fds) != 1 {
			return fmt.Errorf("a barrier with %d descriptors instead of one", len(fds))
		}
		closeAll(fds) // all before it is done: datagrams come in order
	case m.store:
		return h.store(m.name, fds)
	case len(fds) > 0:
		return fmt.Errorf("%d descriptors without FDSTORE=1", len(fds))
	case m.remove:
		h.remove(m.name)
	}
	if m.ready {
		h.ready = true
		h.log.Info("the command is ready", zap.Int("pid", h.pid))
	}
	if m.status != "" {
		h.log.Debug("status", zap.String("status", m.status))
	}
	return nil
}

func (h *holder) store(name string, fds []int) error {
	if len(fds) == 0 {
		return errors.New("FDSTORE=1 without a descriptor")
	}
	if len(h.held)+len(fds) > maxHeld {
		return fmt.Errorf("descriptor %q: this keeper already holds %d, and takes no more than %d", name, len(h.held), maxHeld)
	}
	for _, fd := range fds {
		h.held = append(h.held, heldFD{name, fd})
	}
	h.log.Info("descriptor stored", zap.String("name", name), zap.Int("held", len(h.held)))
	return nil
}

func (h *holder) remove(name string) {
	kept := h.held[:0]
	for _, f := range h.held {
		if f.name == name {
			closeAll([]int{f.fd})
			continue
		}
		kept = append(kept, f)
	}
	h.held = kept
	h.log.Info("descriptor removed", zap.String("name", name), zap.Int("held", len(h.held)))
}

// close ends receive and removes the socket. Keep calls it when nothing is held; after a failed start it may be called with
// receive never run.
func (h *holder) close() error {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	return errors.Join(h.sock.Close(), os.Remove(h.path))
}

// parseControl takes the descriptors and the sender out of a datagram's control messages. The descriptors are the caller's, also
// beside an error.
func parseControl(oob []byte) (fds []int, from *unix.Ucred, err error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, nil, fmt.Errorf("control message: %w", err)
	}
	for i := range msgs {
		m := &msgs[i]
		if m.Header.Level != unix.SOL_SOCKET {
			continue
		}
		switch m.Header.Type {
		case unix.SCM_RIGHTS:
			if len(m.Data)%4 != 0 { // ParseUnixRights would read past the end
				return fds, from, fmt.Errorf("control message: %d bytes of descriptors", len(m.Data))
			}
			got, err := unix.ParseUnixRights(m)
			if err != nil {
				return fds, from, fmt.Errorf("control message: %w", err)
			}
			fds = append(fds, got...)
		case unix.SCM_CREDENTIALS:
			if len(m.Data) != unix.SizeofUcred { // ParseUnixCredentials panics where there is nothing
				return fds, from, fmt.Errorf("control message: %d bytes of credentials", len(m.Data))
			}
			if from, err = unix.ParseUnixCredentials(m); err != nil {
				return fds, from, fmt.Errorf("control message: %w", err)
			}
		}
	}
	return fds, from, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		// Linux frees the number whatever close(2) returns, and there is nobody to tell.
		_ = unix.Close(fd)
	}
}

// names returns what is held, for the log.
func (h *holder) names() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	names := make([]string, len(h.held))
	for i, f := range h.held {
		names[i] = f.name
	}
	return names
}

// socketIn is where the keeper of a run directory has its socket.
func socketIn(dir string) string { return filepath.Join(dir, "keep.sock") }
