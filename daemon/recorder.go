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
	engine fscache.Engine
	log    *zap.Logger

	mu      sync.Mutex     // held while the record is made equal to what is in flight, by one look or by keep
	session *state.Session // nil: nothing is recorded
	seen    []sighting     // by the last look

	asleep atomic.Bool
	wake   chan struct{} // room for one
	quit   chan struct{}
	wg     sync.WaitGroup
	ending sync.Once // of stop
}

// recordInterval is the time between two looks at what is in flight.
const recordInterval = 10 * time.Millisecond

// quietTicks is how many looks that find nothing make the recorder sleep.
const quietTicks = 20

func newRecorder(e fscache.Engine, log *zap.Logger) *recorder {
	return &recorder{engine: e, log: log, wake: make(chan struct{}, 1), quit: make(chan struct{})}
}

// start begins to record, after keep; stop ends it.
func (r *recorder) start() { r.wg.Go(r.run) }

// stop returns when nothing more is recorded. Whether or not start came, the second call changes nothing.
func (r *recorder) stop() {
	r.ending.Do(func() { close(r.quit) })
	r.wg.Wait()
}

// keep puts all that is in flight on record in s, however young it is, and has later looks keep it there: what else has a record of it may
// go then. What s had before is on record as since when.
func (r *recorder) keep(s *state.Session) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	before, err := s.Pending()
	if err != nil {
		return err
	}
	since := make(map[fscache.Pending]time.Time, len(before))
	for _, q := range before {
		since[recorded(q)] = q.Since
	}
	now := time.Now()
	r.session, r.seen = s, r.seen[:0]
	for _, p := range r.engine.Pending() {
		at, known := since[p]
		if !known {
			at = now
		}
		r.seen = append(r.seen, sighting{p, at})
	}
	return s.SetPending(records(r.seen))
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
	for quiet := 0; ; {
		select {
		case <-tick.C:
		case <-r.quit:
			return
		}
		if quiet++; r.look() > 0 {
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

// look records those requests in flight that were seen before, and returns how many there are in all.
func (r *recorder) look() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	before := make(map[fscache.Pending]time.Time, len(r.seen))
	for _, s := range r.seen {
		before[s.Pending] = s.since
	}
	now := time.Now()
	r.seen = r.seen[:0]
	var old []sighting
	for _, p := range r.engine.Pending() {
		since, again := before[p]
		if !again {
			since = now
		} else {
			old = append(old, sighting{p, since})
		}
		r.seen = append(r.seen, sighting{p, since})
	}
	if err := r.session.SetPending(records(old)); err != nil {
		r.log.Error("record the requests in flight: the inbox alone has them", zap.Error(err))
	}
	return len(r.seen)
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
