package handover

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// stuckTime is how long what was killed may take to end before the command is started beside it.
const stuckTime = time.Second

// startAgain starts the command as soon as nothing is left of what it was but what will never run again.
//
// A process that SIGKILL was sent to executes no instruction of its own any more, whatever it sleeps in: on its way back to user space it
// meets the signal, and does not get by (kernel/signal.c, get_signal). So it reads no engine and answers nothing. And what it sleeps in
// may need the new command to end: the mount of an image waits uninterruptibly for what only the daemon can answer. It may still
// have descriptors and locks; a command that wants those fails, and is tried again.
func (k *keeper) startAgain() {
	k.again, k.recheck, k.starting = nil, nil, false
	if k.child != 0 {
		return // two things wanted it
	}
	pids, err := killDescendants()
	if err != nil {
		k.retry("what is left of the command cannot be killed", zap.Error(err))
		return
	}
	if left := k.wait(pids, time.Now()); left > 0 {
		k.starting, k.recheck = true, time.After(left) // or reap is sooner
		return
	}
	if err := k.start(); err != nil {
		k.retry("the command cannot be started", zap.Error(err))
	}
}

// wait notes which processes have been killed, and returns how long to wait for those that may still end.
func (k *keeper) wait(pids []int, now time.Time) (left time.Duration) {
	killed := make(map[int]time.Time, len(pids))
	var fresh, stuck []int
	for _, pid := range pids {
		since, ok := k.killed[pid]
		switch {
		case !ok:
			since = now
			fresh = append(fresh, pid)
		case !since.IsZero() && now.Sub(since) >= stuckTime:
			since = time.Time{} // said once
			stuck = append(stuck, pid)
		}
		if !since.IsZero() {
			left = max(left, stuckTime-now.Sub(since))
		}
		killed[pid] = since
	}
	k.killed = killed
	if len(fresh) > 0 {
		k.Log.Warn("processes are left of the command, and killed before it is started again", zap.Ints("processes", fresh))
	}
	if len(stuck) > 0 {
		k.Log.Warn("processes that were killed do not end, for they sleep in the kernel: the command is started beside them, they never run again",
			zap.Ints("processes", stuck), zap.Duration("waited", stuckTime))
	}
	return left
}

// start starts the command through the trampoline.
func (k *keeper) start() error {
	k.wakeNoMore() // what is held is the command's to poll
	h := k.holder
	h.mu.Lock()
	defer h.mu.Unlock() // its first message waits until its id is known
	argv := slices.Concat(k.Trampoline, k.Command)
	env := k.environment(os.Environ())
	files := []uintptr{0, 1, 2}
	for _, f := range h.held {
		files = append(files, uintptr(f.fd))
	}
	// Its own process group: what a terminal sends on ^C comes from here, once. No parent-death signal: see Keep.
	pid, err := syscall.ForkExec("/proc/self/exe", argv, &syscall.ProcAttr{
		Env: env, Files: files, Sys: &syscall.SysProcAttr{Setpgid: true},
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", k.Command[0], err)
	}
	k.child, k.started, k.aborted = pid, time.Now(), false
	h.begin(pid)
	if k.Watchdog > 0 {
		k.watchdog.Reset(k.Watchdog)
	}
	k.Log.Info("the command was started", zap.Int("pid", pid), zap.Strings("command", k.Command), zap.Int("descriptors", len(h.held)))
	return nil
}

// supervisorVariables are what a supervisor says to the one process it starts, and to no other.
var supervisorVariables = []string{
	"NOTIFY_SOCKET", "FDSTORE", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID",
	"WATCHDOG_PID", "WATCHDOG_USEC", "SYSTEMD_EXEC_PID", wakesVariable,
}

// wakesVariable says which of the descriptors that the supervisor holds make it start the daemon again when they are readable: names separated
// by colons, or "*" for all. systemd has no such word: a unit says it with Environment= where a socket unit does it.
const wakesVariable = "HOLDFAST_WAKES"

// environment is env with what this keeper says in place of what its own supervisor said to it.
func (k *keeper) environment(env []string) []string {
	h := k.holder
	env = append(withoutSupervisor(env), "NOTIFY_SOCKET="+h.path, "FDSTORE="+strconv.Itoa(maxHeld), wakesVariable+"=*")
	if k.score != "" {
		env = append(env, scoreVariable+"="+k.score)
	}
	if n := len(h.held); n > 0 {
		env = append(env, "LISTEN_FDS="+strconv.Itoa(n), "LISTEN_FDNAMES="+string(h.names))
	}
	if k.Watchdog > 0 {
		env = append(env, "WATCHDOG_USEC="+strconv.FormatInt(k.Watchdog.Microseconds(), 10))
	}
	return env
}

// withoutSupervisor is env without what a supervisor says to the one process it starts, or a predecessor to its successor.
func withoutSupervisor(env []string) []string {
	return slices.DeleteFunc(slices.Clone(env), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return name == socketVariable || slices.Contains(supervisorVariables, name)
	})
}

// unknownEnd is the status of a process whose end its parent was told, which was not this process: a failure.
const unknownEnd = unix.WaitStatus(255 << 8)

// exitCode is what a shell would show; a command that died of the signal it was sent to stop it has ended well.
func exitCode(s unix.WaitStatus, passed syscall.Signal) int {
	switch {
	case !s.Signaled():
		return s.ExitStatus()
	case s.Signal() == passed:
		return 0
	}
	return 128 + int(s.Signal())
}

// Limits of how soon a command that keeps dying is started again.
const (
	firstDelay = 100 * time.Millisecond
	lastDelay  = 5 * time.Second
	healthy    = 10 * time.Second // a run this long makes the next start immediate again
)

// A backoff is how long to wait before the next start. The first is immediate: readers are waiting. So is every other after a command that
// was ready and ran for firstDelay: what kills it then is not what it starts with, and it is killed ten times a second at the most.
type backoff struct{ d time.Duration }

// ran takes note of how long the command ran, and whether it was ready.
func (b *backoff) ran(d time.Duration, ready bool) {
	if d >= healthy || ready && d >= firstDelay {
		b.d = 0
	}
}

func (b *backoff) next() time.Duration {
	d := b.d
	b.d = min(max(2*d, firstDelay), lastDelay)
	return d
}
