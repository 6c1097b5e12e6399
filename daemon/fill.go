package daemon

import (
	"context"
	"errors"
	"fmt"
	"sync"
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
	background sync.WaitGroup // completions under way
}

// fill makes want present and calls ready as soon as it is; the read-ahead behind it goes on before fill returns. When it
// returns an error ready was not called. ctx ends with the daemon.
func (f *filler) fill(ctx context.Context, o *object, want span, ready func()) error {
	if o.has(want) {
		ready()
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, f.deadline, errDeadline)
	defer cancel()
	answered, mismatches := false, 0
	var last error
	for {
		err := f.attempt(ctx, o, want, func() { answered = true; ready() })
		switch {
		case answered: // an error concerns the read-ahead only, and was logged
			return nil
		case err == nil && o.has(want):
			ready()
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
func (f *filler) attempt(ctx context.Context, o *object, want span, ready func()) error {
	if !o.absent(want) {
		return o.await(ctx, want)
	}
	if err := o.pause(ctx); err != nil {
		return err
	}
	select {
	case o.slots <- struct{}{}:
		defer func() { <-o.slots }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if o.paused() > 0 {
		return nil // another's attempt failed while this one waited for its slot
	}
	ahead := f.ahead
	if 2*len(o.slots) > cap(o.slots) {
		ahead = 0 // slots are scarce: leave them to readers
	}
	deadline, _ := ctx.Deadline()
	return f.fetch(o, want, ahead, fetchOptions{want: want, ready: ready, deadline: deadline})
}

// fetchOptions say for whom a fetch is made; all are empty for a prefetch.
type fetchOptions struct {
	want     span
	ready    func()
	deadline time.Time // errDeadline after it
}

// fetch claims what is absent of s, and of ahead bytes behind its first missing byte, and brings it in.
func (f *filler) fetch(o *object, s span, ahead uint64, opt fetchOptions) error {
	u := o.borrow()
	if u == nil {
		return errNoSource
	}
	defer u.wg.Done()
	c := o.claim(s, ahead)
	if len(c.spans) == 0 {
		return nil
	}
	ctx, cancel := u.ctx, func() {}
	if opt.ready != nil {
		defer o.busy()()
		ctx, cancel = context.WithDeadlineCause(u.ctx, opt.deadline, errDeadline)
	}
	defer cancel()
	t := &transfer{filler: f, o: o, epoch: c.epoch, want: opt.want, ready: opt.ready, in: stream{use: u, o: o}}
	defer t.in.close()
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
