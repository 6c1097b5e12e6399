package daemon

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"holdfast/fscache"
	"holdfast/rafs/image"
)

// prefetchStep is how much a prefetch asks for at a time, in bytes of the object: enough to hide a round trip, and not so
// much that a reader that comes meanwhile waits for long behind it.
const prefetchStep = 4 << 20

// What somebody has asked for is fetched in so many steps at a time, one of which decodes while another waits for its source, and in larger
// ones: each costs the source a request, and on a fast link that takes longer than its bytes.
const (
	hurriedLanes = 3
	hurriedStep  = 2 * prefetchStep
)

// prefetching is a mount's prefetch, which an upgrade pauses: a goroutine at a time wants it, others may be at their last fetch.
type prefetching struct {
	running atomic.Int32 // goroutines
	wg      sync.WaitGroup

	mu     sync.Mutex
	cancel context.CancelFunc // nil: none is under way
	turn   int                // counts begun ones
	err    error              // why the last one that was not paused did not bring everything in
	over   bool
}

// begin has run work until ctx ends, or pause or end is called. While one is under way, or after end, it does nothing.
func (p *prefetching) begin(ctx context.Context, work func(context.Context) error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.over || p.cancel != nil {
		return
	}
	ctx, p.cancel = context.WithCancel(ctx)
	p.err = nil
	p.turn++
	turn := p.turn
	p.running.Add(1)
	p.wg.Go(func() {
		defer p.running.Add(-1)
		err := work(ctx)
		p.mu.Lock()
		defer p.mu.Unlock()
		if ctx.Err() == nil && p.turn == turn {
			p.cancel()
			p.cancel, p.err = nil, err
		}
	})
}

// failure is why the last one that was not paused did not bring everything in; nil while another is under way.
func (p *prefetching) failure() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// pause ends it as soon as what it is fetching is there, and waits for nothing.
func (p *prefetching) pause() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cancel != nil {
		p.cancel()
		p.cancel = nil
	}
}

// end ends it for good, and returns when it has ended.
func (p *prefetching) end() {
	p.pause()
	p.mu.Lock()
	p.over = true
	p.mu.Unlock()
	p.wg.Wait()
}

// A prefetch brings a mounted image in, in the image's own order, while no reader of the image waits for anything. It
// takes none of the slots of readers, and what limits its bandwidth is waited for before anything is claimed, so that
// a chunk on its way comes as fast as the source gives it.
type prefetch struct {
	*filler
	gate  *gate
	limit *rate.Limiter // nil: none
	step  uint64
	lanes int  // steps at a time
	flush bool // somebody waits for the end, which is when all is synced
}

func newPrefetch(f *filler, g *gate, bps int64) *prefetch {
	p := &prefetch{filler: f, gate: g, step: prefetchStep, lanes: 1}
	if bps > 0 {
		p.step = uint64(min(prefetchStep, max(bps/4, 1)))
		p.limit = rate.NewLimiter(rate.Limit(bps), int(p.step))
	}
	return p
}

// run prefetches plan; objects are the image's, by blob. What cannot be written to comes when a reader has opened it: after a
// takeover that is everything. The error says what no more is tried for, unless ctx ended.
func (p *prefetch) run(ctx context.Context, plan []image.Range, objects []*object) error {
	closed := map[*object][]image.Range{}
	err := p.pass(ctx, plan, objects, closed)
	var wg sync.WaitGroup
	var mu sync.Mutex
	for o, plan := range closed {
		wg.Go(func() {
			select {
			case <-o.asked:
				e := p.pass(ctx, plan, objects, nil)
				mu.Lock()
				defer mu.Unlock()
				err = errors.Join(err, e)
			case <-ctx.Done():
			}
		})
	}
	wg.Wait()
	return err
}

// pass prefetches plan, and puts what of it is of objects that are not open into closed, unless that is nil.
func (p *prefetch) pass(ctx context.Context, plan []image.Range, objects []*object, closed map[*object][]image.Range) error {
	lost := map[*object]error{} // permanently failing: no use going on with these
	for _, r := range plan {
		if r.Blob < 0 || r.Blob >= len(objects) || lost[objects[r.Blob]] != nil {
			continue
		}
		o := objects[r.Blob]
		if closed[o] != nil {
			closed[o] = append(closed[o], r)
			continue
		}
		first, last := o.table.Range(r.Off, r.Len)
		err := p.bring(ctx, o, span{first, last})
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, fscache.ErrNotOpen) && closed != nil:
			closed[o] = append(closed[o], r)
		case errors.Is(err, fscache.ErrNoSpace):
			p.log.Warn("prefetch stops: no space left in the cache", zap.Error(err))
			return err
		case err != nil:
			lost[o] = err
			p.log.Warn("prefetch of an object stops", zap.Stringer("object", o.key), zap.Error(err))
		}
	}
	return errors.Join(slices.Collect(maps.Values(lost))...)
}

// bring makes s present step by step, once it is known what is.
func (p *prefetch) bring(ctx context.Context, o *object, s span) error {
	if err := o.found(ctx); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(p.lanes)
	for !s.empty() && ctx.Err() == nil {
		_, last := o.table.Range(o.table.At(s.first).Offset, p.step)
		step := span{s.first, min(last, s.last)}
		g.Go(func() error { return p.bringStep(ctx, o, step) })
		s.first = step.last
	}
	return g.Wait()
}

func (p *prefetch) bringStep(ctx context.Context, o *object, step span) error {
	mismatches := 0
	var shortage shortage
	for !o.has(step) {
		err := p.turn(ctx, o, step)
		if noRoom(err) {
			if err := p.awaitRoom(ctx, &shortage, err); err != nil {
				return err
			}
			continue
		}
		if wrongBytes(err) {
			mismatches++
		}
		if err != nil && (ctx.Err() != nil || hopeless(err, mismatches) || errors.Is(err, fscache.ErrNotOpen)) {
			return err
		}
	}
	return nil
}

// turn waits for the step's turn and fetches it, or waits for who else does.
func (p *prefetch) turn(ctx context.Context, o *object, step span) error {
	if !o.absent(step) {
		return o.await(ctx, step)
	}
	if err := o.pause(ctx); err != nil {
		return err
	}
	if err := p.pay(ctx, o, step); err != nil {
		return err
	}
	if err := p.gate.wait(ctx); err != nil {
		return err
	}
	if err := p.fetch(o, step, 0, nil); err != nil || !p.flush {
		return err
	}
	first := o.table.At(step.first).Offset
	return p.engine.Flush(o.key, fscache.Extent{Off: int64(first), Len: int64(o.table.At(step.last-1).End() - first)})
}

// pay waits until the bandwidth limit allows the stored bytes of step.
func (p *prefetch) pay(ctx context.Context, o *object, step span) error {
	if p.limit == nil {
		return nil
	}
	n := 0
	for i := step.first; i < step.last; i++ {
		n += int(o.table.At(i).Stored)
	}
	for n > 0 {
		k := min(n, p.limit.Burst())
		if err := p.limit.WaitN(ctx, k); err != nil {
			return err
		}
		n -= k
	}
	return nil
}
