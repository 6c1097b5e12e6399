package killer

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A tracer is one thread's work from its first to its last line: the kernel takes ptrace requests from no other.
type tracer struct {
	kills  []Kill
	daemon string // path of its binary
	out    *os.File

	root    int // the keeper
	threads map[int]*thread
	lives   map[int]*life // that run, by process id
	begun   int           // how many lives there were
}

// A thread is one that is traced.
type thread struct {
	process int
	started bool // the stop with which a traced thread begins is over
	leaving bool // killed at the exit of the call it is in
}

// A life is a daemon that runs.
type life struct {
	Life
	kill Kill
}

const options = unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEEXEC |
	unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACESECCOMP | unix.PTRACE_O_EXITKILL

// run starts the keeper and follows it to its end. It passes signals on to it, and returns its exit code.
func (t *tracer) run(keeper []string) (int, error) {
	runtime.LockOSThread()
	if len(keeper) == 0 {
		return 2, errors.New("no command given")
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	pid, err := syscall.ForkExec(keeper[0], keeper, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Ptrace: true},
	})
	if err != nil {
		return 2, fmt.Errorf("start %s: %w", keeper[0], err)
	}
	t.root = pid
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, 0, nil); err != nil || !status.Stopped() {
		return 2, fmt.Errorf("%s does not stop for its tracer: %v, status %#x", keeper[0], err, status)
	}
	if err := unix.PtraceSetOptions(pid, options); err != nil {
		return 2, fmt.Errorf("trace %s: %w", keeper[0], err)
	}
	t.threads[pid] = &thread{process: pid, started: true}
	go func() { // ends with the process
		for s := range signals {
			_ = unix.Kill(pid, s.(syscall.Signal))
		}
	}()
	if err := unix.PtraceCont(pid, 0); err != nil {
		return 2, err
	}
	return t.follow()
}

// follow handles every stop and end, until the keeper's end.
func (t *tracer) follow() (int, error) {
	for {
		var status unix.WaitStatus
		tid, err := unix.Wait4(-1, &status, unix.WALL, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 2, fmt.Errorf("wait: %w", err)
		}
		if status.Stopped() {
			if err := t.stopped(tid, status); err != nil && !errors.Is(err, unix.ESRCH) { // ESRCH: it was killed meanwhile
				return 2, fmt.Errorf("thread %d, status %#x: %w", tid, uint32(status), err)
			}
			continue
		}
		delete(t.threads, tid)
		if l := t.lives[tid]; l != nil {
			delete(t.lives, tid)
			if err := json.NewEncoder(t.out).Encode(l.Life); err != nil {
				return 2, err
			}
		}
		if tid == t.root {
			if status.Signaled() {
				return 128 + int(status.Signal()), nil
			}
			return status.ExitStatus(), nil
		}
	}
}

// stopped handles a stop and lets the thread go on.
func (t *tracer) stopped(tid int, status unix.WaitStatus) error {
	th, err := t.thread(tid)
	if err != nil {
		return err
	}
	sig := status.StopSignal()
	switch {
	case sig == unix.SIGTRAP && status.TrapCause() == unix.PTRACE_EVENT_EXEC:
		if err := t.executed(tid); err != nil {
			return err
		}
		sig = 0
	case sig == unix.SIGTRAP && status.TrapCause() == unix.PTRACE_EVENT_SECCOMP:
		return t.called(tid, th)
	case sig == unix.SIGTRAP && status.TrapCause() > 0: // a fork or clone: the new one stops by itself
		sig = 0
	case sig == unix.SIGTRAP|0x80:
		if th.leaving {
			return t.returned(tid, th)
		}
		sig = 0
	case sig == unix.SIGSTOP && !th.started:
		th.started = true
		sig = 0
	}
	return unix.PtraceCont(tid, int(sig))
}

// thread finds a thread, which may stop before the one that made it has said so.
func (t *tracer) thread(tid int) (*thread, error) {
	if th := t.threads[tid]; th != nil {
		return th, nil
	}
	b, err := os.ReadFile("/proc/" + strconv.Itoa(tid) + "/status")
	if err != nil {
		return nil, unix.ESRCH
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "Tgid:"); ok {
			process, err := strconv.Atoi(strings.TrimSpace(rest))
			t.threads[tid] = &thread{process: process}
			return t.threads[tid], err
		}
	}
	return nil, fmt.Errorf("/proc/%d/status names no process", tid)
}

// executed begins a life if the process, which has but this thread now, has become the daemon.
func (t *tracer) executed(pid int) error {
	t.threads[pid] = &thread{process: pid, started: true}
	exe, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe")
	if err != nil {
		return err
	}
	cmdline, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	if err != nil {
		return err
	}
	if !isDaemon(exe, strings.Split(string(cmdline), "\x00"), t.daemon) {
		return nil
	}
	l := &life{Life: Life{Life: t.begun, PID: pid}}
	if t.begun < len(t.kills) {
		l.kill = t.kills[t.begun]
	}
	t.begun++
	t.lives[pid] = l
	return nil
}

// called counts a call of the daemon's, and kills it there if it is the one.
func (t *tracer) called(tid int, th *thread) error {
	l := t.lives[th.process]
	if l == nil || l.Killed != "" {
		return unix.PtraceCont(tid, 0)
	}
	l.Calls++
	if l.Calls != l.kill.Call {
		return unix.PtraceCont(tid, 0)
	}
	l.Killed = l.kill.String() + " " + describe(tid)
	if l.kill.Exit {
		th.leaving = true
		return unix.PtraceSyscall(tid, 0)
	}
	return unix.Kill(th.process, unix.SIGKILL)
}

// returned kills the daemon at the exit of a call.
func (t *tracer) returned(tid int, th *thread) error {
	if l := t.lives[th.process]; l != nil {
		l.Killed += describe(tid)
	}
	return unix.Kill(th.process, unix.SIGKILL)
}

// syscallInfo is struct ptrace_syscall_info of include/uapi/linux/ptrace.h.
type syscallInfo struct {
	op     uint8
	_      [3]byte
	_      uint32
	_, _   uint64
	number uint64 // at an exit: the result
	args   [6]uint64
	_      uint64
}

// describe says what call a thread is stopped at.
func describe(tid int) string {
	const exit, seccomp = 2, 3 // PTRACE_SYSCALL_INFO_*
	var i syscallInfo
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(tid), unsafe.Sizeof(i), uintptr(unsafe.Pointer(&i)), 0, 0)
	switch {
	case errno != 0:
		return "?"
	case i.op == exit:
		return fmt.Sprintf(" = %d", int64(i.number))
	case i.op == seccomp:
		return fmt.Sprintf("%s(%#x, %#x, %#x, %#x)", Set[int(i.number)], i.args[0], i.args[1], i.args[2], i.args[3])
	}
	return "?"
}
