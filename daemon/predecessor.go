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
	handles map[heldKey]bool
	left    int
	pid     int // of the successor
	socket  *os.File
	given   chan struct{} // closed when nobody receives from Done any more

	committed time.Time // when reading was stopped
}

// Prepare implements handover.Giver: everything that can be told while requests go on being served.
func (p *predecessor) Prepare() (list []handover.Record, err error) {
	d := p.d
	crash.Point("daemon.predecessor.before-prepare")
	p.quieted = true
	for _, m := range d.mounts.list() {
		m.prefetch.pause() // what one is fetching may take as long as its source likes
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
	var err2 error
	p.socket, err2 = d.succession.api.file()
	if err = errors.Join(err, err2); err != nil {
		return nil, err
	}
	add(kindSocket, nil, handover.NamedFile{Name: socketName, File: p.socket})
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
	runtime.GC() // not in the pause
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
	p.d.succession.forget()
	crash.Point("daemon.predecessor.before-thaw")
	if err := p.d.pump.thaw(); err != nil {
		p.d.pump.end(err) // the supervisor starts another daemon
	}
}

// close closes what was made for the successor.
func (p *predecessor) close() error {
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
