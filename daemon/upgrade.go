package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/handover"
)

// UpgradeOptions say how a successor is started.
type UpgradeOptions struct {
	Args        []string // of this process, without its name: the successor gets the same
	Environment []string // what the successor needs beside this process's environment
	Run         string   // directory of the handover socket
	Lock        *os.File // that keeps other daemons out of the run directory, and goes to the successor
	MainPID     func(pid int) error
}

// An UpgradeRequest is the body of POST /v1/upgrade.
type UpgradeRequest struct {
	Binary  string        `json:"binary,omitempty"`     // absolute path of the successor; "": where this daemon's own was started from
	Timeout time.Duration `json:"timeout_ns,omitempty"` // for the successor to get ready; 0: DefaultUpgradeTimeout
}

// An UpgradeResult says how an upgrade went.
type UpgradeResult struct {
	PID     int           `json:"pid"`      // of the successor
	From    string        `json:"from"`     // releases
	To      string        `json:"to"`       //
	Prepare time.Duration `json:"prepare"`  // until the successor was ready, while everything was served
	Pause   time.Duration `json:"pause_ns"` // in which nobody read the kernel's requests
	Left    int           `json:"left"`     // requests that were in flight at the pause
}

// DefaultUpgradeTimeout is how long a successor may take to get ready.
const DefaultUpgradeTimeout = time.Minute

// succession is the predecessor's part in a hot upgrade.
type succession struct {
	under atomic.Bool   // an upgrade is under way: nothing is mounted or unmounted
	over  atomic.Bool   // a successor reads the engine
	done  chan struct{} // closed when this process has nothing left to do
	err   error         // why the successor has not taken everything, once done is closed
	api   *server
	quiet context.CancelFunc // ends what this process tells the supervisor from time to time

	ending context.Context // ends when this process is told to end, which calls off an upgrade
	end    context.CancelFunc
	going  chan struct{} // room for one: an upgrade under way

	awaiting atomic.Bool // awaited is not nil
	mu       sync.Mutex
	awaited  map[uint64]int // requests whose end the successor wants to hear of, and in how many parts each is answered; nil: none
	finished chan uint64    // room for all of awaited
}

// stop ends an upgrade under way, and lets none begin.
func (s *succession) stop() {
	s.end()
	s.going <- struct{}{}
	s.under.Store(true)
}

// report says that a request was answered.
func (s *succession) report(r fscache.Request) {
	if !s.awaiting.Load() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.awaited[r.ID]
	if n == 0 {
		return
	}
	if s.awaited[r.ID]--; n == 1 {
		s.finished <- r.ID
	}
}

// lull has no garbage collected, but for the memory limit's sake, until busy is called, for the first time. One that came while nobody reads
// would be felt by every reader. It is of the whole process, where tests have several daemons.
func lull() (busy func()) {
	lulls.Lock()
	defer lulls.Unlock()
	if lulls.depth++; lulls.depth == 1 {
		lulls.percent = debug.SetGCPercent(-1)
	}
	return sync.OnceFunc(func() {
		lulls.Lock()
		defer lulls.Unlock()
		if lulls.depth--; lulls.depth == 0 {
			debug.SetGCPercent(lulls.percent)
		}
	})
}

var lulls struct {
	sync.Mutex
	depth   int
	percent int // to return to
}

// await makes report tell of these requests.
func (s *succession) await(list []fscache.Pending) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.awaited, s.finished = make(map[uint64]int, len(list)), make(chan uint64, len(list))
	for _, p := range list {
		s.awaited[p.ID]++
	}
	s.awaiting.Store(true)
}

// forget takes await back.
func (s *succession) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.awaiting.Store(false)
	s.awaited = nil
}

// exclude keeps mounting, unmounting and upgrades away until under is false again, or says why it cannot.
func (d *Daemon) exclude() error {
	if !d.succession.under.CompareAndSwap(false, true) {
		return conflict("wait for it to end", "the daemon is being upgraded already, or is ending")
	}
	if !d.changing.TryLock() { // a mount that is being made
		d.succession.under.Store(false)
		return conflict("try again later", "something is being mounted or unmounted")
	}
	d.changing.Unlock()
	// Nothing is culled from here on, when what is being culled has been. It is no reason to refuse.
	d.culling.Lock()
	defer d.culling.Unlock()
	return nil
}

