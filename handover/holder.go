package handover

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Bounds of what a keeper holds: the daemon's lifeline, and one descriptor per open cache object. Their names have to fit
// one string of a process's environment, LISTEN_FDNAMES: 32 pages with its NUL (MAX_ARG_STRLEN in include/uapi/linux/binfmts.h), or the
// command could never be started again.
const (
	maxHeld  = 16384
	maxNames = 32*4096 - len("LISTEN_FDNAMES=") - 1
)

// maxPassed is how many descriptors the kernel lets one message carry (SCM_MAX_FD in include/net/scm.h, since Linux 2.6.38).
const maxPassed = 253

// A holder is the notify socket and the descriptors that came through it. It is one datagram's work at a time: receiving and working
// off are one step under mu, so that whoever finds the socket empty under mu knows that all that was sent has been worked off.
// Working off a datagram allocates nothing.
type holder struct {
	log  *zap.Logger
	path string
	sock *os.File // unixgram, non-blocking, SO_PASSCRED
	done chan struct{}
	// A value is sent when another process has become the main one.
	moved chan struct{}

	mu     sync.Mutex
	closed bool
	in     datagram

	held  []heldFD
	names []byte // of all held, in that order, with colons between: LISTEN_FDNAMES

	pid     int      // of the main process, whose messages are taken; 0: there is none
	former  []int    // were the main process before, and still run: their messages are taken too
	pidfd   *os.File // of the main process, if this process did not start it
	ready   bool     // the main process has said READY=1
	leaving bool     // it has said STOPPING=1
	alive   time.Time
}

// A heldFD is a raw number rather than an *os.File: the runtime would watch a pollable one with epoll, and wake this process at
// every request the daemon is about to answer.
type heldFD struct {
	fd   int32
	name int32 // its length
}

// A datagram is where one is received, again and again.
type datagram struct {
	raw  syscall.RawConn
	recv func(fd uintptr) // receive, made a function value once
	text []byte
	oob  []byte
	fds  []int

	iov            unix.Iovec
	head           unix.Msghdr
	n, oobn, flags int
	err            error
}

func newDatagram(sock *os.File) (datagram, error) {
	raw, err := sock.SyscallConn()
	return datagram{
		raw: raw, text: make([]byte, maxDatagram+1), fds: make([]int, 0, maxPassed),
		oob: make([]byte, unix.CmsgSpace(maxPassed*4)+unix.CmsgSpace(unix.SizeofUcred)),
	}, err
}

// receive is unix.Recvmsg without the sender's address, which costs an allocation.
func (d *datagram) receive(fd uintptr) {
	d.iov.Base = &d.text[0]
	d.iov.SetLen(len(d.text))
	for {
		d.head = unix.Msghdr{Iov: &d.iov, Control: &d.oob[0]}
		d.head.SetIovlen(1)
		d.head.SetControllen(len(d.oob))
		n, _, errno := unix.Syscall(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(&d.head)), unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
		if errno == unix.EINTR {
			continue
		}
		d.n, d.oobn, d.flags, d.err = int(n), int(d.head.Controllen), int(d.head.Flags), nil
		if errno != 0 {
			d.n, d.oobn, d.err = 0, 0, errno
		}
		return
	}
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
	h := &holder{
		log: log, path: path, sock: os.NewFile(uintptr(fd), path), done: make(chan struct{}), moved: make(chan struct{}, 1),
		held: make([]heldFD, 0, maxHeld), names: make([]byte, 0, maxNames),
	}
	if h.in, err = newDatagram(h.sock); err != nil {
		return nil, errors.Join(err, h.sock.Close())
	}
	h.in.recv = h.in.receive
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
	err := h.in.raw.Read(func(uintptr) bool {
		h.drain()
		return false // wait until there is more
	})
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
	for h.next() {
	}
	return len(h.held)
}

// next works off one datagram, and says whether there was one. It runs under mu.
func (h *holder) next() bool {
	d := &h.in
	err := d.raw.Control(d.recv)
	if err == nil {
		err = d.err
	}
	if err != nil {
		if err != unix.EAGAIN && !h.closed {
			h.log.Error("receive a notification", zap.Error(err))
		}
		return false
	}
	fds, from, err := parseControl(d.oob[:d.oobn], d.fds[:0])
	if err == nil {
		err = h.process(d.text[:d.n], fds, from, d.flags)
	}
	if err != nil {
		closeAll(fds)
		h.log.Warn("notification dropped, with the descriptors in it", zap.Error(err), zap.Int("descriptors", len(fds)))
	}
	return true
}

// process works off one datagram. It owns fds if and only if it returns nil.
func (h *holder) process(b []byte, fds []int, from unix.Ucred, flags int) error {
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return fmt.Errorf("it was truncated (flags %#x)", flags)
	}
	// The kernel fills in the credentials; only root can claim another process's.
	pid := int(from.Pid)
	if pid == 0 || h.pid == 0 || pid != h.pid && !slices.Contains(h.former, pid) {
		return fmt.Errorf("it is not from the process that this keeper started (%d) but from %d of user %d", h.pid, from.Pid, from.Uid)
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
	case m.mainPID != 0 && m.mainPID != h.pid:
		if pid != h.pid {
			return fmt.Errorf("MAINPID=%d from process %d, which is not the main one any more", m.mainPID, pid)
		}
		return h.follow(m.mainPID)
	}
	if pid == h.pid {
		h.hear(&m)
	}
	return nil
}

// hear takes in what the main process says of itself.
func (h *holder) hear(m *message) {
	if m.ready && !h.ready {
		h.ready, h.alive = true, time.Now()
		h.log.Info("the command is ready", zap.Int("pid", h.pid))
	}
	if m.watchdog {
		h.alive = time.Now()
	}
	if m.stopping {
		h.leaving = true
	}
	if m.reloading {
		h.log.Info("the command reloads", zap.Int("pid", h.pid))
	}
	if len(m.status) > 0 {
		if e := h.log.Check(zap.DebugLevel, "status"); e != nil {
			e.Write(zap.ByteString("status", m.status))
		}
	}
}

