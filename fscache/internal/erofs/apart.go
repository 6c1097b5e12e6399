package erofs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/state/crash"
)

// A LeftError says that NewApart did not wait for its helper any longer.
type LeftError struct {
	PID int // of the helper, which is killed, and ends when the kernel lets it
	Err error
}

func (e *LeftError) Error() string {
	return fmt.Sprintf("process %d, which makes the mount, is not waited for: %v", e.PID, e.Err)
}

// Unwrap returns why.
func (e *LeftError) Unwrap() error { return e.Err }

// NewApart is New in a process of its own, for file systems whose mount waits for an answer of this process: it waits in uninterruptible
// sleep, in which a process that is killed keeps all it has. When ctx ends first the helper is killed and left behind, and the error is a
// *LeftError.
func NewApart(ctx context.Context, options []Option) (int, error) {
	h, err := startHelper()
	if err != nil {
		return -1, fmt.Errorf("starting a process that mounts: %w", err)
	}
	defer h.conn.Close()
	crash.Point("cachefiles.helper.after-start")
	stop := context.AfterFunc(ctx, func() { _ = h.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	a, fd, err := h.ask(options)
	crash.Point("cachefiles.helper.after-answer")
	switch {
	case err == nil:
		<-h.ended // it has closed its end, which it does by ending
		err = a.err()
	case ctx.Err() != nil:
		err = &LeftError{PID: h.cmd.Process.Pid, Err: errors.Join(context.Cause(ctx), h.kill())}
	default:
		err = errors.Join(err, h.kill())
		<-h.ended
		err = fmt.Errorf("the process that mounts has not said how it went (%v): %w", h.cmd.ProcessState, err)
	}
	if err != nil && fd >= 0 {
		_ = unix.Close(fd)
	}
	if err != nil {
		return -1, err
	}
	return fd, nil
}

// A helper is a process that makes one mount.
type helper struct {
	cmd   *exec.Cmd
	conn  *os.File      // this process's end of the socket
	ended chan struct{} // closed when cmd.ProcessState says how
}

func startHelper() (*helper, error) {
	// Descriptors that came from a supervisor or a test by exec may lack the flag. (Linux 5.11. None is wanted in a program that is started
	// from here otherwise: os/exec makes copies of those that are.)
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EINVAL) {
		return nil, err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	theirs := os.NewFile(uintptr(fds[1]), "socket")
	defer theirs.Close()
	if err := unix.SetNonblock(fds[0], true); err != nil { // for deadlines
		return nil, errors.Join(err, unix.Close(fds[0]))
	}
	h := &helper{conn: os.NewFile(uintptr(fds[0]), "socket"), ended: make(chan struct{})}
	h.cmd = &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{helperName}, Env: []string{}, Dir: "/", Stderr: os.Stderr, ExtraFiles: []*os.File{theirs},
		SysProcAttr: &syscall.SysProcAttr{Setpgid: true}, // a terminal's ^C is the daemon's business
	}
	if err := h.cmd.Start(); err != nil {
		return nil, errors.Join(err, h.conn.Close())
	}
	go func() { // reaps it: ends with the helper, which nobody can make end, or with this process
		_ = h.cmd.Wait() // how it ended is in ProcessState
		close(h.ended)
	}()
	return h, nil
}

func (h *helper) kill() error {
	err := h.cmd.Process.Kill()
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// ask has the helper make the mount. The descriptor, if there is one, is the caller's, also beside an error.
func (h *helper) ask(options []Option) (a answer, fd int, err error) {
	request, err := json.Marshal(options)
	if err != nil {
		return a, -1, err
	}
	raw, err := h.conn.SyscallConn()
	if err != nil {
		return a, -1, err
	}
	if _, err = h.conn.Write(request); err != nil {
		return a, -1, err
	}
	var shutErr error
	if err := raw.Control(func(fd uintptr) { shutErr = unix.Shutdown(int(fd), unix.SHUT_WR) }); err != nil || shutErr != nil {
		return a, -1, errors.Join(err, shutErr)
	}
	crash.Point("cachefiles.helper.after-ask")
	text, fd, err := receive(raw)
	if err == nil {
		err = json.Unmarshal(text, &a)
	}
	if err == nil && a.done() != (fd >= 0) {
		err = fmt.Errorf("its answer has descriptor %d: %s", fd, text)
	}
	return a, fd, err
}

// maxAnswer bounds an answer: the kernel's log of a mount has 8 messages, and option values are short.
const maxAnswer = 64 << 10

// receive reads to the end, and takes the descriptor that comes along, or returns -1. It is the caller's, also beside an error.
func receive(raw syscall.RawConn) (text []byte, fd int, err error) {
	fd = -1
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	for len(text) <= maxAnswer {
		var n, oobn int
		var recvErr error
		err := raw.Read(func(s uintptr) bool {
			for recvErr = unix.EINTR; recvErr == unix.EINTR; {
				n, oobn, _, _, recvErr = unix.Recvmsg(int(s), buf, oob, unix.MSG_CMSG_CLOEXEC)
			}
			return recvErr != unix.EAGAIN
		})
		if err == nil {
			err = recvErr
		}
		if err != nil {
			return text, fd, err
		}
		if got := passed(oob[:oobn]); got >= 0 && fd < 0 {
			fd = got
		} else if got >= 0 {
			_ = unix.Close(got)
		}
		if n == 0 {
			if len(text) == 0 {
				err = io.ErrUnexpectedEOF
			}
			return text, fd, err
		}
		text = append(text, buf[:n]...)
	}
	return text, fd, fmt.Errorf("its answer has more than %d bytes", maxAnswer)
}

// passed returns the descriptor of a control message with room for one, or -1.
func passed(oob []byte) int {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) != 1 || len(messages[0].Data) != 4 { // others make ParseUnixRights panic
		return -1
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return -1
	}
	return fds[0]
}

// An answer says how a helper fared. Both sides are one binary: it has no version.
type answer struct {
	Refused bool       // by the file system: a RefusedError, with Said and Errno
	Said    string     `json:",omitempty"`
	Text    string     `json:",omitempty"` // of any other error
	Errno   unix.Errno `json:",omitempty"` // in the error, or 0
}

func answerOf(err error) (a answer) {
	if err == nil {
		return a
	}
	a.Text = err.Error()
	_ = errors.As(err, &a.Errno)
	var refused *RefusedError
	if errors.As(err, &refused) {
		a.Refused, a.Said = true, refused.Said
	}
	return a
}

func (a answer) done() bool { return a.Text == "" }

// err makes the error that New returned in the helper: what it says, its errno, and that the file system refused.
func (a answer) err() error {
	switch {
	case a.done():
		return nil
	case a.Refused:
		return &RefusedError{Said: a.Said, Err: a.Errno}
	}
	return &helperError{a.Text, a.Errno}
}

// A helperError is an error of New's in a helper.
type helperError struct {
	text  string
	errno unix.Errno
}

func (e *helperError) Error() string { return e.text }

// Unwrap returns the errno, if there is one.
func (e *helperError) Unwrap() error {
	if e.errno == 0 {
		return nil
	}
	return e.errno
}
