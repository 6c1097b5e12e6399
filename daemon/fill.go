package daemon

import (
	"context"
	"errors"
	"fmt"
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
	if o.has(want) {
		r.ready()
		return nil
	}
	f.miss()
	ctx, cancel := context.WithTimeoutCause(ctx, f.deadline, errDeadline)
	defer cancel()
	answered, mismatches := false, 0
	var last error
	again := reader{turn: r.turn, ready: func() { answered = true; r.ready(); f.miss() }}
	for {
		err := f.attempt(ctx, o, want, again)
		switch {
		case answered: // an error concerns the read-ahead only, and was logged
			return nil
		case err == nil && o.has(want):
			r.ready()
			return nil
		case err == nil:
			continue
		case errors.Is(err, errDeadline) && last != nil:
			return fmt.Errorf("%w after %v; the last attempt failed: %w", errDeadline, f.deadline, last)
		case wrongBytes(err):
			mismatches++
		}
		if hopeless(err, mismatches) {
			return err
		}
		last = err
	}
}

// attempt does one thing for want: wait for what is on its way, or else fetch what is absent.
func (f *filler) attempt(ctx context.Context, o *object, want span, r reader) error {
	if !o.absent(want) {
		r.turn.pass()
		return o.await(ctx, want)
	}
	if o.paused() > 0 {
		r.turn.pass()
		if err := o.pause(ctx); err != nil {
			return err
		}
	}
	if err := o.takeSlot(ctx, r.turn); err != nil {
		return err
	}
	defer func() { <-o.slots }()
	if o.paused() > 0 {
		return nil // another's attempt failed while this one waited for its slot
	}
	ahead := f.ahead
	if 2*len(o.slots) > cap(o.slots) {
		ahead = 0 // slots are scarce: leave them to readers
	}
	deadline, _ := ctx.Deadline()
	return f.fetch(o, want, ahead, &demand{reader: r, want: want, deadline: deadline})
}

// takeSlot waits for a slot for a fetch; the cause of ctx when that ends first.
func (o *object) takeSlot(ctx context.Context, t *turn) error {
	select {
	case o.slots <- struct{}{}:
		return nil
	default:
		t.pass()
	}
	select {
	case o.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// A demand is what a fetch for a reader knows of it. A prefetch has none.
type demand struct {
	reader
	want     span
	deadline time.Time // errDeadline after it
}

// fetch claims what is absent of s, and of ahead bytes behind its first missing byte, and brings it in.
func (f *filler) fetch(o *object, s span, ahead uint64, d *demand) error {
	u := o.borrow()
	if u == nil {
		return errNoSource
	}
	defer u.wg.Done()
	c := o.claim(s, ahead)
	if len(c.spans) == 0 {
		return nil
	}
	defer o.landed(c.wanted)
	t := &transfer{filler: f, o: o, epoch: c.epoch, wanted: c.wanted, demand: d, in: stream{use: u, o: o}}
	defer t.in.close()
	ctx := u.ctx
	if d != nil {
		defer o.busy()()
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadlineCause(u.ctx, d.deadline, errDeadline)
		defer cancel()
		t.want = d.want
	}
	began := time.Now()
	rest, err := t.run(ctx, c.spans)
	if err == nil {
		return nil
	}
	f.blame(o, began, rest[0], err)
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
	case wrongBytes(err):
		f.count.mismatches.Add(1)
	}
	f.count.failures.Add(1)
	if !hopeless(err, 0) {
		o.failed(began, min(retryAfter(err), f.deadline))
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
