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

	ending atomic.Bool   // stop was called
	ended  chan struct{} // closed when it has returned

	mu      sync.Mutex
	round   int // counts freeze calls: a worker of an earlier one reads no more
	serving map[*turn]struct{}
	inNext  int       // workers in Engine.Next, or with what it returned not in serving yet
	out     sync.Cond // inNext or, while the pump ramps up, serving shrank, or the ramp ended
	ramp    time.Time // until then no more than rampWidth requests are served at a time
}

// patience is for how long a request may keep the turn to read, at the most twice.
const patience = time.Millisecond

// watchIdle is for how many patiences the watch looks on when nothing is served, before it sleeps.
const watchIdle = 64

// A dead process may leave thousands of requests. Begun all together they would all be answered late; so for a moment the pump that finds them
// serves only so many at a time. It is too short for one slow source to be felt by the readers of another (I10).
const (
	rampTime  = 50 * time.Millisecond
	rampWidth = 32
)

// A turn to read comes with each request.
type turn struct {
	pump   *pump
	round  int
	since  time.Time // when the request was read
	passed atomic.Bool
}

// pass lets another goroutine read. Only the first call does something; no turn has none to pass.
func (t *turn) pass() {
	if t != nil && t.passed.CompareAndSwap(false, true) {
		t.pump.current.CompareAndSwap(t, nil)
		t.pump.wg.Go(func() { t.pump.work(t.round) })
	}
}

func newPump(e fscache.Engine, serve func(fscache.Request, *turn)) *pump {
	p := &pump{
		engine: e, serve: serve, failed: make(chan error, 1), serving: map[*turn]struct{}{},
		wake: make(chan struct{}, 1), quit: make(chan struct{}), ended: make(chan struct{}),
	}
	p.out.L = &p.mu
	return p
}

// start begins to read requests; stop ends it.
func (p *pump) start() {
	if len(p.engine.Pending()) > rampWidth {
		p.ramp = time.Now().Add(rampTime)
		p.wg.Go(p.rampUp)
	}
	p.read()
	p.wg.Go(p.watch)
}

// read gives the turn to read to a worker.
func (p *pump) read() {
	p.mu.Lock()
	round := p.round
	p.mu.Unlock()
	p.wg.Go(func() { p.work(round) })
}

// freeze reads no more requests. When it returns, each that was read is known to the engine as pending, and nobody has the turn to read:
// also after an error thaw gives it to somebody.
func (p *pump) freeze() error {
	err := p.engine.Freeze()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.round++
	if err != nil {
		return fmt.Errorf("daemon: stop reading requests: %w", err)
	}
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
	p.read()
	return nil
}

// stop reads no more requests and returns when those that were read are answered. After the timeout it calls giveUp,
// which must make them end, once. Whether or not start came, the second call only waits for the first.
func (p *pump) stop(timeout time.Duration, giveUp func()) (err error) {
	if !p.ending.CompareAndSwap(false, true) {
		<-p.ended
		return nil
	}
	defer close(p.ended)
	close(p.quit)
	if err = p.engine.Freeze(); err != nil {
		return fmt.Errorf("daemon: stop reading requests: %w", err)
	}
	t := time.AfterFunc(timeout, giveUp)
	defer t.Stop()
	p.wg.Wait()
	return nil
}

// work reads and serves requests for as long as it has the turn.
func (p *pump) work(round int) {
	for p.enter(round) {
		r, err := p.engine.Next()
		if err != nil {
			p.leave(nil)
			p.end(err)
			return
		}
		t := &turn{pump: p, round: round, since: time.Now()}
		p.leave(t)
		p.begin(t)
		p.serve(r, t)
		p.done(t)
		if !t.passed.CompareAndSwap(false, true) {
			return
		}
	}
}

// enter begins a call of Next; false: reading was frozen since the turn was given.
func (p *pump) enter(round int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.serving) >= rampWidth && time.Now().Before(p.ramp) {
		p.out.Wait()
	}
	if round != p.round {
		return false
	}
	p.inNext++
	return true
}

// rampUp ends the ramp.
func (p *pump) rampUp() {
	t := time.NewTimer(rampTime)
	defer t.Stop()
	select {
	case <-t.C:
	case <-p.quit:
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ramp = time.Time{}
	p.out.Broadcast()
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
	if !p.ramp.IsZero() {
		p.out.Broadcast()
	}
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
