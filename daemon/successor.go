package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/handover"
	"holdfast/state"
	"holdfast/state/crash"
)

// A successor is the daemon that is about to be, as the taking side of a handover.
type successor struct {
	opt    Options
	origin Origin
	boot   string

	d       *Daemon
	holder  *Holder
	inbox   *state.Inbox
	socket  *os.File
	lock    *os.File
	mounts  []mountRecord
	given   map[fscache.Key]presenceRecord
	opened  []fscache.Held // since Prepare, as are the next
	closed  []fscache.Held
	busy    func() // collects garbage again; nil: nothing stopped that
	pending []fscache.Pending
	name    string        // of the engine
	started chan struct{} // closed when this process reads the engine
	parted  chan struct{} // closed when the predecessor has given up the databases, and the supervisor knows of this process

	// What the handover came to, once ended is closed.
	ended   chan struct{}
	err     error
	drained bool // the predecessor answers no more: else this process was told to end before

	listen func(*os.File) (net.Listener, error) // net.FileListener
}

// What ends a successor that reads the engine, before it is the daemon.
var (
	errOrphaned = errors.New("the predecessor died before the supervisor heard of its successor: ending, so that the supervisor starts a daemon that it knows")
	errUnwanted = errors.New("told to end before the predecessor had parted")
)

// Succeed takes the place of a running daemon, the predecessor at the other end of conn, which it closes, and then runs as Run does. a.Open
// opens the engine the predecessor names; of o, what Attach fills in is filled in here. A failure before the predecessor has stopped leaves
// that serving, and no trace.
func Succeed(ctx context.Context, conn *handover.Conn, a Origin, o Options) (d *Daemon, err error) {
	s, err := newSuccessor(a, o)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return s.run(ctx, func(ctx context.Context) error {
		_, err := handover.Take(ctx, conn, Hello(o.Release), s, handover.Timeouts{})
		return errors.Join(err, conn.Close())
	})
}

func newSuccessor(a Origin, o Options) (*successor, error) {
	boot, err := state.BootID()
	if err != nil {
		return nil, err
	}
	return &successor{
		opt: o, origin: a, boot: boot, given: map[fscache.Key]presenceRecord{}, holder: NewHolder(a.Supervisor, o.Log),
		started: make(chan struct{}), parted: make(chan struct{}), ended: make(chan struct{}), listen: net.FileListener,
	}, nil
}

