package daemon

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/fscache"
)

// idleWorkers is how many goroutines wait in Next while the kernel wants nothing: two, so that whichever gets a request
// leaves another waiting and need not start one, and some more, so that a burst starts few.
const idleWorkers = 4

// A pump reads requests and serves each in the goroutine that read it: nothing is handed over between the kernel and
// the bytes. A goroutine whose Next returned makes sure that another waits there before it serves, so a request that
// waits for its source stops nobody (I10), and there are never more goroutines than requests pending in the kernel and
// idleWorkers.
type pump struct {
	engine fscache.Engine
	serve  func(fscache.Request)

	waiting  atomic.Int32 // workers that are in Next, or committed to call it
	stopping atomic.Bool
	wg       sync.WaitGroup // workers
	failed   chan error     // the first error of Next; room for one

	mu      sync.Mutex
	workers map[*worker]struct{}
}

// A worker's since is when it began to serve its request, in Unix nanoseconds; 0 while it has none.
type worker struct{ since atomic.Int64 }

func newPump(e fscache.Engine, serve func(fscache.Request)) *pump {
	return &pump{engine: e, serve: serve, failed: make(chan error, 1), workers: map[*worker]struct{}{}}
}

// start begins to read requests; stop ends it.
func (p *pump) start() {
	p.waiting.Store(1)
	p.spawn()
}

// stop reads no more requests and returns when those that were read are answered. After the timeout it calls giveUp,
// which must make them end, once.
func (p *pump) stop(timeout time.Duration, giveUp func()) error {
	p.stopping.Store(true)
	if err := p.engine.Freeze(); err != nil {
		return fmt.Errorf("daemon: stop reading requests: %w", err)
	}
	done := make(chan struct{})
	go func() { // ends when the workers have, which is waited for below
		p.wg.Wait()
		close(done)
	}()
	t := time.AfterFunc(timeout, giveUp)
	defer t.Stop()
	<-done
	return nil
}

// spawn starts a worker that is already counted as waiting.
func (p *pump) spawn() {
	w := &worker{}
	p.mu.Lock()
	p.workers[w] = struct{}{}
	p.mu.Unlock()
	p.wg.Go(func() {
		p.work(w)
		p.mu.Lock()
		delete(p.workers, w)
		p.mu.Unlock()
	})
}

func (p *pump) work(w *worker) {
	for {
		r, err := p.engine.Next()
		left := p.waiting.Add(-1)
		if err != nil {
			if !errors.Is(err, fscache.ErrClosed) {
				select {
				case p.failed <- err:
				default:
				}
			}
			return
		}
		if left == 0 && p.join() {
			p.spawn()
		}
		w.since.Store(time.Now().UnixNano())
		p.serve(r)
		w.since.Store(0)
		if !p.join() {
			return
		}
	}
}

// join counts one more worker as waiting, if one more is wanted.
func (p *pump) join() bool {
	for !p.stopping.Load() {
		n := p.waiting.Load()
		if n >= idleWorkers {
			return false
		}
		if p.waiting.CompareAndSwap(n, n+1) {
			return true
		}
	}
	return false
}

// pending returns how many requests are being served, and since when the oldest is.
func (p *pump) pending() (n int, oldest time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for w := range p.workers {
		if ns := w.since.Load(); ns != 0 {
			n++
			if t := time.Unix(0, ns); oldest.IsZero() || t.Before(oldest) {
				oldest = t
			}
		}
	}
	return n, oldest
}
