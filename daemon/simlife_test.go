package daemon

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
	"holdfast/handover"
	"holdfast/rafs/source"
	"holdfast/state"
)

var errDead = errors.New("this process is dead")

// A life is one process.
type life struct {
	h      *simHost
	pid    int
	d      *Daemon // set before anything of it runs
	before *life   // the predecessor in an upgrade; nil: a supervisor started it
	die    int     // the step, counted from here, at which it dies; 0: at none

	lock   *handover.Lock
	passed []*os.File // by a predecessor
	engine *lifeEngine
	holder *Holder
	inbox  *state.Inbox
	state  *state.DB

	gate   sync.RWMutex // held for reading over what must be over when the process is dead
	dead   bool
	gone   chan struct{} // closed with dead
	ctx    context.Context
	cancel context.CancelFunc
	ready  chan struct{}
	done   chan struct{} // closed when its goroutines have ended
	err    error         // of Run or Succeed, once done is closed

	mu       sync.Mutex
	files    map[*os.File]stored
	supposed map[string]bool // what it thinks the supervisor holds
}

func (h *simHost) newLife() *life {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.pids++
	l := &life{
		h: h, pid: h.pids, gone: make(chan struct{}), ready: make(chan struct{}), done: make(chan struct{}),
		files: map[*os.File]stored{}, supposed: map[string]bool{},
	}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	h.lives = append(h.lives, l)
	return l
}

// step says whether this is the step at which the process dies.
func (l *life) step() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	die := l.die == 1
	if l.die > 0 {
		l.die--
	}
	return die
}

// point is a step at which the process may die. After an error it is dead.
func (l *life) point() error {
	if l.step() {
		l.kill()
	}
	if l.isDead() {
		return errDead
	}
	return nil
}

// kernelPoint is one inside the engine, with locks held: survive buries who dies there.
func (l *life) kernelPoint(name string) {
	if l.step() || l.isDead() {
		l.h.note("%d dies at %s", l.pid, name)
		panic(errDead)
	}
}

func (l *life) survive(f func() error) (err error) {
	defer func() {
		switch r := recover(); r {
		case nil:
		case errDead:
			l.kill()
			err = errDead
		default:
			panic(r)
		}
	}()
	return f()
}

func (l *life) isDead() bool {
	l.gate.RLock()
	defer l.gate.RUnlock()
	return l.dead
}

// dieWithin has the process die at one of its next steps.
func (l *life) dieWithin(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.die = n
}

// kill is the process's death: whatever its goroutines do from here on changes nothing any more.
func (l *life) kill() {
	l.gate.Lock()
	dead := l.dead
	l.dead = true
	engine, holder, inbox, db, d, lock, passed := l.engine, l.holder, l.inbox, l.state, l.d, l.lock, l.passed
	l.gate.Unlock()
	if dead {
		return
	}
	l.h.note("%d dies", l.pid)
	close(l.gone)
	if engine != nil {
		engine.Kill()
	}
	if holder != nil && isClosed(holder.ready) && holder.session != nil {
		_ = holder.session.Close() // a transaction is whole or not there
	}
	if db != nil {
		_ = db.Close()
	}
	if inbox != nil {
		_ = inbox.Close() // stays, with what is in it
	}
	if d != nil {
		d.stop(errStopping)
	}
	if lock != nil {
		_ = lock.Close()
	}
	for _, f := range passed {
		_ = f.Close() // the lock of the predecessor's is among them
	}
	l.cancel()
	l.h.died(l)
}

// keep notes the process's database, which is closed with its death.
func (l *life) keep(db *state.DB) {
	l.gate.Lock()
	defer l.gate.Unlock()
	l.state = db
	if l.dead {
		_ = db.Close()
	}
}

// file makes a descriptor that stands for something.
func (l *life) file(what stored) *os.File {
	f, err := os.Open(os.DevNull)
	if err != nil {
		l.h.fail("%v", err)
	}
	l.h.mu.Lock()
	l.h.files = append(l.h.files, f)
	l.h.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.files[f] = what
	return f
}

// own has a passed descriptor closed with the process.
func (l *life) own(f *os.File) {
	l.gate.Lock()
	defer l.gate.Unlock()
	if l.dead {
		_ = f.Close()
		return
	}
	l.passed = append(l.passed, f)
}

