package handover

import (
	"errors"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// KeepOptions says what Keep keeps.
type KeepOptions struct {
	// Command is what to run, and run again when it dies: a program, looked up in PATH, and its arguments.
	Command []string
	// Trampoline is the start of a command line of this same binary that does nothing but call [Exec] with the arguments that
	// follow it. LISTEN_PID has to be the id of the very process that runs Command, which is known only inside it, and Go cannot
	// run code of its own between fork and exec: so the child is this binary once more, which sets the variable and then
	// becomes Command. Trampoline[0] is only shown in lists of processes; what runs is /proc/self/exe.
	Trampoline []string
	// Dir is an existing directory, open to nobody else, for the keeper's lock and socket. One keeper has it at a time.
	Dir string
	// Watchdog is how long the command may go without saying WATCHDOG=1, from its READY=1 on. Zero: for ever.
	Watchdog time.Duration
	Log      *zap.Logger
}

// IdleCode is the exit code of a command that has nothing to do and expects to be started again when a descriptor held for it is readable. It is
// not 0, which a command that was told to stop ends with: a systemd unit tells the two apart with RestartPreventExitStatus=.
const IdleCode = 7

// Keep runs a command, holds the descriptors that it stores, and gives them back to it each time it has died and is started again.
// The process is Keep's alone: it takes over SIGTERM, SIGINT, SIGHUP and SIGCHLD, reaps every child, becomes the parent of the command's
// orphans, is made the last to be killed for want of memory (the command is not), and is tuned to stay small.
//
//   - SIGTERM and SIGINT are passed on, and end Keep when the command has ended and no descriptor is held. While one is held Keep
//     stays, and says so in its log: mounts may depend on it, and with its last close their readers would get zeros or errors (I4).
//     Meanwhile those who read what is not complete in the cache wait.
//   - SIGHUP is passed on; if the command is not running it is started again.
//
// A command that ends by itself is started again if a descriptor is held, or if it had once said READY=1 and did not end
// with 0; else it ends Keep. The result is the command's exit code, 128+n if signal n ended it, or 0 if that was the signal Keep
// passed on. The error is a *LockedError if another keeper has Dir.
//
// If it ends with [IdleCode] after it has said STOPPING=1 it is idle: it is started again when one of the descriptors held for it is readable, as a
// socket unit does it.
//
// With MAINPID= the command makes a descendant of its own the one that counts: the end of that one is the command's end, and signals go to
// it. Before the command is started again, what is left of it is killed: two daemons would read one engine. What then does not end
// because it sleeps in the kernel is left behind: it never runs again.
//
// If Keep itself is killed, the command is left running: it is then the last to hold its descriptors, and must not be killed with it.
func Keep(o KeepOptions) (exitCode int, err error) {
	if len(o.Command) == 0 || len(o.Trampoline) == 0 {
		return 0, errors.New("keep: no command given")
	}
	lock, err := TakeLock(filepath.Join(o.Dir, "keep.lock"))
	if err != nil {
		return 0, err
	}
	defer lock.Close()
	h, err := newHolder(socketIn(o.Dir), o.Log)
	if err != nil {
		return 0, err
	}
	// The goroutine ends when the deferred close shuts its socket, and is waited for there.
	go h.receive()
	defer func() {
		err = errors.Join(err, h.close())
		<-h.done
	}()
	k := &keeper{KeepOptions: o, holder: h, gone: make(chan int), watchdog: time.NewTimer(time.Hour)}
	if err := k.settle(); err != nil {
		return 0, err
	}
	signals, children := make(chan os.Signal, 8), make(chan os.Signal, 1)
	// Taken over for good: given back while Keep returns, a signal that comes late would end the process, and with its own name.
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	signal.Notify(children, syscall.SIGCHLD) // one is enough to say that there are any
	defer signal.Stop(children)
	return k.run(signals, children)
}

// A keeper is the loop of Keep. One goroutine has it.
type keeper struct {
	KeepOptions
	holder   *holder
	score    string // oom_score_adj that the command is to have; "": this process's
	child    int    // process id of the main process, 0 if none runs
	started  time.Time
	passed   syscall.Signal    // the last signal passed on to child
	stop     bool              // told to stop
	proven   bool              // the command has once said it was ready
	delay    backoff           //
	again    <-chan time.Time  // when to start the command again
	starting bool              // as soon as what is left of the last one has ended
	recheck  <-chan time.Time  // when to look again whether it has
	killed   map[int]time.Time // what is left: since when; zero once it was left behind
	waker    *waker            // while the command is idle
	gone     chan int          // id of a main process that has ended, which another process may have reaped
	watchdog *time.Timer
	aborted  bool // the watchdog has sent SIGABRT
}

// settle makes this process fit to keep.
func (k *keeper) settle() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	var err error
	if k.score, err = guardFromOOM(); err != nil {
		k.Log.Warn("this keeper is not safe from the kernel when memory is short: run it as root", zap.Error(err))
	}
	// What it took to get here is garbage. From now on there is next to none, and waiting for it to double costs more than looking.
	debug.SetGCPercent(10)
	debug.FreeOSMemory()
	return nil
}

