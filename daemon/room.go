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
)

// lookEvery is for how long an answer about free space is good, between which what is written is counted.
const lookEvery = 20 * time.Millisecond

// How long a reader waits for room before its bytes are tried again: twice as long each time, between these two, or until something
// was culled.
const (
	minRoomPause = 250 * time.Millisecond
	maxRoomPause = 4 * time.Second
)

// A room is the space that the cache has. It decides what may be written, and tells the culler when there is little of it.
//
// Nothing waits while mu is held.
type room struct {
	engine fscache.Engine
	limits fscache.Limits
	quotas quotas
	log    *zap.Logger

	wake     chan struct{} // of the culler; room for one
	refused  atomic.Bool   // since something was culled, a write found no room, whatever the file system says it has
	wanted   atomic.Bool   // since the culler last looked, something was not written for want of room by the watermarks
	asked    atomic.Int64  // when the file system was last asked, in nanoseconds since began
	began    time.Time
	known    atomic.Pointer[fscache.Space] // what it said
	admitted atomic.Int64                  // bytes let through since
	culled   atomic.Int64                  // objects, since the daemon started
	parts    atomic.Int64                  // bytes of mounted objects, likewise

	waiting atomic.Int64 // who waits for room

	mu      sync.Mutex
	changed chan struct{} // closed and replaced when something was culled
}

func newRoom(e fscache.Engine, l fscache.Limits, q map[string]int64, log *zap.Logger) *room {
	return &room{
		engine: e, limits: l, quotas: newQuotas(q), log: log, began: time.Now(),
		wake: make(chan struct{}, 1), changed: make(chan struct{}),
	}
}

// look asks for the free space, no more often than every lookEvery, and counts what was written since.
func (r *room) look() (fscache.Space, error) {
	now := int64(time.Since(r.began))
	at := r.asked.Load()
	s := r.known.Load()
	if (s == nil || now-at > int64(lookEvery)) && r.asked.CompareAndSwap(at, now) {
		return r.ask()
	}
	if s == nil { // somebody else is asking for the first time
		return r.engine.Space()
	}
	left := *s
	left.Free -= r.admitted.Load()
	return left, nil
}

// ask asks for the free space. What it says counts from here on.
func (r *room) ask() (fscache.Space, error) {
	fresh, err := r.engine.Space()
	if err == nil {
		r.admitted.Store(0)
		r.known.Store(&fresh)
	}
	return fresh, err
}

// admit says whether n bytes may be written for a domain, with an error that wraps fscache.ErrNoSpace if not. Where the file system does not say
// how much it has, the write finds out.
func (r *room) admit(domain string, n int64) error {
	s, err := r.look()
	if err != nil {
		r.log.Debug("the free space of the cache is not known", zap.Error(err))
		return nil
	}
	low := r.limits.Low(s)
	over := r.quotas.over(domain)
	if low || over {
		r.kick()
	}
	switch {
	case r.limits.Stopped(s, n):
		r.wanted.Store(true) // before anybody is woken
		r.kick()
		return fmt.Errorf("the cache's file system has %d of %d bytes and %d of %d inodes left, below the stop mark: %w", s.Free, s.Total, s.FreeInodes, s.Inodes, fscache.ErrNoSpace)
	case over && !r.limits.Ample(s):
		// Whatever it wrote now would have to be made up for with other domains' objects.
		return fmt.Errorf("domain %s is over its quota, and there is not enough room to let it: %w", domain, fscache.ErrNoSpace)
	}
	r.admitted.Add(n)
	r.quotas.wrote(domain, n)
	return nil
}

// full notes that a write found no room, whatever the file system says it has.
func (r *room) full() {
	r.refused.Store(true)
	r.kick()
}

// kick has the culler look.
func (r *room) kick() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// made tells everybody who waits for room that something was culled.
func (r *room) made() {
	r.refused.Store(false)
	r.asked.Store(-int64(lookEvery) - 1)
	r.known.Store(nil)
	r.mu.Lock()
	defer r.mu.Unlock()
	close(r.changed)
	r.changed = make(chan struct{})
}

// wait waits until something was culled, for d at the most; the cause of ctx when that ends first.
func (r *room) wait(ctx context.Context, d time.Duration) error {
	r.waiting.Add(1)
	defer r.waiting.Add(-1)
	r.mu.Lock()
	changed := r.changed
	r.mu.Unlock()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-changed:
		return nil
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// A shortage is the wait of one reader, or of one step of a prefetch, for room.
type shortage struct {
	until time.Time // zero: there was always room
	pause time.Duration
}

// there reports whether there was no room before.
func (s *shortage) there() bool { return !s.until.IsZero() }

// await waits for room, after a write failed with err for want of it. It returns an error when there is none after the space deadline: err, or
// the cause of ctx. Nobody else is held up meanwhile: the caller has neither a slot nor the turn to read.
func (f *filler) awaitRoom(ctx context.Context, s *shortage, err error) error {
	if !s.there() {
		s.until, s.pause = time.Now().Add(f.spaceDeadline), minRoomPause
	}
	left := time.Until(s.until)
	if left <= 0 {
		return fmt.Errorf("no room after %v: %w", f.spaceDeadline, err)
	}
	d := min(left, s.pause)
	s.pause = min(2*s.pause, maxRoomPause)
	return f.room.wait(ctx, d)
}

// noRoom reports whether a write failed for want of space.
func noRoom(err error) bool { return errors.Is(err, fscache.ErrNoSpace) }
