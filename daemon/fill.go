package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/rafs/blob"
)

// A filler brings chunks into cache objects. It is the only owner of retries.
type filler struct {
	engine   fscache.Engine
	decoder  *blob.Decoder
	log      *zap.Logger
	ahead    uint64        // read-ahead window in bytes
	deadline time.Duration // how long a reader is made to wait

	room          *room
	spaceDeadline time.Duration // how long a reader is made to wait for room
	cullsParts    bool          // parts of mounted objects are culled too
	unsettled     atomic.Bool   // this is a successor whose predecessor may still write or cull

	index      *index
	count      counters
	began      time.Time
	lastMiss   atomic.Int64   // when a reader last missed, or a miss was answered, in nanoseconds since began
	background sync.WaitGroup // completions under way
}

// A reader is who waits for a fill.
type reader struct {
	turn  *turn  // passed on before anything that takes long
	ready func() // called once, as soon as the range is present
}

// fill makes want present and calls r.ready as soon as it is; the read-ahead behind it goes on before fill returns. When
// it returns an error ready was not called. ctx ends with the daemon.
func (f *filler) fill(ctx context.Context, o *object, want span, r reader) error {
	if f.give(o, want) {
		r.ready()
		return nil
	}
	f.miss()
	answered, mismatches, refused := false, 0, 0
	var last error
	d := &demand{want: want, turn: r.turn, deadline: time.Now().Add(f.deadline), ready: func() {
		answered = true
		r.ready()
		f.miss()
	}}
	for {
		err := f.attempt(ctx, o, d)
		switch {
		case answered: // an error concerns the read-ahead only, and was logged
			return nil
		case err == nil && f.give(o, want):
			r.ready()
			return nil
		case err == nil:
			continue
		case errors.Is(err, errDeadline) && last != nil:
			return fmt.Errorf("%w after %v; the last attempt failed: %w", errDeadline, f.deadline, last)
		case noRoom(err):
			r.turn.pass()
			if err := f.awaitRoom(ctx, &d.shortage, err); err != nil {
				return err
			}
			last = err
			continue
		case wrongBytes(err):
			mismatches++
		}
		if refusal(err) {
			refused++ // the next attempt goes through another's source, if there is one
		}
		if hopeless(err, mismatches) && (!refusal(err) || refused >= o.sources()) {
			return err
		}
		last = err
	}
}

// A demand is what a fetch knows of the reader it is for. A prefetch has none.
type demand struct {
	want     span
	turn     *turn
	ready    func()
	deadline time.Time // errDeadline after it
	shortage shortage
}

// give notes that a reader wants s, and reports whether all of it is present.
func (f *filler) give(o *object, s span) bool {
	there, last := o.give(s)
	if !last {
		return there
	}
	if u := o.borrow(); u != nil { // else it is being let go
		f.finish(o)
		u.wg.Done()
	}
	return there
}

// attempt does one thing for a reader: wait for what is on its way, or else fetch what is absent.
func (f *filler) attempt(ctx context.Context, o *object, d *demand) error {
	if !o.tryStart(d.want) {
		d.turn.pass()
		ctx, cancel := context.WithDeadlineCause(ctx, d.deadline, errDeadline)
		defer cancel()
		if started, err := o.start(ctx, d.want); err != nil || !started {
			return err
		}
	}
	defer func() { <-o.slots }()
	ahead := f.ahead
	if 2*len(o.slots) > cap(o.slots) || d.shortage.there() {
		ahead = 0 // slots are scarce, or room is: leave them to readers
	}
	return f.fetch(o, d.want, ahead, d)
}

// tryStart takes a slot for fetching want if there is something to fetch and nothing to wait for.
func (o *object) tryStart(want span) bool {
	if !o.absent(want) || o.paused() > 0 {
		return false
	}
	select {
	case o.slots <- struct{}{}:
		return true
	default:
		return false
	}
}