func (k *keeper) run(signals, children <-chan os.Signal) (int, error) {
	if err := k.start(); err != nil {
		return 0, err
	}
	for {
		var woken <-chan struct{}
		if k.waker != nil {
			woken = k.waker.woken
		}
		code, ended := 0, false
		select {
		case s := <-signals:
			ended = k.signalled(s.(syscall.Signal))
		case <-children:
			code, ended = k.reap()
		case <-k.holder.moved:
			k.follow()
		case pid := <-k.gone:
			if pid == k.child { // its parent is not this process, or has not told
				if code, ended = k.reap(); !ended && pid == k.child {
					code, ended = k.ended(unknownEnd)
				}
			}
		case <-woken:
			k.Log.Info("a held descriptor is readable: the idle command is wanted")
			k.wakeNoMore()
			k.startAgain()
		case <-k.watchdog.C:
			k.late()
		case <-k.again:
			k.startAgain()
		case <-k.recheck:
			k.startAgain()
		}
		if ended {
			return code, nil
		}
	}
}

// signalled passes a signal on, or acts on it while the command is not running, and says whether that ends the keeper.
func (k *keeper) signalled(s syscall.Signal) bool {
	stopping := s != syscall.SIGHUP
	k.stop = stopping
	if k.child != 0 {
		if stopping {
			k.passed = s
		}
		if err := syscall.Kill(k.child, s); err != nil {
			k.Log.Error("pass a signal on", zap.Stringer("signal", s), zap.Int("pid", k.child), zap.Error(err))
		}
		return false
	}
	if !stopping {
		k.again = time.After(0)
		return false
	}
	k.again, k.recheck, k.starting = nil, nil, false
	k.wakeNoMore()
	return !k.holdOn()
}

// reap takes in the end of every child that has ended, and returns the keeper's exit code if that ends it.
func (k *keeper) reap() (int, bool) {
	code, ended := 0, false
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || pid == 0 {
			break
		}
		if pid == k.mainPID() {
			code, ended = k.ended(status)
		} else {
			delete(k.killed, pid)
			k.holder.gone(pid)
		}
	}
	if !ended && k.starting {
		k.startAgain()
	}
	return code, ended
}

// mainPID works off what was sent, MAINPID= above all, before it says which process is the main one.
func (k *keeper) mainPID() int {
	if k.child != 0 {
		k.holder.drain()
		k.follow()
	}
	return k.child
}

// follow makes the holder's main process this keeper's.
func (k *keeper) follow() {
	h := k.holder
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.pid == k.child || h.pid == 0 || h.pidfd == nil {
		return
	}
	k.child, k.started, k.aborted = h.pid, time.Now(), false
	pid := k.child
	raw, err := h.pidfd.SyscallConn()
	if err != nil {
		k.Log.Error("watch the command's new process", zap.Int("pid", pid), zap.Error(err))
		return
	}
	// Ends with the process, or when the holder closes the descriptor as another becomes the main one. It may be the loop's last
	// message: nobody receives it when the keeper has ended, and the process with it.
	go func() {
		err := raw.Read(func(fd uintptr) bool {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
			return n > 0 && err == nil
		})
		if err == nil {
			k.gone <- pid
		}
	}()
}

