package cachefiles

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/internal/erofs"
	"holdfast/fscache/internal/keyed"
)

// Name is the engine's name.
const Name = "cachefiles"

// defaultTag is the cache's name in the kernel if the Config has none.
const defaultTag = "holdfast"

// A Config says where the cache is and what the process inherited.
type Config struct {
	Dir string // cache directory, absolute; made where absent

	// Tag is the cache's name in the kernel (`tag`); "holdfast" if empty. Two caches of one kernel need two tags.
	Tag string

	// Limits are what the kernel is told at bind; none if zero, and it keeps its own, fscache.DefaultLimits. A cache that was bound by
	// another process has the limits that it was bound with.
	Limits fscache.Limits

	// Inherited is what a process that is gone left, or, in a hot upgrade, one that lives lends; or a device that PID 1 opened and
	// nobody used. Objects that mounts use must all be added before the first Next: an open of an object not known is refused.
	Inherited fscache.Inherited

	// Inbox is where the kernel writes requests, so that they outlive the process. Nil: private memory.
	Inbox fscache.Inbox

	// Holder keeps the descriptors of open objects beyond the process. Nil: they go with it, and the kernel opens the objects
	// again (Linux 6.8 on) or never (before).
	Holder fscache.Holder

	Log *zap.Logger // nil: silent
}

// An Engine is the cachefiles engine. Make one with Open.
type Engine struct {
	log     *zap.Logger
	dir     *os.File // the cache directory
	dev     *device
	holder  fscache.Holder
	adopted bool // the kernel may have objects open that this process knows nothing of
	fresh   bool // this engine bound the cache: what it did not see opened is not open

	reading sync.RWMutex  // read-held by Next; held by Close to wait for it. Taken before turn and mu.
	turn    sync.Mutex    // held by the Next that reads. Taken before mu.
	nudge   chan struct{} // room for one: a slot is free, or there is something in queue
	heard   atomic.Bool   // somebody was in Next: what the kernel closes is heard of
	making  sync.Mutex    // held while files are made for the kernel to find. Taken before mu.

	naming keyed.Mutex // by who adds an object, and who deletes its file. Taken before all others

	mu       sync.Mutex // guards what follows; never held over a system call that can wait
	objects  map[fscache.Key]*object
	used     map[fscache.Key]bool // the kernel has had it open since the cache was bound
	domains  map[string]string    // of the objects added so far, by the name the kernel has for them
	handles  map[uint32]*handle   // by the kernel's object id
	pending  map[uint64]*request
	byMsg    map[uint32]*request // the newest of each message id, while it is pending
	queue    []queued            // what a predecessor read, for Next
	expected map[uint32]fscache.Pending
	token    uint64
	changed  chan struct{} // closed and replaced when an object is opened, refused or closed
	waiting  bool          // for Expect: the predecessor reads
	frozen   bool
	stopped  chan struct{} // closed while frozen
	closed   bool
}

// An object is what was added, or what a predecessor had open.
type object struct {
	key     fscache.Key
	size    int64
	added   bool    // the caller knows of it. Guarded by Engine.mu.
	handle  *handle // nil: not open in the kernel, as far as known. Guarded by Engine.mu.
	refused error   // why the last open was refused. Guarded by Engine.mu.
	file    file    // while the kernel has not had it open
}

// A request is one that the kernel waits for and we have not answered.
type request struct {
	op       fscache.Op
	msg      uint32
	handle   *handle
	off, len int64   // OpRead
	slot     int     // in the inbox, or noSlot
	stale    *handle // OpOpen: an earlier opening, which is over; may be nil
	gone     bool    // the kernel gave its message id to a newer one
	taken    bool    // it is being answered
}

var (
	_ fscache.Engine    = (*Engine)(nil)
	_ fscache.Successor = (*Engine)(nil)
)

// Open makes an engine. Errors say what the kernel or the directory lacks.
func Open(c Config) (*Engine, error) {
	e := &Engine{
		log:      c.Log,
		holder:   c.Holder,
		nudge:    make(chan struct{}, 1),
		stopped:  make(chan struct{}),
		objects:  make(map[fscache.Key]*object),
		used:     make(map[fscache.Key]bool),
		domains:  make(map[string]string),
		handles:  make(map[uint32]*handle),
		pending:  make(map[uint64]*request),
		byMsg:    make(map[uint32]*request),
		expected: make(map[uint32]fscache.Pending),
		changed:  make(chan struct{}),
	}
	if e.log == nil {
		e.log = zap.NewNop()
	}
	if c.Tag == "" {
		c.Tag = defaultTag
	}
	if err := e.open(c); err != nil {
		return nil, fmt.Errorf("cachefiles engine in %s: %w", c.Dir, err)
	}
	return e, nil
}