// start waits until want, or something of it, can be fetched and takes a slot for that; false: look again. The error is
// that of a fetch waited for, or the cause of ctx when that ended first.
func (o *object) start(ctx context.Context, want span) (bool, error) {
	if !o.absent(want) {
		return false, o.await(ctx, want)
	}
	if err := o.pause(ctx); err != nil {
		return false, err
	}
	select {
	case o.slots <- struct{}{}:
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
	if o.paused() > 0 { // another's attempt failed while this one waited for its slot
		<-o.slots
		return false, nil
	}
	return true, nil
}

// fetch claims what is absent of s, and of ahead bytes from its first missing byte on, and brings it in. What is read ahead
// from a local file is claimed when the reader has its answer: there is no round trip to be saved by asking for both at
// once.
func (f *filler) fetch(o *object, s span, ahead uint64, d *demand) error {
	u := o.borrow()
	if u == nil {
		return errNoSource
	}
	defer u.wg.Done()
	if d == nil || !u.local {
		return f.carry(o, u, o.claim(s, ahead), d)
	}
	behind := o.behind(s, ahead)
	if err := f.carry(o, u, o.claim(s, 0), d); err != nil || behind.empty() {
		return err
	}
	d.turn.pass()
	return f.carry(o, u, o.claim(behind, 0), nil)
}

// carry brings in what was claimed.
func (f *filler) carry(o *object, u *use, c claimed, d *demand) error {
	if len(c.spans) == 0 {
		return nil
	}
	defer o.landed(c.wanted)
	t := &transfer{filler: f, o: o, epoch: c.epoch, wanted: c.wanted, demand: d, in: stream{use: u, o: o}}
	defer t.in.close()
	ctx := u.ctx
	if d != nil {
		t.want, t.turn = d.want, d.turn
		defer o.busy()()
	}
	if d != nil && !u.local { // a read of a local file ends when it ends
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadlineCause(u.ctx, d.deadline, errDeadline)
		defer cancel()
	}
	if !u.local { // what is on this machine is not worth looking for
		c.spans, t.from = f.index.near(o, c.spans)
	}
	var copied []span
	if t.from != nil {
		copied = slices.Clone(c.spans) // run takes them apart
	}
	began := time.Now()
	rest, err := t.run(ctx, c.spans)
	if err == nil {
		t.share(ctx, copied)
		return nil
	}
	f.blame(o, began, rest[0], err)
	o.demote(u)
	for _, s := range rest {
		o.abandon(s, forOthers(err))
	}
	return err
}

// miss notes that a reader missed, or that a miss was answered.
func (f *filler) miss() { f.lastMiss.Store(int64(time.Since(f.began))) }

// sinceMiss is how long ago that was.
func (f *filler) sinceMiss() time.Duration {
	return time.Since(f.began) - time.Duration(f.lastMiss.Load())
}

// blame counts and logs a failed fetch, and has the source left alone for a while when it is the source's failure.
func (f *filler) blame(o *object, began time.Time, s span, err error) {
	switch {
	case errors.Is(err, errUnmounted), errors.Is(err, errStopping), errors.Is(err, errDeadline):
		return
	case noRoom(err): // the source is not to blame; makeRoom says what there is to be said
		return
	case wrongBytes(err):
		f.count.mismatches.Add(1)
	}
	f.count.failures.Add(1)
	if !hopeless(err, 0) {
		// A quarter of the deadline: whoever reads anew has attempts of its own made, however long the source has been down.
		o.failed(began, min(retryAfter(err), f.deadline), f.deadline/4, err)
	}
	f.log.Warn("fetch failed", zap.Stringer("object", o.key), zap.Uint64("offset", o.table.At(s.first).Offset),
		zap.Error(err))
}

// forOthers is what readers that wait for another's fetch are told: what ended it for a reason of its own is none of
// theirs.
func forOthers(err error) error {
	if errors.Is(err, errDeadline) || errors.Is(err, errUnmounted) {
		return errAbandoned
	}
	return err
}
