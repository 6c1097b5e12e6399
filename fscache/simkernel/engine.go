package simkernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"holdfast/fscache"
)

// Name is the engine's name.
const Name = "simkernel"

// A Config says what a process works with, as that of the real engines does.
type Config struct {
	// Inherited is what the predecessor left. Its files are not used: the kernel knows whether the interface was open
	// before, and objects' descriptors go by their handles.
	Inherited fscache.Inherited
	Inbox     fscache.Inbox  // nil: requests are read into private memory
	Holder    fscache.Holder // nil: nothing is held beyond the process

	// Point is called with the name of each step between reading a request and forgetting it, and of each of Start's. It may
	// panic: that is the process's death at this instruction, and Kill must follow, but for Start's steps. nil: nothing.
	Point func(name string)
	// Reserve is below which number a successor in an upgrade keeps all descriptors occupied, from its start to Expect.
	Reserve int
	// Limit is how many descriptors the process can have (RLIMIT_NOFILE); 0: as many as it wants.
	Limit int
	// Unsafe leaves safeties out, for tests that show that they are missed.
	Unsafe Unsafe
}

// Unsafe says which safeties a process is without.
type Unsafe struct {
	NoOccupying   bool // fanotify: inherited numbers are not kept occupied
	RestoreFirst  bool // cachefiles: restore first, and let the daemon answer inherited OPENs
	RecordsFirst  bool // fanotify: of a record and a message of one number, the record is believed
	CloseThenFree bool // fanotify: the number is free before the slot is
	AnswerFreed   bool // the slot is freed before the answer
	ForgetReplay  bool // cachefiles: an OPEN that a predecessor answered with its last breath is taken for one that is gone
}

// An Engine is a process that has a Kernel's interface open. Make one with Kernel.Open or Kernel.Start. All fields but the
// first two are guarded by Kernel.mu.
type Engine struct {
	k *Kernel
	c Config

	frozen  bool                  // Next is over
	closed  bool                  // everything is; implies frozen
	added   map[fscache.Key]int64 // sizes
	whole   map[fscache.Key]bool  // that this process called Complete of
	pending map[uint64]*work      // by token
	handout []*work               // inherited, for Next, before anything is read
	token   uint64

	// A hot upgrade's successor, until Replay.
	waits    bool             // Expect was not called yet: nothing may be read
	expected map[uint64]*work // the predecessor has them, by ID

	cache cacheProcess // cachefiles
	fan   fanProcess   // fanotify
}

// work is a request that a process has.
type work struct {
	fscache.Pending
	slot   int     // where its message is; noSlot: nowhere
	orphan *orphan // fanotify: another process read it
	lent   bool    // cachefiles: a predecessor had it, and may have answered it with its last breath
}

const noSlot = -1

var (
	_ fscache.Engine    = (*Engine)(nil)
	_ fscache.Successor = (*Engine)(nil)
)

// Open starts a process that knows nothing but the interface: the first, or a successor of one that was closed.
func (k *Kernel) Open() (*Engine, error) { return k.Start(Config{}) }

// Start starts a process on the interface. Unless it inherits from one that is alive, it is the only one.
func (k *Kernel) Start(c Config) (*Engine, error) {
	if c.Point == nil {
		c.Point = func(string) {}
	}
	e := &Engine{
		k: k, c: c,
		added: make(map[fscache.Key]int64), whole: make(map[fscache.Key]bool), pending: make(map[uint64]*work), expected: make(map[uint64]*work),
		waits: c.Inherited.Alive,
	}
	started := false
	defer func() {
		if !started {
			e.Kill()
		}
	}()
	err := e.start()
	if err == nil {
		e.dropStale()
	}
	started = err == nil
	return e, err
}

func (e *Engine) start() error {
	k := e.k
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.processes) > 0 && !e.waits {
		return fmt.Errorf("opening the simulated kernel: another process has it: %w", fscache.ErrBusy) // daemon.c:99
	}
	k.processes = append(k.processes, e)
	if k.device != nil {
		e.startCachefiles()
	} else {
		e.startFanotify()
	}
	return nil
}

// Name implements fscache.Engine.
func (e *Engine) Name() string { return Name }