// run is Succeed; take calls this Taker's methods, until ctx ends or there is nothing left to take.
func (s *successor) run(ctx context.Context, take func(context.Context) error) (*Daemon, error) {
	taking, cancel := context.WithCancel(ctx)
	defer cancel()
	// It ends with the handover, whose times are bounded, and is waited for by settle or below.
	go func() {
		defer close(s.ended)
		s.err = take(taking)
	}()
	select {
	case <-s.started:
	case <-s.ended:
	}
	if !isClosed(s.started) {
		return nil, errors.Join(s.err, s.close())
	}
	d := s.d
	defer context.AfterFunc(d.base, cancel)() // who ends the daemon need not wait for the predecessor
	l, err := s.follow()
	if err != nil {
		// As if this process had died: who comes next recovers what it has in flight, and the predecessor's.
		cancel()
		<-s.ended
		d.stop(errStopping)
		if d.opt.Session == nil {
			s.holder.abandon()
		}
		return nil, errors.Join(err, d.close())
	}
	d.background.Go(s.settle)
	return d, d.serveUntil(ctx, l)
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// follow opens the databases as soon as the predecessor has left them, and returns the API's socket.
func (s *successor) follow() (net.Listener, error) {
	select {
	case <-s.parted:
	case <-s.ended:
	}
	switch {
	case isClosed(s.parted):
	case s.drained:
		return nil, errors.Join(errOrphaned, s.err)
	default:
		return nil, errors.Join(errUnwanted, s.err)
	}
	crash.Point("daemon.successor.before-state")
	d := s.d
	if _, err := handover.AdoptLock(s.lock); err != nil {
		return nil, err
	}
	session, damaged, err := state.OpenSession(filepath.Join(s.origin.Run, sessionFile), s.boot, s.opt.Release)
	if err != nil {
		return nil, err
	}
	d.opt.Session = session
	d.damaged = append(d.damaged, damaged...)
	s.origin.Supervisor.Holds(s.name, socketName)
	for name := range s.holder.Held() {
		s.origin.Supervisor.Holds(name)
	}
	s.holder.Start(session)
	if err := d.openState(); err != nil {
		return nil, err
	}
	// The predecessor's records stay until it has ended: what it has in flight is among what is kept.
	if err := d.recorder.keep(session); err != nil {
		return nil, err
	}
	d.recorder.start()
	l, err := s.listen(s.socket)
	if err = errors.Join(err, s.socket.Close()); err != nil {
		return nil, fmt.Errorf("daemon: use the predecessor's API socket: %w", err)
	}
	crash.Point("daemon.successor.after-state")
	return l, nil
}

// settle takes over what the predecessor did not finish, once it has ended, and then looks for itself what is cached: the predecessor
// writes no more.
func (s *successor) settle() {
	d := s.d
	<-s.ended
	if !s.drained {
		d.log.Warn("ending before the predecessor has: what it has in flight is left to the next process", zap.Error(s.err))
		return
	}
	if s.err != nil {
		d.log.Error("the predecessor did not end well: what it had in flight is served here", zap.Error(s.err))
	}
	crash.Point("daemon.successor.before-record")
	boxes, damaged, err := state.ReadInboxes(filepath.Join(s.origin.Run, inboxDir), s.boot, s.name)
	for _, what := range damaged {
		d.log.Error("what the predecessor left was damaged", zap.String("what", what))
	}
	if err == nil {
		err = keepRecord(d.recorder, d.opt.Session, boxes)
	}
	if err != nil {
		d.log.Error("put what the predecessor left on record", zap.Error(err))
	}
	// ORDER: the predecessor's requests are on record, then its inbox goes, then they are answered here.
	crash.Point("daemon.successor.before-replay")
	d.engine.Replay()
	for _, o := range d.objects.all() {
		epoch := o.current()
		extents, err := d.engine.Present(o.key)
		if err != nil {
			d.log.Debug("presence is not known after a handover", zap.Stringer("object", o.key), zap.Error(err))
			continue
		}
		d.adopt(o, epoch, o.covered(extents))
	}
	d.unsettled.Store(false)
	for _, o := range d.objects.all() {
		if o.has(span{0, o.table.Len()}) {
			d.finish(o)
		}
	}
	for _, m := range d.mounts.list() {
		if m.broken == "" {
			d.startPrefetch(m)
		}
	}
}

// close gives up a handover that did not come to reading.
func (s *successor) close() (err error) {
	if s.busy != nil {
		s.busy()
	}
	if s.d != nil {
		d := s.d
		d.stop(errStopping)
		err = errors.Join(d.mounts.close(), d.engine.Close())
	}
	if s.inbox != nil {
		err = errors.Join(err, s.inbox.Close())
	}
	for _, h := range s.opened {
		err = errors.Join(err, h.File.Close())
	}
	for _, f := range []*os.File{s.socket, s.lock} {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	return err
}

// Prepare implements handover.Taker: everything is opened and loaded; the predecessor serves on.
func (s *successor) Prepare(list []handover.Record) error {
	crash.Point("daemon.successor.before-prepare")
	in := fscache.Inherited{Alive: true}
	for _, r := range list {
		if err := s.receive(r, &in); err != nil {
			return err
		}
	}
	if in.Lifeline == nil || s.socket == nil || s.lock == nil {
		return errors.New("take over: the predecessor's records lack its engine, its socket or its lock")
	}
	var err error
	if s.inbox, err = newInbox(Origin{Run: s.origin.Run, Engine: s.name}, s.boot, s.opt.Release); err != nil {
		return err
	}
	engine, err := s.origin.Open(s.name, in, s.inbox, s.holder)
	if err != nil {
		return err
	}
	o := s.opt
	o.Engine, o.Inbox, o.Holder, o.Supervisor = engine, s.inbox, s.holder, s.origin.Supervisor
	upgrade := *s.opt.Upgrade
	upgrade.Lock = s.lock
	o.Upgrade = &upgrade
	if s.d, err = newDaemon(o); err != nil {
		return errors.Join(err, engine.Close())
	}
	s.d.given = s.given
	s.d.unsettled.Store(true)
	for _, m := range s.mounts {
		if err := s.d.takeOver(context.Background(), m); err != nil {
			return err
		}
	}
	s.d.given = nil // what is mounted from here on is settled like any other
	s.d.tune()
	runtime.GC() // not in the pause
	s.busy = lull()
	crash.Point("daemon.successor.after-prepare")
	return nil
}

// receive takes one record of Prepare's.
func (s *successor) receive(r handover.Record, in *fscache.Inherited) error {
	switch r.Kind {
	case kindEngine:
		e, err := readRecord[engineRecord](r)
		if err != nil {
			return err
		}
		if e.Root != s.opt.Root || len(r.Files) != 1 || e.Name != r.Files[0].Name {
			return fmt.Errorf("take over: the predecessor's engine is %q in %s with %d descriptors; this process was started for %s", e.Name, e.Root, len(r.Files), s.opt.Root)
		}
		s.name, in.Lifeline = e.Name, r.Files[0].File
		s.origin.Engine = e.Name
	case kindLock:
		return s.only(r, &s.lock)
	case kindSocket:
		return s.only(r, &s.socket)
	case kindMount:
		m, err := readRecord[mountRecord](r)
		if err != nil {
			return err
		}
		s.mounts = append(s.mounts, m)
	case kindObjects:
		objects, err := s.objects(r)
		in.Objects = append(in.Objects, objects...)
		return err
	case kindPresence:
		return s.presence(r)
	default:
		return fmt.Errorf("take over: a record of kind %s where none belongs", r.Kind)
	}
	return nil
}

// only takes a record's one file.
func (s *successor) only(r handover.Record, f **os.File) error {
	if len(r.Files) != 1 || *f != nil {
		return fmt.Errorf("take over: record %s has %d descriptors, or is there twice", r.Kind, len(r.Files))
	}
	*f = r.Files[0].File
	return nil
}

// objects takes objects with their descriptors.
func (s *successor) objects(r handover.Record) (held []fscache.Held, err error) {
	list, err := readRecord[[]objectRecord](r)
	if err != nil {
		return nil, err
	}
	if len(list) != len(r.Files) {
		return nil, fmt.Errorf("take over: %d objects with %d descriptors", len(list), len(r.Files))
	}
	for i, o := range list {
		held = append(held, fscache.Held{Object: fscache.Object{Key: o.key(), Size: o.Size}, Handle: o.Handle, File: r.Files[i].File})
		if o.Name != "" {
			s.holder.Known(o.key(), o.Handle, o.Name)
		}
	}
	return held, nil
}

func (s *successor) presence(r handover.Record) error {
	list, err := readRecord[[]presenceRecord](r)
	if err != nil {
		return err
	}
	for _, p := range list {
		s.given[fscache.Key{Domain: p.Domain, ID: p.ID}] = p
	}
	return nil
}

// Update implements handover.Taker: what has changed since Prepare, and what the predecessor has in flight.
func (s *successor) Update(r handover.Record) error {
	switch r.Kind {
	case kindObjects:
		held, err := s.objects(r)
		s.opened = append(s.opened, held...)
		return err
	case kindClosed:
		gone, err := readRecord[[]objectRecord](r)
		for _, o := range gone {
			s.forget(o)
		}
		return err
	case kindPresence:
		return s.update(r)
	case kindPending:
		requests, err := readRecord[[]state.Request](r)
		for _, q := range requests {
			s.pending = append(s.pending, recorded(q))
		}
		return err
	}
	return fmt.Errorf("take over: a record of kind %s where none belongs", r.Kind)
}

// forget takes an object that is no longer open off those opened since Prepare, or notes that it was closed since.
func (s *successor) forget(r objectRecord) {
	i := slices.IndexFunc(s.opened, func(h fscache.Held) bool { return h.Object.Key == r.key() && h.Handle == r.Handle })
	if i < 0 {
		s.closed = append(s.closed, fscache.Held{Object: fscache.Object{Key: r.key()}, Handle: r.Handle})
		return
	}
	_ = s.opened[i].File.Close() // a copy
	s.opened = slices.Delete(s.opened, i, i+1)
}

// Commit implements handover.Taker: the predecessor reads no more, and this process is about to.
func (s *successor) Commit() error {
	crash.Point("daemon.successor.before-commit")
	for _, p := range s.pending { // the predecessor may answer them still
		if o := s.d.objects.get(p.Object); o != nil && p.Op == fscache.OpRead {
			o.gave(o.span(p.Off, p.Len))
		}
	}
	opened := s.opened
	s.opened = nil
	return s.d.engine.Expect(s.pending, opened, s.closed)
}

// update takes the presence of objects in which something changed since Prepare.
func (s *successor) update(r handover.Record) error {
	list, err := readRecord[[]presenceRecord](r)
	if err != nil {
		return err
	}
	for _, p := range list {
		if o := s.d.objects.get(fscache.Key{Domain: p.Domain, ID: p.ID}); o != nil {
			o.reset()
			s.d.adopt(o, o.current(), p.spans(o))
		}
	}
	return nil
}

// Start implements handover.Taker: this process reads the engine from here on.
func (s *successor) Start() {
	crash.Point("daemon.successor.before-start")
	s.d.pump.start()
	s.busy()
	crash.Point("daemon.successor.after-start")
	close(s.started)
}

// Done implements handover.Taker.
func (s *successor) Done(r handover.Record) {
	switch r.Kind {
	case kindFinished:
		ids, err := readRecord[[]uint64](r)
		if err != nil {
			s.d.log.Error("hear of finished requests", zap.Error(err))
		}
		for _, id := range ids {
			s.d.engine.Finished(id)
		}
	case kindParted:
		close(s.parted)
	}
}

// Drained implements handover.Taker. The error is take's too.
func (s *successor) Drained(error) { s.drained = true }

// takeOver makes a mount of the predecessor's ready to be served.
func (d *Daemon) takeOver(ctx context.Context, r mountRecord) error {
	m := &mount{record: r.Mount, broken: r.Broken}
	if !r.Lingering {
		if err := d.mounts.reserve(m); err != nil {
			return err
		}
		defer d.mounts.give(m)
	}
	if m.broken != "" {
		return nil
	}
	if _, err := d.load(ctx, m); err != nil {
		return fmt.Errorf("image %s on %s: %w", r.Ref, r.Dir, err)
	}
	if r.Lingering {
		m.kept = m.holds()
		d.mounts.linger(m)
	}
	return nil
}
