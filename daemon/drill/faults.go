package drill

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"holdfast/daemon"
	"holdfast/daemon/drill/inject"
)

// A Kind names a kind of fault.
type Kind string

// The kinds of faults.
const (
	Kill       Kind = "kill"        // SIGKILL
	Segv       Kind = "segv"        // SIGSEGV
	OOM        Kind = "oom"         // killed by the kernel for want of memory
	Freeze     Kind = "freeze"      // SIGSTOP, later SIGCONT
	Upgrade    Kind = "upgrade"     // hot upgrade to the same binary
	Restart    Kind = "restart"     // of the supervisor's service
	SourceCut  Kind = "source-cut"  // connections are reset and refused
	SourceSlow Kind = "source-slow" // answers begin late and trickle
	DiskFull   Kind = "disk-full"   // no block is left to the cache
	Files      Kind = "fds"         // no file descriptor is left to the daemon
)

// Kinds lists all of them.
func Kinds() []Kind {
	return []Kind{Kill, Segv, OOM, Freeze, Upgrade, Restart, SourceCut, SourceSlow, DiskFull, Files}
}

// An action is how a fault is done.
type action struct {
	replaces bool               // another process is the daemon afterwards
	plan     func(*site) string // what it would do, on what
	cannot   func(*site) error  // why it cannot be done here; nil func or error: it can
	do       func(*call) error  // does it, holds it where it lasts, and takes it back
}

// A call is one fault being done.
type call struct {
	*site
	ctx    context.Context // of the fault: it does not end with the drill
	stop   context.Context // of the drill: what is held is let go when it ends
	pid    int             // of the daemon
	detail string
	ended  time.Duration // when what was held was let go, or what was done was done
}

// A notDone error says why a fault that seemed possible could not be done. Nothing was harmed.
type notDone struct{ error }

func (e notDone) Unwrap() error { return e.error }

// spareFiles is how many descriptors are left to a daemon that is starved of them: enough for it to try.
const spareFiles = 2

// slowPace is what is left of a source that became slow.
var slowPace = pace{latency: 500 * time.Millisecond, rate: 1 << 20}

var actions = map[Kind]action{
	Kill: {replaces: true, do: signalled((*inject.Process).Kill), plan: func(s *site) string {
		return fmt.Sprintf("send SIGKILL to %s; %s starts another", s.process(), s.supervisor)
	}},
	Segv: {replaces: true, do: signalled((*inject.Process).Fault), plan: func(s *site) string {
		return fmt.Sprintf("send SIGSEGV to %s; %s starts another", s.process(), s.supervisor)
	}},
	OOM: {replaces: true, do: outOfMemory, cannot: cannotOOM, plan: func(s *site) string {
		return fmt.Sprintf("move %s to a memory cgroup of its own with a limit of %d KiB, until the kernel kills it", s.process(), oomLimit>>10)
	}},
	Freeze: {do: freeze, plan: func(s *site) string {
		return fmt.Sprintf("send SIGSTOP to %s, and SIGCONT after %v", s.process(), s.hold)
	}},
	Upgrade: {replaces: true, do: upgrade, plan: func(s *site) string {
		return fmt.Sprintf("have %s hand over to a new one of the same binary", s.process())
	}},
	Restart: {replaces: true, do: restart, cannot: cannotRestart, plan: func(s *site) string {
		if s.supervisor.unit != "" {
			return "run systemctl restart " + s.supervisor.unit
		}
		return fmt.Sprintf("send SIGTERM to %s, and SIGHUP when the daemon has ended", s.supervisor)
	}},
	SourceCut: {do: sourceCut, cannot: cannotSource, plan: func(s *site) string {
		return fmt.Sprintf("reset and refuse the connections of the drill's own registry for %v", s.hold)
	}},
	SourceSlow: {do: sourceSlow, cannot: cannotSource, plan: func(s *site) string {
		return fmt.Sprintf("let the drill's own registry answer after %v and with %d KiB/s, for %v", slowPace.latency, slowPace.rate>>10, s.hold)
	}},
	DiskFull: {do: diskFull, cannot: cannotFill, plan: func(s *site) string {
		return fmt.Sprintf("fill the file system of %s with one file, for %v", s.cacheDir(), s.hold)
	}},
	Files: {do: files, plan: func(s *site) string {
		return fmt.Sprintf("lower the limit of %s to %d more file descriptors than it has, for %v", s.process(), spareFiles, s.hold)
	}},
}