// Lifeline implements fscache.Engine: there is no descriptor here; see Kernel.SetKept.
func (e *Engine) Lifeline() (string, *os.File) { return Name, nil }

func checkName(s string) error {
	if s == "" || s == "." || s == ".." || len(s) > 255 || strings.ContainsAny(s, "/\x00") {
		return fmt.Errorf("%.20q cannot be a name", s)
	}
	return nil
}

// Add implements fscache.Engine.
func (e *Engine) Add(ctx context.Context, o fscache.Object) error {
	if err := errors.Join(ctx.Err(), checkName(o.Key.Domain), checkName(o.Key.ID)); err != nil {
		return err
	}
	if o.Size <= 0 || o.Size%page != 0 {
		return fmt.Errorf("object %s: size %d is not of whole blocks", o.Key, o.Size)
	}
	again, err := e.add(o)
	if err != nil || again || e.k.group == nil {
		return err
	}
	return e.watch(o)
}

func (e *Engine) add(o fscache.Object) (again bool, err error) {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if e.closed {
		return false, fscache.ErrClosed
	}
	f := e.k.files[o.Key]
	if f == nil {
		f = &file{size: o.Size, pages: make(map[int64][]byte)}
		e.k.files[o.Key] = f
	}
	if f.size != o.Size {
		return false, fmt.Errorf("object %s has %d bytes, not %d", o.Key, f.size, o.Size)
	}
	_, again = e.added[o.Key]
	e.added[o.Key] = o.Size
	return again, nil
}

// file finds what was added; k.mu is held.
func (e *Engine) file(k fscache.Key) (*file, error) {
	if e.closed {
		return nil, fscache.ErrClosed
	}
	if _, ok := e.added[k]; !ok {
		return nil, fmt.Errorf("object %s: %w", k, fscache.ErrUnknown)
	}
	return e.k.files[k], nil
}

// with runs op on the file of an object that was added.
func (e *Engine) with(k fscache.Key, op func(f *file) error) error {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	f, err := e.file(k)
	if err != nil {
		return err
	}
	return op(f)
}

// Remove implements fscache.Engine.
func (e *Engine) Remove(k fscache.Key) error {
	var held []fscache.Held
	err := e.with(k, func(*file) error {
		if e.k.used(k) {
			return fmt.Errorf("object %s is mounted: %w", k, fscache.ErrBusy)
		}
		if e.k.group != nil {
			held = e.unwatch(k)
		}
		delete(e.added, k)
		delete(e.whole, k)
		return nil
	})
	e.drop(held...)
	return err
}

// drop tells the supervisor what need not be held any more. No lock is held.
func (e *Engine) drop(held ...fscache.Held) {
	if e.c.Holder == nil {
		return
	}
	for _, h := range held {
		e.c.Point("drop.before")
		e.c.Holder.Drop(h)
	}
}

// Complete implements fscache.Engine.
func (e *Engine) Complete(k fscache.Key) error {
	return e.with(k, func(*file) error {
		e.whole[k] = true
		if e.k.group != nil {
			delete(e.k.group.marks, k)
		}
		return nil
	})
}

// WriteAt implements fscache.Engine.
func (e *Engine) WriteAt(k fscache.Key, p []byte, off int64) error {
	return e.with(k, func(f *file) error {
		if err := f.check(off, int64(len(p)), true); err != nil {
			return err
		}
		if e.k.device != nil && !e.cache.attached(e.cache.current[k]) || e.k.group != nil && e.fan.quiet[k] == 0 {
			return fmt.Errorf("object %s: %w", k, fscache.ErrNotOpen)
		}
		if !e.k.fits(f, off, int64(len(p))) {
			return fmt.Errorf("object %s: %w", k, fscache.ErrNoSpace)
		}
		f.write(p, off)
		return nil
	})
}

// unsupported is what the cachefiles interface cannot do: its descriptors are for writing only.
func (e *Engine) unsupported(what string) error {
	if e.k.device != nil {
		return fmt.Errorf("%s through /dev/cachefiles: %w", what, errors.ErrUnsupported)
	}
	return nil
}

