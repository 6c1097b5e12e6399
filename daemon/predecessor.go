package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/handover"
	"holdfast/state/crash"
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
	api   *server
	quiet context.CancelFunc // ends what this process tells the supervisor from time to time

	mu       sync.Mutex
	awaited  map[uint64]int // requests whose end the successor wants to hear of, and in how many parts each is answered; nil: none
	finished chan uint64    // room for all of awaited
}

// report says that a request was answered.
func (s *succession) report(r fscache.Request) {
	if !s.over.Load() {
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

// await makes report tell of these requests.
func (s *succession) await(list []fscache.Pending) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.awaited, s.finished = make(map[uint64]int, len(list)), make(chan uint64, len(list))
	for _, p := range list {
		s.awaited[p.ID]++
	}
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
	if !d.succession.under.CompareAndSwap(false, true) {
		return res, conflict("wait for it to end", "another upgrade is under way")
	}
	if !d.changing.TryLock() { // a mount that is being made
		d.succession.under.Store(false)
		return res, conflict("try again later", "something is being mounted or unmounted")
	}
	d.changing.Unlock()
	res, err = d.succession.run(ctx, d, r)
	if err != nil {
		d.succession.under.Store(false)
	}
	return res, err
}

// run starts the successor and hands over to it.
func (s *succession) run(ctx context.Context, d *Daemon, r UpgradeRequest) (res UpgradeResult, err error) {
	began := time.Now()
	failed := func(err error) error {
		return newError(http.StatusBadGateway, CodeUpgrade, "this daemon serves on", "upgrade to %s after %v: %w", []any{r.Binary, time.Since(began).Round(time.Millisecond), err})
	}
	u := d.opt.Upgrade
	times := handover.Timeouts{Prepare: cmp.Or(r.Timeout, DefaultUpgradeTimeout), Drain: d.opt.StopTimeout + drainGrace}
	conn, err := start(ctx, handover.StartOptions{Path: r.Binary, Args: u.Args, Env: u.Environment, Dir: u.Run}, times)
	if err != nil {
		return res, failed(err)
	}
	p := &predecessor{d: d, changes: map[*object]int{}, pid: conn.PID()}
	given, err := handover.Give(ctx, conn, Hello(d.opt.Release), p, times)
	if !given.Taken {
		err = errors.Join(err, conn.Close())
		p.undo()
		return res, failed(err)
	}
	// The connection's lock says that an upgrade is under way until this process has ended.
	res = UpgradeResult{
		PID: p.pid, From: d.opt.Release, To: given.Peer.Release, Prepare: p.committed.Sub(began), Pause: given.Pause, Left: p.left,
	}
	if err != nil {
		d.log.Error("the successor did not live to take everything: the supervisor has to start the daemon anew", zap.Int("pid", res.PID), zap.Error(err))
	}
	d.log.Info("a successor has taken over", zap.Int("pid", res.PID), zap.String("release", res.To), zap.Duration("pause", res.Pause), zap.Int("left", res.Left))
	return res, nil
}

// start starts a successor. This process's own predecessor may not have ended yet.
func start(ctx context.Context, o handover.StartOptions, t handover.Timeouts) (*handover.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, t.Drain)
	defer cancel()
	for {
		conn, err := handover.Start(ctx, o, t)
		var locked *handover.LockedError
		if !errors.As(err, &locked) || sleep(ctx, lockInterval) != nil {
			return conn, err
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

// A predecessor is the daemon as the giving side of a handover.
type predecessor struct {
	d       *Daemon
	quieted bool            // the prefetches were stopped
	changes map[*object]int // when the presence of each object was last told
	handles map[heldKey]bool
	left    int
	pid     int // of the successor

	committed time.Time // when reading was stopped
}

// Prepare implements handover.Giver: everything that can be told while requests go on being served.
func (p *predecessor) Prepare() (list []handover.Record, err error) {
	d := p.d
	crash.Point("daemon.predecessor.before-prepare")
	p.quieted = true
	for _, m := range d.mounts.list() {
		m.stopPrefetch()
	}
	name, lifeline := d.engine.Lifeline()
	add := func(kind string, body any, files ...handover.NamedFile) {
		if err == nil {
			var r handover.Record
			r, err = newRecord(kind, body, files...)
			list = append(list, r)
		}
	}
	add(kindEngine, engineRecord{Name: d.engine.Name(), Root: d.opt.Root}, handover.NamedFile{Name: name, File: lifeline})
	add(kindLock, nil, handover.NamedFile{Name: "lock", File: d.opt.Upgrade.Lock})
	socket, err2 := d.succession.api.file()
	if err = errors.Join(err, err2); err != nil {
		return nil, err
	}
	add(kindSocket, nil, handover.NamedFile{Name: socketName, File: socket})
	for _, m := range d.mounts.every() {
		add(kindMount, m)
	}
	p.handles = map[heldKey]bool{}
	objects, files := p.held(d.engine.Holding())
	for i := 0; i < len(objects); i += perRecord {
		n := min(i+perRecord, len(objects))
		add(kindObjects, objects[i:n], files[i:n]...)
	}
	var present []presenceRecord
	for _, o := range d.objects.all() {
		r, n := o.presence()
		p.changes[o] = n
		present = append(present, r)
	}
	for i := 0; i < len(present); i += perRecord {
		add(kindPresence, present[i:min(i+perRecord, len(present))])
	}
	return list, err
}

// held makes records of objects that were not told of yet.
func (p *predecessor) held(list []fscache.Held) (objects []objectRecord, files []handover.NamedFile) {
	names := p.d.opt.Holder.byKey()
	for _, h := range list {
		k := heldKey{h.Object.Key, h.Handle}
		if p.handles[k] {
			continue
		}
		p.handles[k] = true
		r := objectRecord{Name: names[k], Domain: k.key.Domain, ID: k.key.ID, Size: h.Object.Size, Handle: h.Handle}
		objects = append(objects, r)
		files = append(files, handover.NamedFile{Name: fmt.Sprintf("object-%d", len(files)), File: h.File})
	}
	return objects, files
}

// Commit implements handover.Giver: nobody reads from here until the successor has taken, and what has changed since Prepare is told.
func (p *predecessor) Commit() (list []handover.Record, err error) {
	d := p.d
	p.committed = time.Now()
	crash.Point("daemon.predecessor.before-freeze")
	if err := d.pump.freeze(); err != nil {
		return nil, err
	}
	crash.Point("daemon.predecessor.after-freeze")
	add := func(kind string, body any, files ...handover.NamedFile) {
		if err == nil {
			var r handover.Record
			r, err = newRecord(kind, body, files...)
			list = append(list, r)
		}
	}
	now := d.engine.Holding()
	objects, files := p.held(now)
	for i := 0; i < len(objects); i += perRecord {
		n := min(i+perRecord, len(objects))
		add(kindObjects, objects[i:n], files[i:n]...)
	}
	if gone := p.gone(now); len(gone) > 0 {
		add(kindClosed, gone)
	}
	var present []presenceRecord
	for _, o := range d.objects.all() {
		if n := o.changed(); n != p.changes[o] {
			r, _ := o.presence()
			present = append(present, r)
		}
	}
	for i := 0; i < len(present); i += perRecord {
		add(kindPresence, present[i:min(i+perRecord, len(present))])
	}
	pending := d.engine.Pending()
	p.left = len(pending)
	d.succession.await(pending)
	at := time.Now()
	var requests []sighting
	for _, r := range pending {
		requests = append(requests, sighting{r, at})
	}
	add(kindPending, records(requests))
	return list, err
}

// gone lists what was told of and is not held any more.
func (p *predecessor) gone(now []fscache.Held) (list []objectRecord) {
	still := make(map[heldKey]bool, len(now))
	for _, h := range now {
		still[heldKey{h.Object.Key, h.Handle}] = true
	}
	for k := range p.handles {
		if !still[k] {
			list = append(list, objectRecord{Domain: k.key.Domain, ID: k.key.ID, Handle: k.handle})
		}
	}
	return list
}

// Resume implements handover.Giver: the successor is dead and read nothing.
func (p *predecessor) Resume() {
	crash.Point("daemon.predecessor.before-thaw")
	if err := p.d.pump.thaw(); err != nil {
		p.d.pump.end(err) // the supervisor starts another daemon
	}
}

// undo takes back what an upgrade that failed had stopped.
func (p *predecessor) undo() {
	if !p.quieted {
		return
	}
	for _, m := range p.d.mounts.list() {
		if m.broken == "" {
			p.d.startPrefetch(m)
		}
	}
}

// Done implements handover.Giver: the successor reads the engine, and is told what this process still answers. It ends when nothing is left,
// or at the stop timeout: the successor has the rest.
func (p *predecessor) Done() <-chan handover.Record {
	d := p.d
	crash.Point("daemon.predecessor.after-taken")
	d.succession.over.Store(true)
	out := make(chan handover.Record)
	d.background.Go(func() {
		defer close(out)
		p.part(out)
		stopped := make(chan error, 1)
		d.background.Go(func() {
			stopped <- d.pump.stop(d.opt.StopTimeout, func() { d.stop(errStopping) })
		})
		p.tell(out, stopped)
		close(d.succession.done)
	})
	return out
}

// part gives the successor what only one of two can have: the databases and the supervisor's attention.
// ORDER: the supervisor hears of the successor from this process, whose word it takes, before this process ends.
func (p *predecessor) part(out chan<- handover.Record) {
	d := p.d
	d.succession.api.leave()
	p.awaitOpens()
	d.opt.Holder.leave()
	d.succession.quiet()
	err := d.closeState()
	crash.Point("daemon.predecessor.before-mainpid")
	if err = errors.Join(err, d.opt.Upgrade.MainPID(p.pid)); err != nil {
		d.log.Error("hand over to the successor: the supervisor may not follow it", zap.Int("pid", p.pid), zap.Error(err))
	}
	crash.Point("daemon.predecessor.after-mainpid")
	if r, err := newRecord(kindParted, nil); err == nil {
		out <- r
	}
}

// awaitOpens waits, a second at most, until opens in flight are answered: that takes the supervisor, which listens to one process only.
func (p *predecessor) awaitOpens() {
	opening := func(r fscache.Pending) bool { return r.Op == fscache.OpOpen }
	for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); {
		if !slices.ContainsFunc(p.d.engine.Pending(), opening) || sleep(p.d.base, time.Millisecond) != nil {
			return
		}
	}
	p.d.log.Warn("an open of an object is not answered within a second: it may be refused")
}

// tell reports what is answered until all is.
func (p *predecessor) tell(out chan<- handover.Record, stopped <-chan error) {
	s := &p.d.succession
	for {
		var ids []uint64
		select {
		case id := <-s.finished:
			ids = append(ids, id)
		case err := <-stopped:
			if err != nil {
				p.d.log.Error("end the requests in flight", zap.Error(err))
			}
			stopped = nil
		}
		for len(s.finished) > 0 {
			ids = append(ids, <-s.finished)
		}
		if len(ids) > 0 {
			if r, err := newRecord(kindFinished, ids); err == nil {
				out <- r
			}
		}
		if stopped == nil {
			return
		}
	}
}

// file is the API's listening socket, once more.
func (s *server) file() (*os.File, error) {
	u, ok := s.listener.(*net.UnixListener)
	if !ok {
		return nil, fmt.Errorf("the API's socket is a %T", s.listener)
	}
	return u.File()
}
