package inject

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Process is a process to be harmed.
type Process struct {
	PID int
	p   *os.Process
}

// Find takes hold of a running process.
func Find(pid int) (*Process, error) {
	if pid <= 1 {
		return nil, fmt.Errorf("process %d is none to inject faults into", pid)
	}
	p, err := os.FindProcess(pid)
	if err != nil {
		return nil, fmt.Errorf("find process %d: %w", pid, err)
	}
	return &Process{pid, p}, nil
}

// Release lets the process be.
func (p *Process) Release() { _ = p.p.Release() }

// Kill sends SIGKILL: the process executes no further instruction of its own.
func (p *Process) Kill() error { return p.signal(unix.SIGKILL) }

// Fault sends SIGSEGV, as a wild pointer does: a Go program writes its goroutines' stacks and exits.
func (p *Process) Fault() error { return p.signal(unix.SIGSEGV) }

// Freeze sends SIGSTOP.
func (p *Process) Freeze() error { return p.signal(unix.SIGSTOP) }

// Thaw sends SIGCONT.
func (p *Process) Thaw() error { return p.signal(unix.SIGCONT) }

// Terminate sends SIGTERM.
func (p *Process) Terminate() error { return p.signal(unix.SIGTERM) }

// Hangup sends SIGHUP.
func (p *Process) Hangup() error { return p.signal(unix.SIGHUP) }

// Gone reports whether the process has ended, whether or not its parent has taken note.
func (p *Process) Gone() bool {
	if p.p.Signal(syscall.Signal(0)) != nil {
		return true
	}
	// A zombie can be signalled. The state follows the command's name, which may hold anything and ends with the last ')'.
	b, err := os.ReadFile("/proc/" + strconv.Itoa(p.PID) + "/stat")
	i := bytes.LastIndexByte(b, ')')
	return err != nil || i < 0 || i+2 >= len(b) || b[i+2] == 'Z' || b[i+2] == 'X'
}

func (p *Process) signal(s syscall.Signal) error {
	if err := p.p.Signal(s); err != nil {
		return fmt.Errorf("send process %d %s: %w", p.PID, unix.SignalName(s), err)
	}
	return nil
}

// LimitFiles lowers the limit on a process's file descriptors so that it can have spare more than it has. undo puts the limit back, and is
// no error if the process has ended.
func (p *Process) LimitFiles(spare int) (limit uint64, undo func() error, err error) {
	entries, err := os.ReadDir("/proc/" + strconv.Itoa(p.PID) + "/fd")
	if err != nil {
		return 0, nil, fmt.Errorf("list the descriptors of process %d: %w", p.PID, err)
	}
	used := map[int]bool{}
	for _, e := range entries {
		if n, err := strconv.Atoi(e.Name()); err == nil {
			used[n] = true
		}
	}
	var old unix.Rlimit
	if err := unix.Prlimit(p.PID, unix.RLIMIT_NOFILE, nil, &old); err != nil {
		return 0, nil, fmt.Errorf("read the descriptor limit of process %d: %w", p.PID, err)
	}
	limit = limitFor(used, spare)
	if limit >= old.Cur {
		return 0, nil, fmt.Errorf("process %d may have no more than %d descriptors as it is", p.PID, old.Cur)
	}
	set := func(cur uint64) error {
		return unix.Prlimit(p.PID, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: cur, Max: old.Max}, nil)
	}
	if err := set(limit); err != nil {
		return 0, nil, fmt.Errorf("lower the descriptor limit of process %d to %d: %w", p.PID, limit, err)
	}
	return limit, func() error {
		if p.Gone() { // and its limit with it; its number may be another's
			return nil
		}
		if err := set(old.Cur); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("put the descriptor limit of process %d back to %d: %w", p.PID, old.Cur, err)
		}
		return nil
	}, nil
}

// limitFor returns the limit below which spare numbers are free. The kernel compares numbers with the limit, not how many there are, so
// descriptors with high numbers stay as they are.
func limitFor(used map[int]bool, spare int) uint64 {
	n := 0
	for ; spare > 0 || used[n]; n++ {
		if !used[n] {
			spare--
		}
	}
	return uint64(n)
}

// Parent returns the number of a process's parent, and the parent's command line.
func Parent(pid int) (ppid int, command []string, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return 0, nil, fmt.Errorf("find the parent of process %d: %w", pid, err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "PPid:"); ok {
			if ppid, err = strconv.Atoi(strings.TrimSpace(v)); err != nil {
				return 0, nil, fmt.Errorf("find the parent of process %d: %w", pid, err)
			}
		}
	}
	b, err = os.ReadFile("/proc/" + strconv.Itoa(ppid) + "/cmdline")
	if err != nil {
		return 0, nil, fmt.Errorf("read the command of process %d: %w", ppid, err)
	}
	return ppid, strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00"), nil
}

// OwnGroup makes a command that was not started yet a process group of its own, which a terminal's ^C does not reach.
func OwnGroup(c *exec.Cmd) { c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }

// ErrGone is wrapped by the errors of signals to a process that has ended.
var ErrGone = os.ErrProcessDone