func (e *Engine) open(c Config) (err error) {
	f := c.Inherited.Lifeline
	defer func() {
		if err == nil {
			return
		}
		// ORDER: objects before the device, as in Close.
		for _, h := range c.Inherited.Objects {
			_ = h.File.Close() // a second time for some, which is nothing
		}
		if e.dir != nil {
			_ = e.dir.Close()
		}
		if f != nil {
			_ = f.Close()
		}
	}()
	if err := checkConfig(c); err != nil {
		return err
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return err
	}
	if e.dir, err = os.Open(c.Dir); err != nil {
		return err
	}
	if f == nil {
		if f, err = openDevice(); err != nil {
			return err
		}
		e.dev, e.fresh = &device{f: f, inbox: c.Inbox}, true
		err = bind(f, c)
	} else {
		e.dev = &device{f: f, inbox: c.Inbox}
		err = e.takeOver(c)
	}
	if err != nil || e.waiting {
		return err
	}
	return e.dev.start(e.log)
}

// Name implements fscache.Engine.
func (e *Engine) Name() string { return Name }

// Lifeline implements fscache.Engine: the device.
func (e *Engine) Lifeline() (string, *os.File) { return Name, e.dev.f }

// Add implements fscache.Engine.
func (e *Engine) Add(ctx context.Context, o fscache.Object) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := checkObject(o); err != nil {
		return err
	}
	// What is being culled is not added before that is over: its presence would be asked for in between.
	if err := e.naming.Lock(ctx, o.Key); err != nil {
		return err
	}
	defer e.naming.Unlock(o.Key)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return fscache.ErrClosed
	}
	known := e.objects[o.Key]
	if known != nil && known.size != o.Size {
		return fmt.Errorf("object %s was added with %d bytes, now with %d: the same blob cannot have two sizes", o.Key, known.size, o.Size)
	}
	if known != nil && known.added {
		return nil
	}
	volume := volumeOf(o.Key.Domain)
	if other, ok := e.domains[volume]; ok && other != o.Key.Domain {
		return fmt.Errorf("object %s: its domain and %s have one name in the kernel, %s: use another domain", o.Key, other, volume)
	}
	e.domains[volume] = o.Key.Domain
	if known == nil {
		known = &object{key: o.Key, size: o.Size}
		known.file.used = !e.fresh || e.used[o.Key]
		e.objects[o.Key] = known
	}
	known.added = true
	return nil
}

// object finds what was added, or says ErrUnknown or ErrClosed. e.mu is held.
func (e *Engine) object(k fscache.Key) (*object, error) {
	if e.closed {
		return nil, fscache.ErrClosed
	}
	if o := e.objects[k]; o != nil && o.added {
		return o, nil
	}
	return nil, fmt.Errorf("object %s: %w", k, fscache.ErrUnknown)
}

// openObject finds an object and its descriptor, or says ErrNotOpen too.
func (e *Engine) openObject(k fscache.Key) (*object, *handle, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	o, err := e.object(k)
	if err != nil {
		return nil, nil, err
	}
	if o.handle == nil {
		return o, nil, fmt.Errorf("object %s: %w", k, fscache.ErrNotOpen)
	}
	return o, o.handle, nil
}

// closePatience is how long Remove waits for the kernel to close an object, which a worker of its does after an unmount. Before the first
// Next there is nothing to wait for, and readers who wait for that.
const closePatience = 2 * time.Second

// Remove implements fscache.Engine. After a takeover the kernel has objects open that it did not ask this process for; what
// it mounts by name, bootstraps, is known even then.
func (e *Engine) Remove(k fscache.Key) error {
	patience := time.Duration(0)
	if e.heard.Load() {
		patience = closePatience
	}
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	for {
		changed, err := e.remove(k)
		if err != nil || changed == nil {
			return err
		}
		select {
		case <-changed:
		case <-timeout.C:
			return fmt.Errorf("object %s is open in the kernel: unmount what uses it first: %w", k, fscache.ErrBusy)
		}
	}
}

// remove removes an object that is closed; of one that is open and may be about to be closed it returns what to wait for.
func (e *Engine) remove(k fscache.Key) (changed <-chan struct{}, err error) {
	var over *handle
	defer func() { e.drop(over) }()
	e.mu.Lock()
	defer e.mu.Unlock()
	o, err := e.object(k)
	if err != nil {
		return nil, err
	}
	if lives, err := erofs.Lives(mountName(k)); err != nil || lives {
		return nil, fmt.Errorf("object %s is mounted: %w", k, errors.Join(err, fscache.ErrBusy))
	}
	over = e.letGo(o)
	if o.handle != nil {
		return e.changed, nil
	}
	delete(e.objects, k)
	return nil, nil
}

