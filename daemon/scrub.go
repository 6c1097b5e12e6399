package daemon

import (
	"context"
	"errors"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/time/rate"
)

// scrubPause is between two passes, so that a host with little cached is not told to read it all the time.
const scrubPause = time.Hour

// A ScrubStatus says what the scrubber has found since the daemon started.
type ScrubStatus struct {
	Rate   int64     `json:"rate"`   // bytes a second
	Passes int       `json:"passes"` // over all that was mounted
	Chunks int64     `json:"chunks"` // compared
	Bytes  int64     `json:"bytes"`  // of those
	Bad    int64     `json:"bad"`    // chunks that did not have the bytes they must have, each as often as it was found
	Last   time.Time `json:"last"`   // when one was last found
}

// A scrubber compares what is cached of complete objects with its digests, over and over, slowly. It repairs nothing: what it finds is a
// disk to be looked at.
type scrubber struct {
	mu     sync.Mutex
	status ScrubStatus
}

func (s *scrubber) count(n int64, bad bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status.Chunks++
	s.status.Bytes += n
	if bad {
		s.status.Bad++
		s.status.Last = time.Now().UTC()
	}
}

// scrub runs until ctx ends.
func (d *Daemon) scrub(ctx context.Context) {
	d.scrubber.mu.Lock()
	d.scrubber.status.Rate = d.opt.ScrubRate
	d.scrubber.mu.Unlock()
	limit := rate.NewLimiter(rate.Limit(d.opt.ScrubRate), maxScrub)
	for ctx.Err() == nil {
		for _, o := range d.objects.all() {
			if o.has(span{0, o.table.Len()}) {
				d.scrubObject(ctx, o, limit)
			}
		}
		d.scrubber.mu.Lock()
		d.scrubber.status.Passes++
		d.scrubber.mu.Unlock()
		_ = sleep(ctx, scrubPause) // ended is looked for above
	}
}

// maxScrub is the most that is read at once, in bytes; what a larger chunk has beyond that is paid for by the next ones.
const maxScrub = 1 << 20

func (d *Daemon) scrubObject(ctx context.Context, o *object, limit *rate.Limiter) {
	for i := range o.table.Len() {
		_, n := o.at(i)
		for left := n; left > 0; left -= maxScrub {
			if limit.WaitN(ctx, int(min(left, maxScrub))) != nil {
				return
			}
		}
		if !o.has(span{i, i + 1}) {
			return
		}
		b, err := d.checkChunk(ctx, o, i, false)
		switch {
		case errors.Is(err, errors.ErrUnsupported), errors.Is(err, errNoSource): // cachefiles; or it is no longer mounted
			return
		case err != nil:
			d.log.Warn("what is cached cannot be read", zap.Stringer("object", o.key), zap.Error(err))
			return
		}
		d.scrubber.count(n, b != nil)
	}
}

// report is nil where there is no scrubber.
func (s *scrubber) report() *ScrubStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.status.Rate == 0 {
		return nil
	}
	now := s.status
	return &now
}