// ended handles the command's end, and returns the keeper's exit code if that ends it too.
func (k *keeper) ended(status unix.WaitStatus) (int, bool) {
	// What the dead process sent last still counts, and must be worked off under its id before another gets it.
	held := k.holder.drain()
	k.holder.mu.Lock()
	ready, leaving := k.holder.ready, k.holder.leaving
	k.holder.begin(0)
	k.holder.mu.Unlock()
	k.proven = k.proven || ready
	ran := time.Since(k.started)
	pid, passed := k.child, k.passed
	k.child, k.passed = 0, 0

	code := exitCode(status, passed)
	fields := []zap.Field{zap.Int("pid", pid), zap.Int("code", code), zap.Duration("after", ran), zap.Int("held", held)}
	switch {
	case k.stop && held > 0:
		k.Log.Info("the command was stopped", fields...)
		return 0, !k.holdOn()
	case k.stop, held == 0 && (code == 0 || !k.proven):
		k.Log.Info("the command ended", fields...)
		return code, true
	case code == IdleCode && leaving && passed == 0 && k.idle(fields):
		return 0, false
	}
	k.delay.ran(ran, ready)
	k.retry("the command ended by itself", fields...)
	return 0, false
}

// idle waits for one of the held descriptors, and says whether there is one to wait for.
func (k *keeper) idle(fields []zap.Field) bool {
	w, err := k.holder.watch()
	if err != nil {
		k.Log.Error("wait for the held descriptors", zap.Error(err))
	}
	if w == nil {
		return false
	}
	k.waker, k.delay = w, backoff{}
	k.Log.Info("the command is idle: it is started again when it is wanted", fields...)
	return true
}

func (k *keeper) wakeNoMore() {
	if k.waker != nil {
		k.waker.close()
		k.waker = nil
	}
}

func (k *keeper) retry(why string, fields ...zap.Field) {
	d := k.delay.next()
	k.Log.Error(why, append(fields, zap.Duration("start again in", d))...)
	k.again = time.After(d)
}

// abortTime is how long the command may take to die of SIGABRT.
const abortTime = 5 * time.Second

// late kills the command if it has not said for too long that it is well, and else looks again when that may be so.
func (k *keeper) late() {
	if k.Watchdog == 0 || k.child == 0 {
		return
	}
	k.holder.drain() // this process may itself have been stopped meanwhile
	k.holder.mu.Lock()
	ready, silent := k.holder.ready, time.Since(k.holder.alive)
	k.holder.mu.Unlock()
	s := syscall.SIGABRT
	switch {
	case !ready:
		k.watchdog.Reset(k.Watchdog)
		return
	case silent < k.Watchdog:
		k.aborted = false
		k.watchdog.Reset(k.Watchdog - silent)
		return
	case k.aborted:
		s = syscall.SIGKILL
	}
	k.aborted = true
	k.Log.Error("the command has not said WATCHDOG=1 in time", zap.Int("pid", k.child), zap.Duration("for", silent), zap.Stringer("signal", s))
	if err := syscall.Kill(k.child, s); err != nil {
		k.Log.Error("kill the command", zap.Int("pid", k.child), zap.Error(err))
	}
	k.watchdog.Reset(abortTime)
}

// holdOn says, also to the operator, whether anything is held that keeps the keeper here.
func (k *keeper) holdOn() bool {
	n, names := k.holder.listing()
	if n == 0 {
		return false
	}
	k.Log.Warn("not ending: mounts depend on the descriptors held here, and would read zeros without them. "+
		"Those who read images not complete in the cache wait. To serve them again send this process SIGHUP; to end, do that, "+
		"unmount all images with holdfast umount, and stop it again",
		zap.Int("keeper", os.Getpid()), zap.Strings("descriptors", names), zap.Int("held", n))
	return true
}