// letGo releases an object's inherited handle if the kernel has it open no longer: the predecessor may have died with the kernel's
// CLOSE, or refused the open that it was inherited for. The caller drops what it returns, which may be nil. e.mu is held.
func (e *Engine) letGo(o *object) *handle {
	h := o.handle
	if h == nil || !h.inherited || h.attached() {
		return nil
	}
	e.release(h)
	return h
}

// WriteAt implements fscache.Engine.
func (e *Engine) WriteAt(k fscache.Key, p []byte, off int64) error {
	o, h, err := e.openObject(k)
	if o == nil {
		return err
	}
	if err := o.check(off, int64(len(p))); err != nil {
		return err
	}
	if h == nil {
		return err
	}
	return h.writeAt(p, off)
}

// ReadAt implements fscache.Engine, for objects that the kernel has not opened since this engine bound the cache. Of the others
// it cannot: the object's descriptor is write-only, and the file is the kernel's.
func (e *Engine) ReadAt(k fscache.Key, p []byte, off int64) error {
	o, err := e.known(k)
	if err != nil {
		return err
	}
	if err := o.check(off, int64(len(p))); err != nil {
		return err
	}
	if err := e.readFile(o, p, off); err != nil {
		return fmt.Errorf("reading object %s back: %w", k, err)
	}
	return nil
}

// Drop implements fscache.Engine, for the objects that ReadAt can read.
func (e *Engine) Drop(k fscache.Key, x fscache.Extent) error {
	o, err := e.known(k)
	if err != nil {
		return err
	}
	if err := o.check(x.Off, x.Len); err != nil {
		return err
	}
	if err := e.punchFile(o, x); err != nil {
		return fmt.Errorf("dropping data of object %s: %w", k, err)
	}
	return nil
}

// Present implements fscache.Engine. ErrNotOpen: nothing has the object open, and its cache file, if it has one, is the kernel's.
func (e *Engine) Present(k fscache.Key) ([]fscache.Extent, error) {
	o, err := e.known(k)
	if err != nil {
		return nil, err
	}
	extents, err := e.fileExtents(o)
	if !errors.Is(err, errors.ErrUnsupported) {
		if err != nil {
			err = fmt.Errorf("finding the data of object %s: %w", k, err)
		}
		return extents, err
	}
	o, h, err := e.openObject(k)
	if err != nil {
		return nil, err
	}
	// After the answer to an open the kernel takes a moment to attach the file. Of what was inherited nothing tells whether it will.
	if !h.inherited && h.opened.Load() {
		ctx, cancel := context.WithTimeout(context.Background(), attachPatience)
		defer cancel()
		_ = waitAttached(ctx, h) // what comes of it is told below
	}
	return h.present(o.size)
}

// known finds what was added.
func (e *Engine) known(k fscache.Key) (*object, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.object(k)
}

// Complete implements fscache.Engine. The kernel finds out by itself: it asks for holes only.
func (e *Engine) Complete(k fscache.Key) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, err := e.object(k)
	return err
}

// Sync implements fscache.Engine. The object's descriptor has no fsync, so it syncs the file system. That is enough for an object whose
// file has a name, as nameFiles sees to.
func (e *Engine) Sync(k fscache.Key) error {
	if err := e.Complete(k); err != nil {
		return err
	}
	if err := control(e.dir, unix.Syncfs); err != nil {
		return fmt.Errorf("syncing the cache of object %s: %w", k, err)
	}
	return nil
}

// Flush implements fscache.Engine. There is nothing to begin with: the kernel writes directly to the disk (fs/cachefiles/io.c).
func (e *Engine) Flush(k fscache.Key, _ fscache.Extent) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, err := e.object(k)
	return err
}

// Freeze implements fscache.Engine. When it returns nothing more is read (I6), and what was read is in Pending.
func (e *Engine) Freeze() error {
	e.mu.Lock()
	if !e.frozen {
		e.frozen = true
		close(e.stopped)
	}
	err := e.dev.interrupt()
	e.mu.Unlock()
	if err != nil {
		return err
	}
	// A Next that was about to read when it was interrupted may still get a request.
	e.turn.Lock()
	defer e.turn.Unlock()
	return nil
}

// Close implements fscache.Engine. If nobody else holds the device, the cache dies: what waits gets EIO, and so does
// every later read of every mount (I4). It does not wait for answers that others are giving: until they have returned the device is
// in use.
//
// ORDER: objects before the device: the other way round, old kernels wait for us for ever.
func (e *Engine) Close() error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	e.announce()
	e.mu.Unlock()

	err := e.Freeze()
	e.reading.Lock() // no Next is inside, none comes in
	defer e.reading.Unlock()
	for _, h := range e.handles {
		err = errors.Join(err, h.f.Close())
	}
	return errors.Join(err, e.dir.Close(), e.dev.close())
}

// announce wakes everybody who waits for an object to be opened. e.mu is held.
func (e *Engine) announce() {
	close(e.changed)
	e.changed = make(chan struct{})
}
