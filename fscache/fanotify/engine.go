package fanotify

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// Name is the engine's name.
const Name = "fanotify"

// A Config says where the cache is and what the process inherited.
type Config struct {
	Dir string // cache directory, absolute; made where absent

	// Group is the group of a process that is gone, or nil. Open takes it over whatever it returns. Events that
	// process read and did not answer are denied with EIO, and their readers ask again. Objects under its marks must
	// all be added before the first Next: an event of a file not known is denied.
	Group *os.File

	// AllowUnsafeKernel lets Open run on kernels whose file-backed EROFS is known to hand out wrong bytes.
	AllowUnsafeKernel bool

	Log *zap.Logger // nil: silent
}

// An Engine is the fanotify engine. Make one with Open.
type Engine struct {
	log     *zap.Logger
	dir     string
	root    *os.Root
	group   *os.File // in Go's poller; its read lock lets one Next at a time read
	watched map[uint64]bool

	adding sync.Mutex // one Add or Remove at a time; taken before mu

	mu      sync.Mutex // guards what follows; never held over a system call that can wait
	objects map[fscache.Key]*object
	byInode map[inode]*object
	pending map[int32]pendingEvent // by event descriptor
	limit   int                    // how many pending events are let in
	room    sync.Cond              // pending shrank, or frozen
	token   uint64
	frozen  bool // Next is over
	closed  bool // everything is; implies frozen
}

// A pendingEvent is one we own the descriptor of and have not answered.
type pendingEvent struct{ token uint64 }

var _ fscache.Engine = (*Engine)(nil)

// Open makes an engine. Errors say what the kernel or the directory lacks; use Available to ask without side effects.
func Open(c Config) (*Engine, error) {
	e := &Engine{
		log: c.Log, dir: c.Dir,
		objects: make(map[fscache.Key]*object),
		byInode: make(map[inode]*object),
		pending: make(map[int32]pendingEvent),
	}
	e.room.L = &e.mu
	if e.log == nil {
		e.log = zap.NewNop()
	}
	if err := e.open(c); err != nil {
		return nil, fmt.Errorf("fanotify engine in %s: %w", c.Dir, err)
	}
	return e, nil
}

func (e *Engine) open(c Config) (err error) {
	if c.Group != nil {
		e.group, e.watched, err = adoptGroup(c.Group)
		if err != nil {
			return err
		}
	}
	defer func() {
		if err != nil {
			e.closeFiles()
		}
	}()
	if !c.AllowUnsafeKernel {
		if err := CheckKernel(); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return err
	}
	if err := checkHoles(c.Dir); err != nil {
		return err
	}
	if e.root, err = os.OpenRoot(c.Dir); err != nil {
		return err
	}
	numbers, err := descriptorLimit()
	if err != nil {
		return err
	}
	e.limit = max(numbers/2, 1)
	if e.group == nil {
		e.group, err = newGroup()
		return err
	}
	start := time.Now()
	denied, err := sweep(e.group, numbers)
	if err != nil {
		return err
	}
	e.log.Info("took a group over", zap.Int("marks", len(e.watched)), zap.Int("denied", denied), zap.Duration("took", time.Since(start)))
	return nil
}

// Name implements fscache.Engine.
func (e *Engine) Name() string { return Name }

// Lifeline implements fscache.Engine: the group's descriptor.
func (e *Engine) Lifeline() (string, *os.File) { return Name, e.group }

// Add implements fscache.Engine. The file gets its mark in any case; call Complete where it holds everything.
func (e *Engine) Add(ctx context.Context, o fscache.Object) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := checkObject(o); err != nil {
		return err
	}
	e.adding.Lock()
	defer e.adding.Unlock()
	if known, err := e.object(o.Key); err == nil {
		if known.size != o.Size {
			return fmt.Errorf("object %s was added with %d bytes, now with %d: the same blob cannot have two sizes", o.Key, known.size, o.Size)
		}
		return nil
	} else if !errors.Is(err, fscache.ErrUnknown) {
		return err
	}
	obj, err := openObject(e.root, e.dir, o, e.watched)
	if err != nil {
		return err
	}
	// Known before marked: an event cannot come for a file we do not know.
	if err := e.insert(obj); err != nil {
		return errors.Join(err, obj.close())
	}
	if err := obj.mark(e.group); err != nil {
		e.forget(obj)
		return errors.Join(err, obj.close())
	}
	return nil
}