// Upgrade puts another process in this one's place. When it returns nil the successor serves and this process is about to end; after an
// error this process serves as before.
func (d *Daemon) Upgrade(ctx context.Context, r UpgradeRequest) (res UpgradeResult, err error) {
	if d.opt.Upgrade == nil {
		return res, invalid("", "this daemon cannot be upgraded: nothing would supervise its successor")
	}
	if r.Binary == "" {
		if r.Binary, err = ownBinary(); err != nil {
			return res, err
		}
	}
	if !filepath.IsAbs(r.Binary) {
		return res, invalid("give an absolute path", "upgrade to %q", r.Binary)
	}
	s := &d.succession
	select {
	case s.going <- struct{}{}:
		defer func() { <-s.going }()
	default:
		return res, conflict("wait for it to end", "another upgrade is under way")
	}
	if err := d.exclude(); err != nil {
		return res, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.ending, cancel)()
	res, err = s.run(ctx, d, r)
	if err != nil {
		s.under.Store(false)
	}
	return res, err
}

// A start is a successor that was started.
type start interface {
	PID() int
	// Give is handover.Give.
	Give(ctx context.Context, g handover.Giver) (handover.Given, error)
	Close() error
}

// A handing is the start of a real process.
type handing struct {
	*handover.Conn
	hello handover.Hello
	times handover.Timeouts
}

func (h handing) Give(ctx context.Context, g handover.Giver) (handover.Given, error) {
	return handover.Give(ctx, h.Conn, h.hello, g, h.times)
}

// run starts the successor and hands over to it.
func (s *succession) run(ctx context.Context, d *Daemon, r UpgradeRequest) (res UpgradeResult, err error) {
	began := time.Now()
	failed := func(err error) error {
		return newError(http.StatusBadGateway, CodeUpgrade, "this daemon serves on", "upgrade to %s after %v: %w", []any{r.Binary, time.Since(began).Round(time.Millisecond), err})
	}
	conn, err := d.start(ctx, r)
	if err != nil {
		return res, failed(err)
	}
	p := &predecessor{d: d, changes: map[*object]int{}, pid: conn.PID(), given: make(chan struct{})}
	given, err := conn.Give(ctx, p)
	close(p.given)
	err = errors.Join(err, p.close())
	if !given.Taken {
		err = errors.Join(err, conn.Close())
		p.undo()
		return res, failed(err)
	}
	defer close(s.done)
	// The connection's lock says that an upgrade is under way until this process has ended.
	res = UpgradeResult{
		PID: p.pid, From: d.opt.Release, To: given.Peer.Release, Prepare: p.committed.Sub(began), Pause: given.Pause, Left: p.left,
	}
	if err != nil {
		s.err = fmt.Errorf("daemon: process %d, which reads the kernel's requests now, has not taken everything: if it is dead the supervisor has to start the daemon anew: %w", res.PID, err)
	}
	d.log.Info("a successor has taken over", zap.Int("pid", res.PID), zap.String("release", res.To), zap.Duration("pause", res.Pause), zap.Int("left", res.Left))
	return res, nil
}

// startSuccessor starts a successor. This process's own predecessor may not have ended yet.
func (d *Daemon) startSuccessor(ctx context.Context, r UpgradeRequest) (start, error) {
	u := d.opt.Upgrade
	o := handover.StartOptions{Path: r.Binary, Args: u.Args, Env: u.Environment, Dir: u.Run}
	h := handing{
		hello: Hello(d.opt.Release),
		times: handover.Timeouts{Prepare: cmp.Or(r.Timeout, DefaultUpgradeTimeout), Drain: d.opt.StopTimeout + drainGrace},
	}
	ctx, cancel := context.WithTimeout(ctx, h.times.Drain)
	defer cancel()
	for {
		var err error
		var locked *handover.LockedError
		h.Conn, err = handover.Start(ctx, o, h.times)
		if err == nil {
			return h, nil
		}
		if !errors.As(err, &locked) || sleep(ctx, lockInterval) != nil {
			return nil, err
		}
	}
}

// lockInterval is the time between two looks whether the predecessor has ended.
const lockInterval = 5 * time.Millisecond

// drainGrace is for how much longer than its stop timeout a predecessor may take to end.
const drainGrace = 5 * time.Second

// Hello is what a process of a release says to the other side of a handover.
func Hello(release string) handover.Hello {
	return handover.Hello{Release: release, Understands: kinds, Needs: kinds}
}

// ownBinary is where this process's program was started from: what is there now, which a package manager may have replaced.
func ownBinary() (string, error) {
	path, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program: %w", err)
	}
	return strings.TrimSuffix(path, " (deleted)"), nil
}
