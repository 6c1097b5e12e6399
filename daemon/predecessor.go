package daemon

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"time"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/handover"
	"holdfast/state/crash"
)

// A predecessor is the daemon as the giving side of a handover.
type predecessor struct {
	d       *Daemon
	quieted bool            // the prefetches were stopped
	changes map[*object]int // when the presence of each object was last told
	handles map[heldKey]int // of what is held, as the successor was told: when it was last seen
	looks   int             // at what is held
	busy    func()          // collects garbage again; nil: nothing stopped that
	left    int
	pid     int // of the successor
	socket  *os.File
	given   chan struct{} // closed when nobody receives from Done any more

	committed time.Time // when reading was stopped
}

// Prepare implements handover.Giver: everything that can be told while requests go on being served.
func (p *predecessor) Prepare() (_ []handover.Record, err error) {
	d := p.d
	crash.Point("daemon.predecessor.before-prepare")
	p.quieted = true
	for _, m := range d.mounts.list() {
		m.prefetch.pause() // what one is fetching may take as long as its source likes
	}
	name, lifeline := d.engine.Lifeline()
	var told telling
	told.add(kindEngine, engineRecord{Name: d.engine.Name(), Root: d.opt.Root}, handover.NamedFile{Name: name, File: lifeline})
	told.add(kindLock, nil, handover.NamedFile{Name: "lock", File: d.opt.Upgrade.Lock})
	if p.socket, err = d.succession.api.file(); err != nil {
		return nil, err
	}
	told.add(kindSocket, nil, handover.NamedFile{Name: socketName, File: p.socket})
	for _, m := range d.mounts.every() {
		told.add(kindMount, m)
	}
	p.handles = map[heldKey]int{}
	p.tellChanges(&told)
	runtime.GC() // not in the pause
	return told.list, told.err
}

// A telling collects records.
type telling struct {
	list []handover.Record
	err  error // the first: nothing is added after it
}

func (t *telling) add(kind string, body any, files ...handover.NamedFile) {
	if t.err != nil {
		return
	}
	r, err := newRecord(kind, body, files...)
	t.list, t.err = append(t.list, r), err
}

// tellChanges tells which objects were opened or closed, and of which more is present, since that was last told.
func (p *predecessor) tellChanges(told *telling) {
	now := p.d.engine.Holding()
	objects, files := p.held(now)
	for i := 0; i < len(objects); i += perRecord {
		n := min(i+perRecord, len(objects))
		told.add(kindObjects, objects[i:n], files[i:n]...)
	}
	if gone := p.gone(len(now)); len(gone) > 0 {
		told.add(kindClosed, gone)
	}
	var present []presenceRecord
	for _, o := range p.d.objects.all() {
		if n, ok := p.changes[o]; ok && n == o.changed() {
			continue
		}
		r, n := o.presence()
		p.changes[o] = n
		present = append(present, r)
	}
	for i := 0; i < len(present); i += perRecord {
		told.add(kindPresence, present[i:min(i+perRecord, len(present))])
	}
}

// held makes records of objects that were not told of yet.
func (p *predecessor) held(list []fscache.Held) (objects []objectRecord, files []handover.NamedFile) {
	p.looks++
	for _, h := range list {
		k := heldKey{h.Object.Key, h.Handle}
		told := p.handles[k] != 0
		p.handles[k] = p.looks
		if told {
			continue
		}
		r := objectRecord{Name: p.d.opt.Holder.nameOf(k), Domain: k.key.Domain, ID: k.key.ID, Size: h.Object.Size, Handle: h.Handle}
		objects = append(objects, r)
		files = append(files, handover.NamedFile{Name: fmt.Sprintf("object-%d", len(files)), File: h.File})
	}
	return objects, files
}

// Update implements handover.Giver: much may have changed while the successor prepared.
func (p *predecessor) Update() ([]handover.Record, error) {
	var told telling
	p.tellChanges(&told)
	p.busy = lull()
	return told.list, told.err
}

// Commit implements handover.Giver: nobody reads from here until the successor has taken, and what has changed since Update is told.
func (p *predecessor) Commit() (_ []handover.Record, err error) {
	d := p.d
	p.committed = time.Now()
	defer func() {
		if err != nil {
			p.Resume()
		}
	}()
	crash.Point("daemon.predecessor.before-freeze")
	if err := d.pump.freeze(); err != nil {
		return nil, err
	}
	crash.Point("daemon.predecessor.after-freeze")
	var told telling
	p.tellChanges(&told)
	pending := d.engine.Pending()
	p.left = len(pending)
	d.succession.await(pending)
	at := time.Now()
	var requests []sighting
	for _, r := range pending {
		requests = append(requests, sighting{r, at})
	}
	told.add(kindPending, records(requests))
	return told.list, told.err
}

// gone lists what was told of and was not there at the last look, which found so many, once.
func (p *predecessor) gone(now int) (list []objectRecord) {
	if len(p.handles) == now {
		return nil
	}
	for k, seen := range p.handles {
		if seen != p.looks {
			list = append(list, objectRecord{Domain: k.key.Domain, ID: k.key.ID, Handle: k.handle})
			delete(p.handles, k)
		}
	}
	return list
}

// Resume implements handover.Giver: the successor is dead and read nothing.
func (p *predecessor) Resume() {
	p.busy()
	p.d.succession.forget()
	crash.Point("daemon.predecessor.before-thaw")
	if err := p.d.pump.thaw(); err != nil {
		p.d.pump.end(err) // the supervisor starts another daemon
	}
}

// close closes what was made for the successor.
func (p *predecessor) close() error {
	if p.busy != nil {
		p.busy()
	}
	if p.socket == nil {
		return nil
	}
	return p.socket.Close()
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
	p.busy()
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
	p.send(out, kindParted, nil)
}

// send sends a record while somebody receives.
func (p *predecessor) send(out chan<- handover.Record, kind string, body any) {
	r, err := newRecord(kind, body)
	if err != nil {
		p.d.log.Error("tell the successor", zap.Error(err))
		return
	}
	select {
	case out <- r:
	case <-p.given:
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
			p.send(out, kindFinished, ids)
		}
		if stopped == nil {
			return
		}
	}
}

// file is the API's listening socket, once more.
func (s *server) file() (*os.File, error) {
	l, ok := s.listener.(interface{ File() (*os.File, error) }) // a *net.UnixListener
	if !ok {
		return nil, fmt.Errorf("the API's socket is a %T", s.listener)
	}
	return l.File()
}
