package daemon

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"holdfast/fscache"
	"holdfast/rafs/blob"
	"holdfast/rafs/source"
)

// How long a failing source is left alone: twice as long each time, between these two.
const (
	minBackoff = 50 * time.Millisecond
	maxBackoff = 5 * time.Second
)

// maxMismatches is how many fetches of one reader's chunks may give wrong bytes before the reader is told.
const maxMismatches = 3

var (
	errStopping  = errors.New("the daemon is stopping")
	errUnmounted = errors.New("the image was unmounted")
	errNoSource  = errors.New("no mounted image has a source for the object")
	errAbandoned = errors.New("the fetch of another reader was given up")
	errDeadline  = errors.New("read deadline passed")
)

// A backoff says when a failing object may be fetched from again. It is the object's, not a reader's: a hundred readers
// of a dead source do not ask a hundred times as often.
type backoff struct {
	n     int       // failures in a row
	last  time.Time // of the last one
	until time.Time
	err   error // the last one
}

func (b *backoff) reset() { *b = backoff{} }

// failed counts a failure at now of an attempt begun at began. Attempts that were under way together count once. The pause
// is atLeast, which the source asked for, or else atMost.
func (b *backoff) failed(began, now time.Time, atLeast, atMost time.Duration) {
	if b.n == 0 || began.After(b.last) {
		b.n++
	}
	b.last = now
	d := min(maxBackoff, atMost)
	if b.n < 8 {
		d = min(d, minBackoff<<(b.n-1))
	}
	d = max(d/2+rand.N(d/2+1), atLeast) // jitter: half to all of it
	if t := now.Add(d); t.After(b.until) {
		b.until = t
	}
}

// pause waits until the object may be fetched from; the cause of ctx when that ends first.
func (o *object) pause(ctx context.Context) error {
	for {
		d := o.paused()
		if d <= 0 {
			return nil
		}
		if err := sleep(ctx, d); err != nil {
			return err
		}
	}
}

// paused is for how long the object is not to be fetched from; 0 or less: it may be.
func (o *object) paused() time.Duration {
	o.mu.Lock()
	until := o.backoff.until
	o.mu.Unlock()
	if until.IsZero() {
		return 0
	}
	return time.Until(until)
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// hopeless reports whether a reader that met err, its mismatches-th wrong bytes included, is to be told at once: the
// one place that decides what is tried again.
func hopeless(err error, mismatches int) bool {
	switch {
	case wrongBytes(err):
		return mismatches >= maxMismatches
	case errors.Is(err, errStopping), errors.Is(err, errDeadline), errors.Is(err, errNoSource):
		return true
	case errors.Is(err, errWrite):
		return !errors.Is(err, fscache.ErrNotOpen)
	}
	return source.IsPermanent(err)
}

// refusal reports whether a source will not give what was asked of it, which another may.
func refusal(err error) bool {
	return err != nil && source.IsPermanent(err) && !wrongBytes(err) && !errors.Is(err, errWrite)
}

// wrongBytes reports whether a source gave bytes that are not the image's.
func wrongBytes(err error) bool {
	return errors.Is(err, blob.ErrDigest) || errors.Is(err, blob.ErrDecode)
}

// errno is what a reader is told about err.
func errno(err error) fscache.Errno {
	switch {
	case err == nil:
		return fscache.OK
	case errors.Is(err, fscache.ErrNoSpace):
		return fscache.ENOSPC
	}
	return fscache.EIO
}

// retryAfter is how long the source that gave err asked to be left alone.
func retryAfter(err error) time.Duration {
	var s *source.StatusError
	if errors.As(err, &s) {
		return s.RetryAfter
	}
	return 0
}