// ReadAt implements fscache.Engine.
func (e *Engine) ReadAt(k fscache.Key, p []byte, off int64) error {
	return e.with(k, func(f *file) error {
		if err := e.unsupported("reading"); err != nil {
			return err
		}
		if err := f.check(off, int64(len(p)), false); err != nil {
			return err
		}
		if e.fan.quiet[k] == 0 {
			return fmt.Errorf("object %s: %w", k, fscache.ErrNotOpen)
		}
		clear(p)
		for i := range p {
			at := off + int64(i)
			if b := f.pages[at&^(page-1)]; b != nil {
				p[i] = b[at&(page-1)]
			}
		}
		return nil
	})
}

// Present implements fscache.Engine.
func (e *Engine) Present(k fscache.Key) (extents []fscache.Extent, err error) {
	err = e.with(k, func(f *file) error {
		extents = f.present()
		return nil
	})
	return extents, err
}

// Drop implements fscache.Engine.
func (e *Engine) Drop(k fscache.Key, x fscache.Extent) error {
	return e.with(k, func(f *file) error {
		if err := e.unsupported("punching holes"); err != nil {
			return err
		}
		if err := f.check(x.Off, x.Len, true); err != nil {
			return err
		}
		if e.whole[k] {
			return fmt.Errorf("object %s: a hole would be read as zeros: %w", k, fscache.ErrBusy)
		}
		if !e.k.group.marks[k] { // which a process that did not take it off does not know
			e.k.violation("a hole is made in %s, which the kernel does not ask about (I1)", k)
		}
		for at := x.Off; at < x.Off+x.Len; at += page {
			delete(f.pages, at)
		}
		return nil
	})
}

// Sync implements fscache.Engine; there is no power to fail.
func (e *Engine) Sync(k fscache.Key) error {
	return e.with(k, func(*file) error { return nil })
}

// Flush implements fscache.Engine.
func (e *Engine) Flush(k fscache.Key, _ fscache.Extent) error {
	return e.with(k, func(*file) error { return nil })
}

// AsksForBootstrap implements fscache.Engine.
func (e *Engine) AsksForBootstrap() bool { return e.k.device != nil }

// Mount implements fscache.Engine.
func (e *Engine) Mount(_ context.Context, m fscache.Mount) error {
	done := make(chan error, 1)
	if err := e.StartMount(m, func(err error) { done <- err }); err != nil {
		return err
	}
	return <-done
}

// StartMount begins what Mount does, in a process of its own: it ends when its requests are answered, whatever becomes of
// this one. done is called with the kernel's lock held.
func (e *Engine) StartMount(m fscache.Mount, done func(error)) error {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if err := e.k.checkMountPoint(m.Dir); err != nil {
		return err
	}
	objects := m.Blobs
	if e.AsksForBootstrap() {
		objects = append([]fscache.Object{m.Bootstrap}, m.Blobs...)
	}
	for _, o := range objects {
		if _, err := e.file(o.Key); err != nil {
			return fmt.Errorf("mounting on %s: %w", m.Dir, err)
		}
	}
	e.k.mountOn(new(waiter), m, done)
	return nil
}

// Unmount implements fscache.Engine.
func (e *Engine) Unmount(ctx context.Context, dir string) error {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	return e.k.unmount(dir)
}

// Freeze implements fscache.Engine.
func (e *Engine) Freeze() error {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	e.frozen = true
	e.k.changed.Broadcast()
	return nil
}

// Thaw implements fscache.Successor.
func (e *Engine) Thaw() error {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if e.closed {
		return fscache.ErrClosed
	}
	e.frozen = false
	return nil
}

// Abandon implements fscache.Successor.
func (e *Engine) Abandon(ctx context.Context, m fscache.Mount) error {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	return e.k.abandon(m.Dir)
}

// Close implements fscache.Engine: the process ends. What it has not answered stays in its inbox.
func (e *Engine) Close() error {
	e.Kill()
	return nil
}

// Kill is the process's death, at whatever instruction it is: its memory and its descriptors are gone. Idempotent.
func (e *Engine) Kill() {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if e.closed {
		return
	}
	e.frozen, e.closed = true, true
	e.k.processes = slices.DeleteFunc(e.k.processes, func(p *Engine) bool { return p == e })
	e.k.low.released(e)
	if len(e.k.processes) == 0 && !e.k.kept {
		e.k.low.last()
	}
	e.k.changed.Broadcast()
}