// held does a fault that lasts: it is told to the holds for as long as it does.
func (c *call) held(k Kind) {
	end := c.holds.begin(k, c.now())
	select {
	case <-time.After(c.hold):
	case <-c.stop.Done():
	}
	defer func() { end(c.ended) }()
	c.ended = c.now()
}

func signalled(send func(*inject.Process) error) func(*call) error {
	return func(c *call) error {
		p, err := inject.Find(c.pid)
		if err != nil {
			return err
		}
		defer p.Release()
		err = send(p)
		c.ended = c.now()
		if err != nil {
			return err
		}
		return c.gone(c.ctx, p)
	}
}

func freeze(c *call) error {
	p, err := inject.Find(c.pid)
	if err != nil {
		return err
	}
	defer p.Release()
	if err := p.Freeze(); err != nil {
		return err
	}
	c.held(Freeze)
	err = p.Thaw()
	if errors.Is(err, inject.ErrGone) { // a watchdog's work
		c.detail = "the daemon was ended while it was frozen"
		return nil
	}
	return err
}

func upgrade(c *call) error {
	ctx, cancel := context.WithTimeout(c.ctx, c.back)
	defer cancel()
	r, err := c.client.Upgrade(ctx, daemon.UpgradeRequest{})
	c.ended = c.now()
	var e *daemon.Error
	if errors.As(err, &e) && e.Status == 404 {
		return notDone{errors.New("this daemon has no hot upgrade")}
	}
	if err != nil {
		return fmt.Errorf("upgrade: %w", err)
	}
	c.detail = fmt.Sprintf("process %d after a pause of %v", r.PID, r.Pause)
	return nil
}

func cannotRestart(s *site) error {
	switch {
	case s.supervisor == supervisor{}:
		return errors.New("it is unknown who would start the daemon again: neither a keeper nor a systemd unit was found above it")
	case s.supervisor.unit != "":
		if _, err := exec.LookPath("systemctl"); err != nil {
			return err
		}
	}
	return nil
}

func restart(c *call) error {
	if c.supervisor.unit != "" {
		ctx, cancel := context.WithTimeout(c.ctx, c.back)
		defer cancel()
		out, err := exec.CommandContext(ctx, "systemctl", "restart", c.supervisor.unit).CombinedOutput()
		c.ended = c.now()
		if err != nil {
			return fmt.Errorf("systemctl restart %s: %w: %s", c.supervisor.unit, err, strings.TrimSpace(string(out)))
		}
		return nil
	}
	if st, err := c.ask(c.ctx); err != nil {
		return notDone{fmt.Errorf("whether anything is mounted, without which the keeper would end, cannot be asked: %w", err)}
	} else if st.Mounts == 0 {
		return notDone{errors.New("nothing is mounted, and the keeper would end")}
	}
	old, err := inject.Find(c.pid)
	if err != nil {
		return err
	}
	defer old.Release()
	keeper, err := inject.Find(c.supervisor.keeper)
	if err != nil {
		return err
	}
	defer keeper.Release()
	if err := keeper.Terminate(); err != nil {
		return err
	}
	if err := c.gone(c.ctx, old); err != nil {
		return err
	}
	c.ended = c.now()
	// To a keeper that has not taken note yet this says as well that the daemon is to run.
	return keeper.Hangup()
}

func cannotSource(s *site) error {
	if s.source == nil {
		return errNoSource
	}
	return nil
}

func sourceCut(c *call) error {
	c.source.shaper.cut(true)
	c.held(SourceCut)
	c.source.shaper.cut(false)
	return nil
}

func sourceSlow(c *call) error {
	old := c.source.shaper.get()
	c.source.shaper.set(slowPace)
	c.held(SourceSlow)
	c.source.shaper.set(old)
	return nil
}

func cannotFill(s *site) error {
	if !s.diskFull && !s.dedicated() {
		return fmt.Errorf("%s is not on a file system of its own, and filling it would fill others' as well: --allow-disk-full does it all the same", s.status.Root)
	}
	return nil
}

func diskFull(c *call) error {
	taken, undo, err := inject.Fill(filepath.Join(c.cacheDir(), ".holdfast-drill-fills-the-disk"))
	if err != nil {
		return notDone{err}
	}
	c.detail = fmt.Sprintf("%d MiB were free", taken>>20)
	c.held(DiskFull)
	return undo()
}

func files(c *call) error {
	p, err := inject.Find(c.pid)
	if err != nil {
		return err
	}
	defer p.Release()
	limit, undo, err := p.LimitFiles(spareFiles)
	if err != nil {
		return notDone{err}
	}
	c.detail = fmt.Sprintf("limit %d", limit)
	c.held(Files)
	return undo()
}
