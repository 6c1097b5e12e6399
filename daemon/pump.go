package daemon

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/fscache"
)

// A pump reads requests and serves each in the goroutine that read it: nothing is handed over between the kernel and
// the bytes. One goroutine at a time has the turn to read. It keeps the turn while it serves what takes microseconds, for
// waking another goroutine costs more than that, and passes it on before anything that may take longer. One that did not
// pass it within a patience, whatever holds it up, has it taken away, so that no request can stop another for longer (I10).
// There are never more goroutines than requests pending in the kernel, one that reads and one that watches.
type pump struct {
	engine fscache.Engine
	serve  func(fscache.Request, *turn)
	wg     sync.WaitGroup
	failed chan error // the first error of Next; room for one

	current atomic.Pointer[turn] // of the request being served by who has the turn; nil: it is reading
	asleep  atomic.Bool          // the watch sleeps until woken
	wake    chan struct{}        // room for one
	quit    chan struct{}        // ends the watch

	ending sync.Once // of stop

	mu      sync.Mutex
	serving map[*turn]struct{}
	inNext  int       // workers in Engine.Next, or with what it returned not in serving yet
	out     sync.Cond // inNext shrank
}

// patience is for how long a request may keep the turn to read, at the most twice.
const patience = time.Millisecond

// watchIdle is for how many patiences the watch looks on when nothing is served, before it sleeps.
const watchIdle = 64

// A turn to read comes with each request.
type turn struct {
	pump   *pump
	since  time.Time // when the request was read
	passed atomic.Bool
}

// pass lets another goroutine read. Only the first call does something; no turn has none to pass.
func (t *turn) pass() {
	if t != nil && t.passed.CompareAndSwap(false, true) {
		t.pump.current.CompareAndSwap(t, nil)
		t.pump.wg.Go(t.pump.work)
	}
}

func newPump(e fscache.Engine, serve func(fscache.Request, *turn)) *pump {
	p := &pump{
		engine: e, serve: serve, failed: make(chan error, 1), serving: map[*turn]struct{}{},
		wake: make(chan struct{}, 1), quit: make(chan struct{}),
	}
	p.out.L = &p.mu
	return p
}

// start begins to read requests; stop ends it.
func (p *pump) start() {
	p.wg.Go(p.work)
	p.wg.Go(p.watch)
}

// freeze reads no more requests. When it returns, each that was read is known to the engine as pending.
func (p *pump) freeze() error {
	if err := p.engine.Freeze(); err != nil {
		return fmt.Errorf("daemon: stop reading requests: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.inNext > 0 {
		p.out.Wait()
	}
	return nil
}

// thaw reads again after freeze.
func (p *pump) thaw() error {
	if err := p.engine.Thaw(); err != nil {
		return fmt.Errorf("daemon: go on reading requests: %w", err)
	}
	p.wg.Go(p.work)
	return nil
}

// stop reads no more requests and returns when those that were read are answered. After the timeout it calls giveUp,
// which must make them end, once. Whether or not start came, the second call only waits for the first.
func (p *pump) stop(timeout time.Duration, giveUp func()) (err error) {
	p.ending.Do(func() {
		close(p.quit)
		if err = p.engine.Freeze(); err != nil {
			err = fmt.Errorf("daemon: stop reading requests: %w", err)
			return
		}
		t := time.AfterFunc(timeout, giveUp)
		defer t.Stop()
		p.wg.Wait()
	})
	return err
}

// work reads and serves requests for as long as it has the turn.
func (p *pump) work() {
	for {
		p.enter()
		r, err := p.engine.Next()
		if err != nil {
			p.leave(nil)
			p.end(err)
			return
		}
		t := &turn{pump: p, since: time.Now()}
		p.leave(t)
		p.begin(t)
		p.serve(r, t)
		p.done(t)
		if !t.passed.CompareAndSwap(false, true) {
			return
		}
	}
}

func (p *pump) enter() {
	p.mu.Lock()
	p.inNext++
	p.mu.Unlock()
}

// leave ends a call of Next, which returned a request unless t is nil.
func (p *pump) leave(t *turn) {
	p.mu.Lock()
	if p.inNext--; p.inNext == 0 {
		p.out.Broadcast()
	}
	if t != nil {
		p.serving[t] = struct{}{}
	}
	p.mu.Unlock()
}

func (p *pump) begin(t *turn) {
	p.current.Store(t)
	if p.asleep.Load() {
		select {
		case p.wake <- struct{}{}:
		default:
		}
	}
}

func (p *pump) done(t *turn) {
	p.current.CompareAndSwap(t, nil)
	p.mu.Lock()
	delete(p.serving, t)
	p.mu.Unlock()
}

func (p *pump) end(err error) {
	if errors.Is(err, fscache.ErrClosed) {
		return
	}
	select {
	case p.failed <- err:
	default:
	}
}

// watch takes the turn from who has kept it for a patience.
func (p *pump) watch() {
	tick := time.NewTicker(patience)
	defer tick.Stop()
	var seen *turn
	for idle := 0; ; {
		select {
		case <-tick.C:
		case <-p.quit:
			return
		}
		t := p.current.Load()
		if t != nil && t == seen {
			t.pass()
		}
		if seen = t; t != nil {
			idle = 0
			continue
		}
		if idle++; idle < watchIdle {
			continue
		}
		idle = 0
		tick.Stop()
		if !p.sleep() {
			return
		}
		tick.Reset(patience)
	}
}

// sleep waits for a request to be served; false: the pump ends.
func (p *pump) sleep() bool {
	p.asleep.Store(true)
	defer p.asleep.Store(false)
	if p.current.Load() != nil { // read before asleep was set
		return true
	}
	select {
	case <-p.wake:
		return true
	case <-p.quit:
		return false
	}
}

// pending returns how many requests are being served, and since when the oldest is.
func (p *pump) pending() (n int, oldest time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for t := range p.serving {
		if oldest.IsZero() || t.since.Before(oldest) {
			oldest = t.since
		}
	}
	return len(p.serving), oldest
}