func (e *Engine) insert(obj *object) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return fscache.ErrClosed
	}
	if other := e.byInode[obj.inode]; other != nil {
		return fmt.Errorf("cache file %s is the same file as %s: remove one of them", obj.path, other.path)
	}
	e.objects[obj.key] = obj
	e.byInode[obj.inode] = obj
	return nil
}

func (e *Engine) forget(obj *object) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.objects, obj.key)
	delete(e.byInode, obj.inode)
}

// object finds what was added, or says ErrUnknown or ErrClosed.
func (e *Engine) object(k fscache.Key) (*object, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, fscache.ErrClosed
	}
	if o := e.objects[k]; o != nil {
		return o, nil
	}
	return nil, fmt.Errorf("object %s: %w", k, fscache.ErrUnknown)
}

// Remove implements fscache.Engine.
func (e *Engine) Remove(k fscache.Key) error {
	e.adding.Lock()
	defer e.adding.Unlock()
	o, err := e.object(k)
	if err != nil {
		return err
	}
	used, err := o.inUse()
	if err != nil {
		return err
	}
	if used {
		return fmt.Errorf("object %s is in use by a mount: unmount it first: %w", k, fscache.ErrBusy)
	}
	if err := o.unmark(e.group); err != nil {
		return err
	}
	e.forget(o)
	delete(e.watched, o.inode.ino)
	return o.close()
}

// Complete implements fscache.Engine: it removes the mark.
func (e *Engine) Complete(k fscache.Key) error {
	o, err := e.object(k)
	if err != nil {
		return err
	}
	return o.unmark(e.group)
}

// WriteAt implements fscache.Engine. ErrNotOpen: the object was taken over and nothing has read it since.
func (e *Engine) WriteAt(k fscache.Key, p []byte, off int64) error {
	o, err := e.object(k)
	if err != nil {
		return err
	}
	return o.writeAt(p, off)
}

// ReadAt implements fscache.Engine.
func (e *Engine) ReadAt(k fscache.Key, p []byte, off int64) error {
	o, err := e.object(k)
	if err != nil {
		return err
	}
	return o.readAt(p, off)
}

// Present implements fscache.Engine.
func (e *Engine) Present(k fscache.Key) ([]fscache.Extent, error) {
	o, err := e.object(k)
	if err != nil {
		return nil, err
	}
	return o.present()
}

// Drop implements fscache.Engine.
func (e *Engine) Drop(k fscache.Key, x fscache.Extent) error {
	o, err := e.object(k)
	if err != nil {
		return err
	}
	return o.drop(x)
}

// Sync implements fscache.Engine.
func (e *Engine) Sync(k fscache.Key) error {
	o, err := e.object(k)
	if err != nil {
		return err
	}
	return o.sync()
}

// Freeze implements fscache.Engine. An event that a Next has read when Freeze comes is still returned by it.
func (e *Engine) Freeze() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.frozen {
		return nil
	}
	e.frozen = true
	e.room.Broadcast()
	if err := e.group.SetReadDeadline(time.Unix(1, 0)); err != nil {
		return fmt.Errorf("waking readers of the fanotify group: %w", err)
	}
	return nil
}

// Close implements fscache.Engine. If nobody else holds the group, the kernel now lets every waiting reader on, and
// all that follow, onto whatever is in the files: see I4.
func (e *Engine) Close() error {
	e.adding.Lock()
	defer e.adding.Unlock()
	err := e.Freeze()
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	events := e.pending
	e.pending = nil
	e.mu.Unlock()
	for fd := range events {
		_ = unix.Close(int(fd))
	}
	return errors.Join(err, e.closeFiles())
}

// closeFiles closes the objects and then the group.
func (e *Engine) closeFiles() error {
	var err error
	for _, o := range e.objects {
		err = errors.Join(err, o.close())
	}
	if e.root != nil {
		err = errors.Join(err, e.root.Close())
	}
	if e.group != nil {
		err = errors.Join(err, e.group.Close())
	}
	return err
}
