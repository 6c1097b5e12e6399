package daemon

import (
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
	"holdfast/rafs"
)

// A queue is as much of an engine as a pump needs.
type queue struct {
	fscache.Engine
	requests chan fscache.Request
	frozen   chan struct{}
	err      error // what Next fails with when requests is closed
}

func newQueue() *queue {
	return &queue{requests: make(chan fscache.Request), frozen: make(chan struct{})}
}

func (q *queue) Next() (fscache.Request, error) {
	select {
	case r, ok := <-q.requests:
		if !ok {
			return r, q.err
		}
		return r, nil
	case <-q.frozen:
		return fscache.Request{}, fscache.ErrClosed
	}
}

func (q *queue) Freeze() error {
	close(q.frozen)
	return nil
}

func TestRequestThatKeepsTheTurnToReadLosesIt(t *testing.T) {
	for _, idle := range []time.Duration{0, time.Second} { // with the watch awake, and asleep
		synctest.Test(t, func(t *testing.T) {
			q, stuck := newQueue(), make(chan struct{})
			served := make(chan uint64, 10)
			p := newPump(q, func(r fscache.Request, _ *turn) {
				if r.ID == 1 {
					<-stuck
				}
				served <- r.ID
			})
			p.start()
			time.Sleep(idle)
			q.requests <- fscache.Request{ID: 1}
			began := time.Now()
			q.requests <- fscache.Request{ID: 2}
			if id, d := <-served, time.Since(began); id != 2 || d > 2*patience {
				t.Errorf("beside a stuck request %d was served after %v, want 2 within %v", id, d, 2*patience)
			}
			if n, oldest := p.pending(); n != 1 || !oldest.Equal(began) {
				t.Errorf("%d pending since %v, want the stuck one since %v", n, oldest, began)
			}
			close(stuck)
			if err := p.stop(time.Minute, func() {}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestQuickRequestsAreServedByOneGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue()
		turns := 0
		p := newPump(q, func(_ fscache.Request, t *turn) {
			if t.passed.Load() {
				turns++
			}
		})
		p.start()
		for range 1000 {
			q.requests <- fscache.Request{}
		}
		if err := p.stop(time.Minute, func() {}); err != nil {
			t.Error(err)
		}
		if turns != 0 {
			t.Errorf("%d of 1000 quick requests had lost the turn", turns)
		}
	})
}

func TestEnginesErrorEndsThePump(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue()
		q.err = errors.New("the device is gone")
		p := newPump(q, nil)
		p.start()
		close(q.requests)
		if err := <-p.failed; !errors.Is(err, q.err) {
			t.Errorf("failed with %v", err)
		}
		if err := p.stop(time.Minute, func() {}); err != nil {
			t.Error(err)
		}
	})
}

func TestReadAheadHoldsBackWhileReadersMissElsewhere(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, nil)
		defer r.close()
		a, b := newBlob("aa", 1, rafs.CodecNone, many(32, 64*kib)...), newBlob("bb", 2, rafs.CodecNone, many(64, 64*kib)...)
		defer r.mount(nil, a, b)()
		r.d.ahead = 2 * mib
		r.wantOK(a, 0, 4*kib)
		r.d.ahead = 1 // from here on only readers' chunks
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := range 64 {
				r.wantOK(b, int64(i)*64*kib, 4*kib)
				time.Sleep(quiet / 2)
			}
		})
		time.Sleep(16 * quiet)
		if present, _ := r.object(a).presentBytes(); present > 64*kib+5*maxBatch {
			t.Errorf("%d bytes were read ahead while others missed, want a batch in %d ms", present, maxYields)
		}
		began := time.Now()
		r.wantOK(a, 2*mib-4*kib, 4*kib)
		if d := time.Since(began); d != 0 {
			t.Errorf("a reader of what is being read ahead waited %v for others", d)
		}
		wg.Wait()
	})
}

func (q *queue) Thaw() error {
	q.frozen = make(chan struct{})
	return nil
}

func (q *queue) Pending() []fscache.Pending { return nil }

func TestThawLeavesOneGoroutineReading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, busy := newQueue(), make(chan struct{})
		p := newPump(q, func(fscache.Request, *turn) { <-busy })
		p.start()
		q.requests <- fscache.Request{ID: 1} // whose goroutine has the turn still
		if err := errors.Join(p.freeze(), p.thaw()); err != nil {
			t.Fatal(err)
		}
		close(busy)
		synctest.Wait()
		if p.inNext != 1 {
			t.Errorf("%d goroutines read", p.inNext)
		}
		if err := p.stop(time.Minute, func() {}); err != nil {
			t.Error(err)
		}
	})
}
