package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
)

// A lifeInbox is a process's inbox, which nobody changes after its death.
type lifeInbox life

func (b *lifeInbox) Take() (int, []byte, bool) {
	b.gate.RLock()
	defer b.gate.RUnlock()
	if b.dead {
		return 0, nil, false
	}
	return b.inbox.Take()
}

func (b *lifeInbox) Free(slot int) {
	b.gate.RLock()
	defer b.gate.RUnlock()
	if !b.dead {
		b.inbox.Free(slot)
	}
}

func (b *lifeInbox) Slots() int { return b.inbox.Slots() }

// A lifeHolder gives what is held a descriptor.
type lifeHolder life

func (x *lifeHolder) Hold(h fscache.Held) error {
	l := (*life)(x)
	h.File = l.file(stored{held: h})
	if err := l.point(); err != nil {
		return err
	}
	return l.holder.Hold(h)
}

func (x *lifeHolder) Drop(h fscache.Held) {
	l := (*life)(x)
	if l.point() == nil {
		l.holder.Drop(h)
	}
}

// A lifeSupervisor is a process's line to the supervisor.
type lifeSupervisor life

// say does f in the supervisor, if it listens to the process: nobody says when it does not.
func (x *lifeSupervisor) say(f func(h *simHost)) error {
	l := (*life)(x)
	if err := l.point(); err != nil {
		return err
	}
	l.h.mu.Lock()
	if l.h.main == l {
		f(l.h)
	}
	l.h.mu.Unlock()
	return l.point()
}

func (x *lifeSupervisor) Push(name string, f *os.File) error {
	x.mu.Lock()
	what, known := x.files[f]
	if !known {
		x.mu.Unlock()
		return fmt.Errorf("push of a descriptor that nobody made: %q", name)
	}
	again := x.supposed[name]
	x.supposed[name] = true
	x.mu.Unlock()
	if again {
		return fmt.Errorf("one is already stored as %q", name)
	}
	var err error
	return errors.Join(x.say(func(h *simHost) {
		if _, taken := h.store[name]; taken {
			err = fmt.Errorf("two descriptors under the name %q", name)
			return
		}
		switch {
		case !what.lifeline && !what.socket:
			err = h.kernel.Keep(what.held)
		}
		h.store[name] = what
	}), err)
}

func (x *lifeSupervisor) Remove(name string) error {
	err := x.say(func(h *simHost) {
		what, ok := h.store[name]
		switch {
		case !ok:
			return
		case what.lifeline && len(h.kernel.Mounts()) > 0:
			h.fail("the lifeline is let go with %q mounted (I4)", h.kernel.Mounts())
		case !what.lifeline && !what.socket:
			h.kernel.Let(what.held)
		}
		delete(h.store, name)
	})
	if err == nil {
		x.mu.Lock()
		delete(x.supposed, name)
		x.mu.Unlock()
	}
	return err
}

func (x *lifeSupervisor) Notify(string) error { return (*life)(x).point() }
func (x *lifeSupervisor) Wakes(string) bool   { return true }

func (x *lifeSupervisor) Holds(names ...string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, n := range names {
		x.supposed[n] = true
	}
}

func (x *lifeSupervisor) Verify(context.Context) error {
	x.h.mu.Lock()
	defer x.h.mu.Unlock()
	x.mu.Lock()
	defer x.mu.Unlock()
	for n := range x.supposed {
		if _, ok := x.h.store[n]; !ok {
			return fmt.Errorf("%q is not held", n)
		}
	}
	for n := range x.h.store {
		if !x.supposed[n] {
			return fmt.Errorf("%q is held and nobody knows", n)
		}
	}
	return nil
}

// A lifeEngine is the engine of a process that may die.
type lifeEngine struct {
	*simkernel.Engine
	l        *life
	lifeline *os.File
}

func (e *lifeEngine) Lifeline() (string, *os.File) { return simkernel.Name, e.lifeline }

func (e *lifeEngine) Holding() []fscache.Held {
	list := e.Engine.Holding()
	for i := range list {
		list[i].File = e.l.file(stored{held: list[i]})
	}
	return list
}

func (e *lifeEngine) Next() (r fscache.Request, err error) {
	err = e.l.survive(func() (err error) {
		r, err = e.Engine.Next()
		return err
	})
	if errors.Is(err, errDead) {
		err = fscache.ErrClosed
	}
	if err == nil {
		e.l.h.note("%d takes %s %s %d+%d as %d", e.l.pid, r.Op, short(r.Object), r.Off, r.Len, r.ID)
	}
	return r, err
}

func (e *lifeEngine) Answer(r fscache.Request, n fscache.Errno) error {
	if err := e.l.point(); err != nil {
		return err
	}
	err := e.l.survive(func() error { return e.Engine.Answer(r, n) })
	e.l.h.note("%d answers %s %s %d+%d as %d with %d: %v", e.l.pid, r.Op, short(r.Object), r.Off, r.Len, r.ID, n, err)
	return err
}

func short(k fscache.Key) string { return k.ID[:min(6, len(k.ID))] }

func (e *lifeEngine) Add(ctx context.Context, o fscache.Object) error {
	return e.l.survive(func() error { return e.Engine.Add(ctx, o) })
}

func (e *lifeEngine) WriteAt(k fscache.Key, p []byte, off int64) error {
	if err := e.l.point(); err != nil {
		return err
	}
	return e.Engine.WriteAt(k, p, off)
}

func (e *lifeEngine) Drop(k fscache.Key, x fscache.Extent) error {
	if err := e.l.point(); err != nil {
		return err
	}
	e.l.h.note("%d makes a hole in %s %d+%d", e.l.pid, short(k), x.Off, x.Len)
	return errors.Join(e.l.survive(func() error { return e.Engine.Drop(k, x) }), e.l.point())
}

func (e *lifeEngine) Complete(k fscache.Key) error {
	if err := e.l.point(); err != nil {
		return err
	}
	return e.l.survive(func() error { return e.Engine.Complete(k) })
}

func (e *lifeEngine) Remove(k fscache.Key) error {
	if err := e.l.point(); err != nil {
		return err
	}
	if e.l.h.busy != nil && e.l.h.busy(k) {
		return fmt.Errorf("object %s: %w", k, fscache.ErrBusy)
	}
	return e.l.survive(func() error { return e.Engine.Remove(k) })
}

func (e *lifeEngine) Freeze() error {
	return errors.Join(e.l.h.freezeError, e.Engine.Freeze())
}

func (e *lifeEngine) Replay() {
	if e.l.point() == nil {
		e.Engine.Replay()
	}
}

// Mount returns when the process dies, but the mount goes on in the kernel.
func (e *lifeEngine) Mount(_ context.Context, m fscache.Mount) error {
	if err := e.l.point(); err != nil {
		return err
	}
	if err := e.l.h.mountError; err != nil {
		return err
	}
	done := make(chan error, 1)
	if err := e.StartMount(m, func(err error) { done <- err }); err != nil {
		return err
	}
	select {
	case err := <-done:
		return errors.Join(err, e.l.point())
	case <-e.l.gone:
		return errDead
	}
}

func (e *lifeEngine) Unmount(ctx context.Context, dir string) error {
	if err := e.l.point(); err != nil {
		return err
	}
	return errors.Join(e.Engine.Unmount(ctx, dir), e.l.point())
}

func (e *lifeEngine) Abandon(ctx context.Context, m fscache.Mount) error {
	if err := e.l.point(); err != nil {
		return err
	}
	return e.Engine.Abandon(ctx, m)
}
