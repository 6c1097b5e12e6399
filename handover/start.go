package handover

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/state/crash"
)

// socketVariable tells a successor who its predecessor is, and where it listens: "PID:PATH".
const socketVariable = "HOLDFAST_HANDOVER"

// StartOptions say how to start a successor.
type StartOptions struct {
	Path string   // the program
	Args []string // its arguments, without its name
	// Env is added to this process's environment, from which all that a supervisor says to one process is taken first: see
	// Store.Environment.
	Env []string
	Dir string // an existing directory, open to nobody else, for the socket and its lock
}

// Start starts a successor, and returns the connection to it once it has dialled. After an error it is dead. The error is a *LockedError if
// another upgrade is under way in Dir. The caller closes the connection.
//
// The successor has this process's standard output and error, and outlives it.
func Start(ctx context.Context, o StartOptions, t Timeouts) (*Conn, error) {
	lock, err := TakeLock(filepath.Join(o.Dir, "handover.lock"))
	if err != nil {
		return nil, err
	}
	c, err := startLocked(ctx, o, t.orDefault())
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", o.Path, err), lock.Close())
	}
	c.release = lock.Close
	return c, nil
}

func startLocked(ctx context.Context, o StartOptions, t Timeouts) (*Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, t.Start, fmt.Errorf("it did not dial within %v", t.Start))
	defer cancel()
	path := filepath.Join(o.Dir, "handover.sock")
	l, err := listen(path)
	if err != nil {
		return nil, err
	}
	defer l.Close() // removes the socket
	crash.Point("handover.start.before-exec")
	child, err := spawn(o, fmt.Sprintf("%s=%d:%s", socketVariable, os.Getpid(), path))
	if err != nil {
		return nil, err
	}
	crash.Point("handover.start.after-exec")
	// It ends the wait for a dial when there is no use in it. Stopped below, or it has done its work.
	stop := context.AfterFunc(ctx, func() { _ = l.SetDeadline(time.Now()) })
	defer stop()
	go func() { // ends with the child, or with this function
		select {
		case <-child.gone():
			cancel()
		case <-ctx.Done():
		}
	}()
	sock, err := accept(l, child.pid)
	if err == nil {
		crash.Point("handover.start.after-accept")
		return &Conn{sock: sock, peer: child}, nil
	}
	select {
	case <-child.gone():
		err = errors.New("it ended before it dialled: see what it said in this daemon's log")
	default:
		if ctx.Err() != nil {
			err = errors.Join(context.Cause(ctx), err)
		}
	}
	return nil, errors.Join(err, child.kill(), child.close())
}

