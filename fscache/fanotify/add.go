package fanotify

import (
	"context"
	"errors"
	"fmt"
	"os"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/state/crash"
)

// errAgain: somebody else added the object at the same time.
var errAgain = errors.New("added meanwhile")

// Add implements fscache.Engine. A file with holes gets its mark here, and its quiet descriptor is held before; one without gets both
// from Mount, unless Complete comes first: after a takeover most objects are complete, and holding each for nothing takes too long.
// While a predecessor reads no marks are made: whatever needs one has it from there.
func (e *Engine) Add(ctx context.Context, o fscache.Object) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := checkObject(o); err != nil {
		return err
	}
	for {
		err := e.add(ctx, o)
		if !errors.Is(err, errAgain) {
			return err
		}
	}
}

func (e *Engine) add(ctx context.Context, o fscache.Object) error {
	if known, err := e.object(o.Key); err == nil {
		known.changing.Lock()
		gone := known.gone.Load()
		known.changing.Unlock()
		switch {
		case gone:
			return errAgain
		case known.size != o.Size:
			return fmt.Errorf("object %s was added with %d bytes, now with %d: the same blob cannot have two sizes", o.Key, known.size, o.Size)
		}
		return nil
	} else if !errors.Is(err, fscache.ErrUnknown) {
		return err
	}
	obj, alive, err := e.make(ctx, o)
	if err != nil {
		return err
	}
	defer obj.changing.Unlock()
	holes, err := obj.hasHoles()
	if err == nil && holes && !alive {
		err = e.watch(obj)
	}
	if err != nil {
		e.forget(obj)
		return errors.Join(err, obj.close())
	}
	return nil
}

// make opens an object's file, or makes it, and makes the object known before it is marked: an event cannot come for a file we do not
// know. It returns the object with changing held, and whether a predecessor reads.
func (e *Engine) make(ctx context.Context, o fscache.Object) (obj *object, alive bool, err error) {
	if err := e.naming.Lock(ctx, o.Key); err != nil {
		return nil, false, err
	}
	defer e.naming.Unlock(o.Key)
	if obj, err = openObject(e.root, e.dir, o); err != nil {
		return nil, false, err
	}
	obj.changing.Lock()
	if alive, err = e.insert(obj); err != nil {
		obj.changing.Unlock()
		return nil, false, errors.Join(err, obj.close())
	}
	return obj, alive, nil
}

// insert makes an object known, with its quiet descriptor. It says whether a predecessor reads.
func (e *Engine) insert(obj *object) (alive bool, err error) {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return false, fscache.ErrClosed
	}
	if e.objects[obj.key] != nil {
		e.mu.Unlock()
		return false, errAgain
	}
	if other := e.byInode[obj.inode]; other != nil {
		e.mu.Unlock()
		return false, fmt.Errorf("cache file %s is the same file as %s: remove one of them", obj.path, other.path)
	}
	inherited := e.adoptable[obj.key]
	delete(e.adoptable, obj.key)
	marked := e.watched[obj.inode.ino]
	alive = e.alive
	same := false
	if inherited != nil {
		id, err := inodeOf(inherited)
		same = err == nil && id == obj.inode
	}
	if same {
		obj.take(inherited)
	} else if !marked {
		obj.quiet.Store(obj.seek)
	}
	obj.marked.Store(marked)
	e.objects[obj.key] = obj
	e.byInode[obj.inode] = obj
	e.mu.Unlock()
	if inherited != nil && !same {
		e.log.Error("a descriptor that was held for a cache file is of another file", zap.String("path", obj.path))
		e.holderDrop(obj, inherited)
	}
	return alive, nil
}

// forget makes an object unknown; its changing is held.
func (e *Engine) forget(obj *object) {
	obj.gone.Store(true)
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.objects, obj.key)
	delete(e.byInode, obj.inode)
	delete(e.watched, obj.inode.ino)
}

// watch has an object's quiet descriptor held, and marks it; its changing is held.
//
// ORDER: held, then marked. A file under a mark cannot be written by a process that finds no quiet descriptor of it.
func (e *Engine) watch(obj *object) error {
	if obj.marked.Load() || obj.complete {
		return nil
	}
	if err := e.hold(obj); err != nil {
		return err
	}
	crash.Point("fanotify.add.before-mark")
	if err := obj.mark(e.group); err != nil {
		e.drop(obj)
		return err
	}
	crash.Point("fanotify.add.after-mark")
	return nil
}