// options are what cmd gives a daemon.
func (l *life) options() Options {
	o := Options{
		Log: l.h.log.With(zap.Int("pid", l.pid)), Release: "test", Root: l.h.root, Socket: filepath.Join(l.h.run, "api.sock"), ReadDeadline: 1000 * time.Hour,
		StopTimeout: time.Second,
		Ready: func() {
			l.keep(l.d.state)
			l.h.note("%d is ready", l.pid)
			close(l.ready)
		},
		made: l.prepare,
	}
	o.Upgrade = &UpgradeOptions{MainPID: l.mainPID}
	if l.h.change != nil {
		l.h.change(&o)
	}
	return o
}

func (l *life) origin() Origin {
	return Origin{Run: l.h.run, Supervisor: (*lifeSupervisor)(l), Engine: simkernel.Name, Open: l.open}
}

// prepare puts the host's faults into a daemon, and its table of mounts.
func (l *life) prepare(d *Daemon) {
	l.gate.Lock()
	l.d = d
	dead := l.dead
	l.gate.Unlock()
	if dead {
		d.stop(errStopping)
	}
	d.mountPoints = func() (map[string]string, error) {
		points := map[string]string{}
		for _, dir := range l.h.kernel.Mounts() {
			points[dir] = fsType
		}
		return points, nil
	}
	d.source = func(m *mount, s source.Source) source.Source {
		s = &hostSource{s, l.h}
		if l.h.tap != nil {
			s = l.h.tap(m.record, s)
		}
		return s
	}
	d.start = l.startSuccessor
}

// attach is what cmd does before Run. A process that dies in it undoes nothing.
func (l *life) attach(a Origin, o *Options) error {
	if err := Attach(a, o); err != nil {
		return err
	}
	o.Listener = newSilentListener()
	if l.supposed[socketName] {
		return l.make(o)
	}
	if err := a.Supervisor.Push(socketName, l.file(stored{socket: true})); err != nil {
		return errors.Join(err, o.Abort())
	}
	return l.make(o)
}

func (l *life) make(o *Options) error {
	d, err := New(*o)
	if err != nil {
		return errors.Join(err, o.Abort())
	}
	l.keep(d.state)
	if err := l.point(); err != nil {
		d.stop(errStopping)
		return errors.Join(err, d.close())
	}
	return nil
}

// leave is what cmd does after Run, and the process's end.
func (l *life) leave() {
	if err := l.d.Leave(l.err == nil); err != nil && !l.isDead() {
		l.h.fail("leave: %v", err)
	}
	l.kill()
}

// open opens the engine.
func (l *life) open(_ string, in fscache.Inherited, inbox fscache.Inbox, h fscache.Holder) (fscache.Engine, error) {
	if err := l.point(); err != nil {
		return nil, err
	}
	l.gate.Lock()
	l.holder, l.inbox = h.(*Holder), inbox.(*state.Inbox)
	l.gate.Unlock()
	if in.Lifeline == nil && (len(in.Objects) > 0 || len(in.Messages) > 0 || len(in.Pending) > 0) {
		l.h.fail("something is inherited without a lifeline: %+v", in)
	}
	var e *simkernel.Engine
	err := l.survive(func() (err error) {
		e, err = l.h.kernel.Start(simkernel.Config{
			Inherited: in, Inbox: (*lifeInbox)(l), Holder: (*lifeHolder)(l), Reserve: 64, Point: l.kernelPoint,
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	l.gate.Lock()
	l.engine = &lifeEngine{Engine: e, l: l}
	dead := l.dead
	l.gate.Unlock()
	if dead {
		e.Kill()
		return nil, errDead
	}
	l.engine.lifeline = l.file(stored{lifeline: true})
	return l.engine, nil
}

// mainPID is the supervisor being told of another main process.
func (l *life) mainPID(pid int) error {
	if err := l.point(); err != nil {
		return err
	}
	h := l.h
	h.mu.Lock()
	lives := slices.Clone(h.lives)
	h.mu.Unlock()
	for _, other := range lives {
		if h.unfit && other.pid == pid {
			other.kill()
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, other := range h.lives {
		if other.pid == pid && h.main == l && !other.isDead() { // a message about one that does not exist is dropped
			h.main = other
		}
	}
	return nil
}
