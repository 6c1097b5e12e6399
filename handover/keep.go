package handover

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
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
	Log *zap.Logger
}

// Keep runs a command, holds the descriptors that it stores, and gives them back to it each time it has died and is started again.
// It takes over SIGTERM, SIGINT and SIGHUP:
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
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer signal.Stop(signals)
	k := &keeper{KeepOptions: o, holder: h, exited: make(chan unix.WaitStatus, 1)}
	return k.run(signals)
}

// A keeper is the loop of Keep. One goroutine has it.
type keeper struct {
	KeepOptions
	holder  *holder
	exited  chan unix.WaitStatus
	child   int // process id, 0 if none runs
	started time.Time
	passed  syscall.Signal // the last signal passed on to child
	stop    bool           // told to stop
	proven  bool           // the command has once said it was ready
	delay   backoff
	again   <-chan time.Time // when to start the command again
}

func (k *keeper) run(signals <-chan os.Signal) (int, error) {
	if err := k.start(); err != nil {
		return 0, err
	}
	for {
		select {
		case s := <-signals:
			if ended := k.signalled(s.(syscall.Signal)); ended {
				return 0, nil
			}
		case status := <-k.exited:
			if code, ended := k.ended(status); ended {
				return code, nil
			}
		case <-k.again:
			k.again = nil
			if err := k.start(); err != nil {
				k.retry("the command cannot be started", zap.Error(err))
			}
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
	k.again = nil
	return !k.holdOn()
}

// ended handles the command's end, and returns the keeper's exit code if that ends it too.
func (k *keeper) ended(status unix.WaitStatus) (int, bool) {
	// What the dead process sent last still counts, and must be worked off under its id before another gets it.
	held := k.holder.drain()
	k.holder.mu.Lock()
	ready := k.holder.ready
	k.holder.pid, k.holder.ready = 0, false
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
	}
	k.delay.ran(ran)
	k.retry("the command ended by itself", fields...)
	return 0, false
}

func (k *keeper) retry(why string, fields ...zap.Field) {
	d := k.delay.next()
	k.Log.Error(why, append(fields, zap.Duration("start again in", d))...)
	k.again = time.After(d)
}

// holdOn says, also to the operator, whether anything is held that keeps the keeper here.
func (k *keeper) holdOn() bool {
	names := k.holder.names()
	if len(names) == 0 {
		return false
	}
	k.Log.Warn("not ending: mounts depend on the descriptors held here, and would read zeros without them. "+
		"Those who read images not complete in the cache wait. To serve them again send this process SIGHUP; to end, do that, "+
		"unmount all images with holdfast umount, and stop it again",
		zap.Int("keeper", os.Getpid()), zap.Strings("descriptors", names[:min(len(names), 16)]), zap.Int("held", len(names)))
	return true
}

// start starts the command through the trampoline.
func (k *keeper) start() error {
	k.holder.mu.Lock()
	defer k.holder.mu.Unlock() // its first message waits until its id is known
	argv := slices.Concat(k.Trampoline, k.Command)
	env := k.environment(os.Environ())
	files := []uintptr{0, 1, 2}
	for _, f := range k.holder.held {
		files = append(files, uintptr(f.fd))
	}
	// Its own process group: what a terminal sends on ^C comes from here, once. No parent-death signal: see Keep.
	pid, err := syscall.ForkExec("/proc/self/exe", argv, &syscall.ProcAttr{
		Env: env, Files: files, Sys: &syscall.SysProcAttr{Setpgid: true},
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", k.Command[0], err)
	}
	k.child, k.started = pid, time.Now()
	k.holder.pid = pid
	k.Log.Info("the command was started", zap.Int("pid", pid), zap.Strings("command", k.Command), zap.Int("descriptors", len(k.holder.held)))
	// The goroutine ends with the child; run receives what it sends before it starts another.
	go func() {
		var status unix.WaitStatus
		for {
			if _, err := unix.Wait4(pid, &status, 0, nil); err != unix.EINTR {
				break
			}
		}
		k.exited <- status
	}()
	return nil
}

// supervisorVariables are what a supervisor says to the one process it starts, and to no other.
var supervisorVariables = []string{
	"NOTIFY_SOCKET", "FDSTORE", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID",
	"WATCHDOG_PID", "WATCHDOG_USEC", "SYSTEMD_EXEC_PID",
}

// environment is env with what this keeper says in place of what its own supervisor said to it.
func (k *keeper) environment(env []string) []string {
	env = slices.DeleteFunc(slices.Clone(env), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return slices.Contains(supervisorVariables, name)
	})
	env = append(env, "NOTIFY_SOCKET="+k.holder.path, "FDSTORE="+strconv.Itoa(maxHeld))
	if n := len(k.holder.held); n > 0 {
		names := make([]string, n)
		for i, f := range k.holder.held {
			names[i] = f.name
		}
		env = append(env, "LISTEN_FDS="+strconv.Itoa(n), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	}
	return env
}

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

// A backoff is how long to wait before the next start. The first is immediate: readers are waiting.
type backoff struct{ d time.Duration }

// ran takes note of how long the command ran.
func (b *backoff) ran(d time.Duration) {
	if d >= healthy {
		b.d = 0
	}
}

func (b *backoff) next() time.Duration {
	d := b.d
	b.d = min(max(2*d, firstDelay), lastDelay)
	return d
}