// hold gives an object's quiet descriptor to the holder, if it has it not already; its changing is held.
func (e *Engine) hold(obj *object) error {
	if obj.held.Load() {
		return nil
	}
	f, err := obj.open()
	if err != nil {
		return err
	}
	if e.holder != nil {
		crash.Point("fanotify.add.before-hold")
		if err := e.holder.Hold(fscache.Held{Object: obj.object(), File: f}); err != nil {
			return fmt.Errorf("cache file %s: having its descriptor held: %w", obj.path, err)
		}
	}
	obj.held.Store(true)
	return nil
}

// drop is the end of hold.
func (e *Engine) drop(obj *object) {
	if !obj.held.Load() {
		return
	}
	obj.held.Store(false)
	e.holderDrop(obj, nil)
}

// holderDrop has the holder let go of what it has for the object, after f was closed.
func (e *Engine) holderDrop(obj *object, f *os.File) {
	if f != nil {
		_ = f.Close()
	}
	if e.holder != nil {
		crash.Point("fanotify.drop.before-drop")
		e.holder.Drop(fscache.Held{Object: obj.object()})
	}
}

// adopt keeps a copy of an event's descriptor as the quiet one of an object that was taken over without.
func (e *Engine) adopt(obj *object, eventFD int) {
	obj.changing.Lock()
	defer obj.changing.Unlock()
	if obj.gone.Load() || obj.quiet.Load() != nil {
		return
	}
	err := obj.adopt(eventFD)
	if err == nil && obj.marked.Load() {
		err = e.hold(obj)
	}
	if err != nil {
		e.log.Error("an object cannot be written to, or not after a crash", zap.Error(err))
	}
}

// adoptAgain does what adopt could not when the object's event came, for want of a descriptor: whoever serves the event tries again to
// write.
func (e *Engine) adoptAgain(obj *object) {
	if !obj.changing.TryLock() {
		return // the next try comes when it is free
	}
	defer obj.changing.Unlock()
	if obj.gone.Load() || obj.quiet.Load() != nil {
		return
	}
	e.mu.Lock()
	for fd, p := range e.pending { // what is in there is not closed before it is out
		if p.object == obj && obj.adopt(int(fd)) == nil {
			break
		}
	}
	e.mu.Unlock()
	if obj.quiet.Load() == nil || !obj.marked.Load() {
		return
	}
	if err := e.hold(obj); err != nil {
		e.log.Error("an object cannot be written to after a crash", zap.Error(err))
	}
}

// Remove implements fscache.Engine.
func (e *Engine) Remove(k fscache.Key) error {
	o, err := e.object(k)
	if err != nil {
		return err
	}
	o.changing.Lock()
	defer o.changing.Unlock()
	if o.gone.Load() {
		return fmt.Errorf("object %s: %w", k, fscache.ErrUnknown)
	}
	used, err := o.inUse()
	if err != nil {
		return err
	}
	if used {
		return fmt.Errorf("object %s is in use by a mount: unmount it first: %w", k, fscache.ErrBusy)
	}
	crash.Point("fanotify.remove.before-unmark")
	if err := o.unmark(e.group); err != nil {
		return err
	}
	crash.Point("fanotify.remove.after-unmark")
	err = o.close()
	e.drop(o)
	e.forget(o)
	return err
}

// Complete implements fscache.Engine: it removes the mark. The process keeps its quiet descriptor as long as the object is added; a successor opens
// one of its own, so nobody else need hold it.
func (e *Engine) Complete(k fscache.Key) error {
	o, err := e.object(k)
	if err != nil {
		return err
	}
	o.changing.Lock()
	defer o.changing.Unlock()
	if o.gone.Load() {
		return fmt.Errorf("object %s: %w", k, fscache.ErrUnknown)
	}
	crash.Point("fanotify.complete.before-unmark")
	if err := o.unmark(e.group); err != nil {
		return err
	}
	o.complete = true
	if o.quiet.Load() == nil {
		o.quiet.Store(o.seek) // which raises no event any more
	}
	crash.Point("fanotify.complete.after-unmark")
	e.drop(o)
	return nil
}

// endLeases ends the leases of a process that died while it asked whether a file is in use: they stay with a descriptor that is held, and
// make everybody who opens the file wait for /proc/sys/fs/lease-break-time (fs/locks.c, __break_lease).
func (e *Engine) endLeases(held []fscache.Held) {
	for _, h := range held {
		err := control(h.File, func(fd int) error {
			_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK)
			return err
		})
		if err != nil && !errors.Is(err, unix.EAGAIN) { // EAGAIN: there is none
			e.log.Error("ending a lease of another process", zap.Stringer("object", h.Object.Key), zap.Error(err))
		}
	}
}
