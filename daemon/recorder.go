package daemon

import (
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/state"
)

// A recorder puts requests in flight on record, behind the reader's back: what is still in flight when two of its ticks have seen it.
// Until then, and should the recorder never come to it, the inbox has the request; the record is what is left if the inbox is damaged, and
// what says how old a request is. It costs a request one load of an atomic.
type recorder struct {
	engine  fscache.Engine
	session *state.Session
	log     *zap.Logger

	started atomic.Bool
	asleep  atomic.Bool
	wake    chan struct{} // room for one
	quit    chan struct{}
	wg      sync.WaitGroup
}

// recordInterval is the time between two looks at what is in flight.
const recordInterval = 10 * time.Millisecond

// quietTicks is how many looks that find nothing make the recorder sleep.
const quietTicks = 20

func newRecorder(e fscache.Engine, s *state.Session, log *zap.Logger) *recorder {
	return &recorder{engine: e, session: s, log: log, wake: make(chan struct{}, 1), quit: make(chan struct{})}
}

// start begins to record; stop ends it.
func (r *recorder) start() {
	r.started.Store(true)
	r.wg.Go(r.run)
}

// stop returns when nothing more is recorded. It comes once.
func (r *recorder) stop() {
	close(r.quit)
	r.wg.Wait()
}

// kick says that a request was read.
func (r *recorder) kick() {
	if r.asleep.Load() {
		select {
		case r.wake <- struct{}{}:
		default:
		}
	}
}

// A sighting is a request that was seen in flight.
type sighting struct {
	fscache.Pending
	since time.Time
}

func (r *recorder) run() {
	tick := time.NewTicker(recordInterval)
	defer tick.Stop()
	// What a predecessor left is on record and nowhere else: it is old from the first look on.
	now := time.Now()
	var seen []sighting
	for _, p := range r.engine.Pending() {
		seen = append(seen, sighting{p, now})
	}
	for quiet := 0; ; {
		select {
		case <-tick.C:
		case <-r.quit:
			return
		}
		seen = r.look(seen)
		if quiet++; len(seen) > 0 {
			quiet = 0
		}
		if quiet < quietTicks {
			continue
		}
		quiet = 0
		tick.Stop()
		if !r.sleep() {
			return
		}
		tick.Reset(recordInterval)
	}
}

// look records those requests in flight that were in seen, and returns all of them.
func (r *recorder) look(seen []sighting) []sighting {
	before := make(map[fscache.Pending]time.Time, len(seen))
	for _, s := range seen {
		before[s.Pending] = s.since
	}
	now := time.Now()
	seen = seen[:0]
	var old []sighting
	for _, p := range r.engine.Pending() {
		since, again := before[p]
		if !again {
			since = now
		} else {
			old = append(old, sighting{p, since})
		}
		seen = append(seen, sighting{p, since})
	}
	if err := r.session.SetPending(records(old)); err != nil {
		r.log.Error("record the requests in flight: the inbox alone has them", zap.Error(err))
	}
	return seen
}

// sleep waits for a request; false: the recorder ends.
func (r *recorder) sleep() bool {
	r.asleep.Store(true)
	defer r.asleep.Store(false)
	if len(r.engine.Pending()) > 0 { // read before asleep was set
		return true
	}
	select {
	case <-r.wake:
		return true
	case <-r.quit:
		return false
	}
}

// records makes records of what is in flight, each with the time it was seen first. An event of which it died with a process what it was has
// several, in parts.
func records(list []sighting) []state.Request {
	out := make([]state.Request, 0, len(list))
	parts := make(map[uint64]uint16, len(list))
	for _, s := range list {
		r := record(s.Pending, s.since)
		r.Part = parts[r.Number]
		parts[r.Number]++
		out = append(out, r)
	}
	return out
}

// record is a request as it stands in the session.
func record(p fscache.Pending, since time.Time) state.Request {
	return state.Request{
		Number: p.ID, Op: uint8(p.Op), Domain: p.Object.Domain, ID: p.Object.ID, Handle: p.Handle, Off: p.Off, Len: p.Len, Since: since,
	}
}

// recorded is the reverse of record.
func recorded(r state.Request) fscache.Pending {
	return fscache.Pending{
		Op: fscache.Op(r.Op), Object: fscache.Key{Domain: r.Domain, ID: r.ID}, Off: r.Off, Len: r.Len, ID: r.Number, Handle: r.Handle,
	}
}