// follow makes another process the main one.
func (h *holder) follow(pid int) error {
	// The descriptor first: if the process has this one above it afterwards, it is the one that the descriptor is of.
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("MAINPID=%d: %w", pid, err)
	}
	if err := descends(pid, os.Getpid()); err != nil {
		closeAll([]int{fd})
		return fmt.Errorf("MAINPID=%d: %w", pid, err)
	}
	h.forgetMain()
	h.former = append(slices.DeleteFunc(h.former, func(p int) bool { return p == pid }), h.pid)
	h.pid, h.pidfd, h.alive, h.leaving = pid, os.NewFile(uintptr(fd), "pidfd"), time.Now(), false
	h.log.Info("the command has handed over to another process", zap.Int("from", h.former[len(h.former)-1]), zap.Int("pid", pid))
	select {
	case h.moved <- struct{}{}:
	default: // told already
	}
	return nil
}

// forgetMain closes what is kept of the main process. It runs under mu.
func (h *holder) forgetMain() {
	if h.pidfd != nil {
		_ = h.pidfd.Close()
		h.pidfd = nil
	}
}

// begin is called before a main process is started that nothing is known of, and after it has been under its id.
func (h *holder) begin(pid int) {
	h.forgetMain()
	h.pid, h.former, h.ready, h.leaving = pid, h.former[:0], false, false
}

// gone forgets a process that was the main one before, and has ended.
func (h *holder) gone(pid int) {
	h.drain() // what it sent last still counts
	h.mu.Lock()
	defer h.mu.Unlock()
	h.former = slices.DeleteFunc(h.former, func(p int) bool { return p == pid })
}

func (h *holder) store(name []byte, fds []int) error {
	if len(fds) == 0 {
		return errors.New("FDSTORE=1 without a descriptor")
	}
	if len(h.held)+len(fds) > maxHeld {
		return fmt.Errorf("descriptor %q: this keeper already holds %d, and takes no more than %d", name, len(h.held), maxHeld)
	}
	if len(h.names)+len(fds)*(len(name)+1) > maxNames {
		return fmt.Errorf("descriptor %q: the names of what is held have %d bytes, and LISTEN_FDNAMES takes no more than %d", name, len(h.names), maxNames)
	}
	for _, fd := range fds {
		if len(h.held) > 0 {
			h.names = append(h.names, ':')
		}
		h.names = append(h.names, name...)
		h.held = append(h.held, heldFD{int32(fd), int32(len(name))})
	}
	if e := h.log.Check(zap.DebugLevel, "descriptor stored"); e != nil {
		e.Write(zap.ByteString("name", name), zap.Int("held", len(h.held)))
	}
	return nil
}

func (h *holder) remove(name []byte) {
	kept, names, at := h.held[:0], h.names[:0], 0
	for _, f := range h.held {
		its := h.names[at : at+int(f.name)]
		at += int(f.name) + 1
		if bytes.Equal(its, name) {
			_ = unix.Close(int(f.fd)) // see closeAll
			continue
		}
		if len(kept) > 0 {
			names = append(names, ':')
		}
		kept, names = append(kept, f), append(names, its...) // never ahead of what is still to be read
	}
	h.held, h.names = kept, names
	if e := h.log.Check(zap.DebugLevel, "descriptor removed"); e != nil {
		e.Write(zap.ByteString("name", name), zap.Int("held", len(h.held)))
	}
}

// close ends receive and removes the socket. Keep calls it when nothing is held; after a failed start it may be called with
// receive never run.
func (h *holder) close() error {
	h.mu.Lock()
	h.closed = true
	h.forgetMain()
	h.mu.Unlock()
	return errors.Join(h.sock.Close(), os.Remove(h.path))
}

// parseControl takes the descriptors, which it appends to fds, and the sender out of a packet's control messages; without a sender
// its process id is 0. The descriptors are the caller's, also beside an error.
func parseControl(oob []byte, fds []int) (_ []int, from unix.Ucred, err error) {
	for len(oob) > 0 {
		head, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			return fds, from, fmt.Errorf("control message: %w", err)
		}
		oob = rest
		if head.Level != unix.SOL_SOCKET {
			continue
		}
		switch head.Type {
		case unix.SCM_RIGHTS:
			if len(data)%4 != 0 {
				return fds, from, fmt.Errorf("control message: %d bytes of descriptors", len(data))
			}
			for ; len(data) > 0; data = data[4:] {
				fds = append(fds, int(int32(binary.NativeEndian.Uint32(data))))
			}
		case unix.SCM_CREDENTIALS: // struct ucred in include/linux/socket.h
			if len(data) != unix.SizeofUcred {
				return fds, from, fmt.Errorf("control message: %d bytes of credentials", len(data))
			}
			from = unix.Ucred{
				Pid: int32(binary.NativeEndian.Uint32(data)), Uid: binary.NativeEndian.Uint32(data[4:]), Gid: binary.NativeEndian.Uint32(data[8:]),
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

// listing returns how many are held that mounts may depend on, and the names of the first of them, for people. No mount depends on a socket.
func (h *holder) listing() (n int, names []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := strings.Split(string(h.names), ":")
	for i, f := range h.held {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.fd), &st); err == nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK {
			continue
		}
		if n++; n <= 16 {
			names = append(names, all[i])
		}
	}
	return n, names
}

// socketIn is where the keeper of a run directory has its socket.
func socketIn(dir string) string { return filepath.Join(dir, "keep.sock") }