// spawn starts the successor as a child of this process's parent (CLONE_PARENT, clone(2)): its supervisor's, who hears of its end whoever
// of the two processes ends first. systemd takes a MAINPID= that is not its child only with reservations (service.c, service_set_main_pid).
func spawn(o StartOptions, variable string) (*peer, error) {
	path, err := exec.LookPath(o.Path)
	if err != nil {
		return nil, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	pidfd := -1
	pid, err := syscall.ForkExec(path, append([]string{o.Path}, o.Args...), &syscall.ProcAttr{
		Env:   append(slices.Concat(withoutSupervisor(os.Environ()), o.Env), variable),
		Files: []uintptr{null.Fd(), os.Stdout.Fd(), os.Stderr.Fd()},
		Sys:   &syscall.SysProcAttr{Cloneflags: unix.CLONE_PARENT, PidFD: &pidfd},
	})
	if err != nil {
		return nil, err
	}
	if pidfd < 0 { // a kernel without CLONE_PIDFD (Linux 5.2) has none of the engines
		return nil, fmt.Errorf("the kernel gave no descriptor of process %d", pid)
	}
	return newPeer(pid, pidfd)
}

// listen makes the socket at path, in place of one that a dead process left: the caller holds the lock beside it.
func listen(path string) (*net.UnixListener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		if errors.Is(err, unix.EINVAL) {
			err = fmt.Errorf("%w (a socket's path has at most 107 bytes: choose a shorter --run)", err)
		}
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// accept returns the connection from the process with that id, and closes those from others.
func accept(l *net.UnixListener, pid int) (*net.UnixConn, error) {
	var stranger error // the last, for the error
	for {
		sock, err := l.AcceptUnix()
		if err != nil {
			return nil, errors.Join(err, stranger)
		}
		err = checkPeer(sock, pid)
		if err == nil {
			return sock, nil
		}
		stranger = fmt.Errorf("a connection was refused: %w (a script that starts the new release must exec it)", err)
		_ = sock.Close()
	}
}

// checkPeer fails if the socket's other end was not made by the process with that id, of this process's user.
func checkPeer(sock *net.UnixConn, pid int) error {
	raw, err := sock.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(err, credErr); err != nil {
		return fmt.Errorf("ask who is at the other end: %w", err)
	}
	if int(cred.Pid) != pid || int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("at the other end is process %d of user %d, not %d of %d", cred.Pid, cred.Uid, pid, os.Geteuid())
	}
	return nil
}

// ErrNoPredecessor is Dial's error in a process that was not started for an upgrade.
var ErrNoPredecessor = errors.New("not started by a predecessor ($" + socketVariable + " is not set)")

// Succeeds says whether this process was started for an upgrade, and has not dialled yet.
func Succeeds() bool { return os.Getenv(socketVariable) != "" }

// Dial connects a successor to the process that started it, and takes the variable that says where out of the environment. The caller
// closes the connection.
func Dial() (*Conn, error) {
	where := os.Getenv(socketVariable)
	if err := os.Unsetenv(socketVariable); err != nil {
		return nil, err
	}
	if where == "" {
		return nil, ErrNoPredecessor
	}
	number, path, _ := strings.Cut(where, ":")
	pid, err := strconv.Atoi(number)
	if err != nil || pid < 1 {
		return nil, fmt.Errorf("connect to the predecessor: $%s does not begin with a process id", socketVariable)
	}
	p, err := openPeer(pid)
	if err != nil {
		return nil, fmt.Errorf("connect to the predecessor: %w", err)
	}
	sock, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err == nil {
		if err = checkPeer(sock, pid); err != nil {
			err = errors.Join(err, sock.Close())
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("connect to the predecessor at %s: %w", path, err), p.close())
	}
	return &Conn{sock: sock, peer: p}, nil
}

// A peer is the process at the other side, by a descriptor: its id may be another's once it has ended.
type peer struct {
	pid   int
	pidfd *os.File
	done  chan struct{} // closed at its end
	ended sync.WaitGroup
}

func openPeer(pid int) (*peer, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	return newPeer(pid, fd)
}

// newPeer owns pidfd.
func newPeer(pid, pidfd int) (*peer, error) {
	if err := unix.SetNonblock(pidfd, true); err != nil {
		return nil, errors.Join(fmt.Errorf("watch process %d: %w", pid, err), unix.Close(pidfd))
	}
	p := &peer{pid: pid, pidfd: os.NewFile(uintptr(pidfd), "pidfd"), done: make(chan struct{})}
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, p.pidfd.Close())
	}
	// Ends with the process or with close, which waits for it.
	p.ended.Go(func() {
		err := raw.Read(func(fd uintptr) bool {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
			return n > 0 && err == nil
		})
		if err == nil {
			close(p.done)
		}
	})
	return p, nil
}

func (p *peer) id() int { return p.pid }

func (p *peer) gone() <-chan struct{} { return p.done }

func (p *peer) kill() error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var killErr error
	err = raw.Control(func(fd uintptr) { killErr = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
	if errors.Is(killErr, unix.ESRCH) {
		killErr = nil
	}
	if err = errors.Join(err, killErr); err != nil {
		return fmt.Errorf("kill process %d: %w", p.pid, err)
	}
	<-p.done
	return nil
}

func (p *peer) close() error {
	err := p.pidfd.Close()
	p.ended.Wait()
	return err
}
