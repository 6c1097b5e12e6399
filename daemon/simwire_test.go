package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/handover"
)

// A simWire is the connection between two lives in an upgrade: it does what handover.Give and Take do by the protocol, without
// processes. Either side may die at each step.
type simWire struct {
	from, to *life
	calls    chan func(handover.Taker) error // for the successor to do
	results  chan error                      // of each
	granted  chan struct{}                   // closed when the successor may read
	over     chan struct{}                   // closed when nothing more comes
}

var errPeer = errors.New("the other process ended")

// startSuccessor starts a life beside this one, when the one before it has ended: that has the lock of its own handover until then
// (handover.Start).
func (l *life) startSuccessor(ctx context.Context, _ UpgradeRequest) (start, error) {
	if err := l.point(); err != nil {
		return nil, err
	}
	if l.before != nil {
		select {
		case <-l.before.gone:
		case <-l.gone:
			return nil, errDead
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	to := l.h.newLife()
	to.before = l
	to.die = l.h.successorDies
	l.h.note("%d starts %d, to die at %d", l.pid, to.pid, to.die)
	w := &simWire{
		from: l, to: to, calls: make(chan func(handover.Taker) error), results: make(chan error, 1),
		granted: make(chan struct{}), over: make(chan struct{}),
	}
	s, err := newSuccessor(to.origin(), to.options())
	if err != nil {
		return nil, err
	}
	s.listen = func(*os.File) (net.Listener, error) { return newSilentListener(), nil }
	go func() {
		defer close(to.done)
		d, err := s.run(to.ctx, func(ctx context.Context) error { return w.take(ctx, s) })
		to.err = err
		to.h.note("%d succeeded: %v", to.pid, err)
		if d != nil {
			to.leave()
		}
		to.kill()
	}()
	return w, nil
}

func (w *simWire) PID() int     { return w.to.pid }
func (w *simWire) Close() error { return nil }

// take is the successor's side.
func (w *simWire) take(ctx context.Context, t handover.Taker) error {
	for {
		select {
		case f := <-w.calls:
			if stall := w.to.h.stall; stall != nil {
				select {
				case <-stall:
				case <-w.to.gone:
				}
			}
			err := f(t)
			w.results <- err
			if err != nil {
				return err
			}
		case <-w.over:
			return nil
		case <-w.from.gone:
			if !isClosed(w.granted) {
				return errPeer
			}
			t.Drained(errPeer)
			return errPeer
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// call has the successor do something.
func (w *simWire) call(ctx context.Context, f func(handover.Taker) error) error {
	if err := w.from.point(); err != nil {
		return err
	}
	do := func(t handover.Taker) error {
		if err := w.to.point(); err != nil {
			return err
		}
		return errors.Join(f(t), w.to.point())
	}
	select {
	case w.calls <- do:
	case <-w.to.gone:
		return errPeer
	case <-w.from.gone:
		return errDead
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case err := <-w.results:
		return errors.Join(err, w.from.point())
	case <-w.to.gone:
		return errPeer
	case <-w.from.gone:
		return errDead
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Give is the predecessor's side.
func (w *simWire) Give(ctx context.Context, g handover.Giver) (given handover.Given, err error) {
	failed := func(err error) (handover.Given, error) {
		if !w.from.isDead() {
			time.Sleep(time.Millisecond) // being killed takes its time
			w.to.kill()
			<-w.to.done
		}
		return given, err
	}
	list, err := g.Prepare()
	if err != nil {
		return failed(err)
	}
	if list, err = w.pass(list); err != nil {
		return failed(err)
	}
	if err := w.call(ctx, func(t handover.Taker) error { return t.Prepare(list) }); err != nil {
		return failed(err)
	}
	update := func(list []handover.Record) error {
		for _, r := range list {
			if err := w.call(ctx, func(t handover.Taker) error { return t.Update(r) }); err != nil {
				return err
			}
		}
		return nil
	}
	if list, err = g.Update(); err != nil {
		return failed(err)
	}
	if err := update(list); err != nil {
		return failed(err)
	}
	if list, err = g.Commit(); err != nil {
		return failed(err)
	}
	if err = update(list); err == nil {
		err = w.call(ctx, handover.Taker.Commit)
	}
	if err != nil {
		given, err = failed(err)
		if !w.from.isDead() {
			g.Resume()
		}
		return given, err
	}
	if w.from.point() != nil {
		return given, errDead
	}
	close(w.granted)
	given.Taken = true
	err = w.call(ctx, func(t handover.Taker) error { t.Start(); return nil })
	return given, w.drain(ctx, err, g.Done())
}

// drain tells the successor what is done.
func (w *simWire) drain(ctx context.Context, err error, done <-chan handover.Record) error {
	for {
		select {
		case r, ok := <-done:
			switch {
			case err != nil && !ok:
				return err
			case err != nil:
			case ok:
				err = w.call(ctx, func(t handover.Taker) error { t.Done(r); return nil })
			default:
				err = w.call(ctx, func(t handover.Taker) error { t.Drained(nil); return nil })
				close(w.over)
				return err
			}
		case <-w.from.gone:
			return errDead
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// pass makes the successor descriptors of its own of those that the predecessor closes.
func (w *simWire) pass(list []handover.Record) ([]handover.Record, error) {
	for i, r := range list {
		if r.Kind == kindObjects {
			continue
		}
		files := make([]handover.NamedFile, len(r.Files))
		for k, f := range r.Files {
			fd, err := unix.FcntlInt(f.File.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				return nil, fmt.Errorf("pass %s: %w", f.Name, err)
			}
			files[k] = handover.NamedFile{Name: f.Name, File: os.NewFile(uintptr(fd), f.Name)}
			w.to.own(files[k].File)
		}
		list[i].Files = files
	}
	return list, nil
}
