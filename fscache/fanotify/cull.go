package fanotify

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/state/crash"
)

// diskBlock is the unit of a file's st_blocks, in bytes (stat(2)).
const diskBlock = 512

// Cull implements fscache.Engine: it unlinks the cache file. Whoever opens it between the question and the unlinking keeps all of its
// bytes until it is closed, so no reader loses anything (I1).
func (e *Engine) Cull(ctx context.Context, k fscache.Key) error {
	if err := errors.Join(checkName("domain", k.Domain), checkName("object id", k.ID)); err != nil {
		return err
	}
	if err := e.naming.Lock(ctx, k); err != nil {
		return err
	}
	defer e.naming.Unlock(k)
	inherited, err := e.cullable(k)
	if err != nil {
		return err
	}
	err = e.cull(k, inherited)
	if err != nil {
		err = fmt.Errorf("culling object %s: %w", k, err)
	}
	return err
}

// cullable says whether k may be culled, and returns the descriptor that a predecessor left of it, if there is one. The caller holds
// naming, so nobody adds it meanwhile.
func (e *Engine) cullable(k fscache.Key) (*os.File, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.closed:
		return nil, fscache.ErrClosed
	case e.objects[k] != nil:
		return nil, fmt.Errorf("object %s is added: unmount and remove it first: %w", k, fscache.ErrBusy)
	case e.alive:
		return nil, fmt.Errorf("object %s may be in use by the process that is upgraded: %w", k, fscache.ErrBusy)
	}
	return e.adoptable[k], nil
}

// cull deletes the file, then the mark and the held descriptor that a predecessor left of it.
//
// ORDER: name, mark, descriptor. What is still marked has no name by then, and what is found held has neither.
func (e *Engine) cull(k fscache.Key, inherited *os.File) error {
	f := inherited
	if f == nil {
		var err error
		f, err = e.openCached(k)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		defer f.Close() // which frees the space: as long as it takes, nobody else waits for it
	}
	switch used, err := openElsewhere(f); {
	case err != nil:
		return err
	case used:
		return fmt.Errorf("it is in use by a mount: unmount it first: %w", fscache.ErrBusy)
	}
	crash.Point("fanotify.cull.before-unlink")
	if err := e.unlink(k); err != nil {
		return err
	}
	crash.Point("fanotify.cull.after-unlink")
	if err := e.unwatch(f); err != nil {
		return err
	}
	if inherited == nil {
		return nil
	}
	e.mu.Lock()
	delete(e.adoptable, k)
	e.mu.Unlock()
	_ = inherited.Close()
	if e.holder != nil {
		e.holder.Drop(fscache.Held{Object: fscache.Object{Key: k}})
	}
	return nil
}

// openCached opens the cache file of an object that is not added, without waiting for anybody's lease.
func (e *Engine) openCached(k fscache.Key) (*os.File, error) {
	f, err := e.root.OpenFile(filepath.Join(k.Domain, k.ID), os.O_RDWR|unix.O_NOFOLLOW|unix.O_NOATIME|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("somebody has a lease of it: %w", fscache.ErrBusy)
	}
	if err != nil {
		return nil, err
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("%s is not a regular file: move it away", f.Name()), err, f.Close())
	}
	return f, nil
}

// unlink removes an object's name, and its domain's directory if that is empty then, durably.
func (e *Engine) unlink(k fscache.Key) error {
	err := e.root.Remove(filepath.Join(k.Domain, k.ID))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	switch err := e.root.Remove(k.Domain); {
	case err == nil, errors.Is(err, fs.ErrNotExist):
		return syncDir(e.dir)
	case errors.Is(err, unix.ENOTEMPTY), errors.Is(err, unix.EEXIST):
	default:
		return err
	}
	err = syncDir(filepath.Join(e.dir, k.Domain))
	if errors.Is(err, fs.ErrNotExist) { // another object's culling took the directory
		return syncDir(e.dir)
	}
	return err
}

// unwatch takes a predecessor's mark off a file that has no name any more: its inode number will be another's.
func (e *Engine) unwatch(f *os.File) error {
	id, err := inodeOf(f)
	if err != nil {
		return err
	}
	e.mu.Lock()
	watched := e.watched[id.ino]
	e.mu.Unlock()
	if !watched {
		return nil
	}
	err = control(e.group, func(group int) error {
		return control(f, func(fd int) error {
			return unix.FanotifyMark(group, unix.FAN_MARK_REMOVE, unix.FAN_PRE_ACCESS, fd, "")
		})
	})
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("removing the mark of a deleted file: %w", err)
	}
	e.mu.Lock()
	delete(e.watched, id.ino)
	e.mu.Unlock()
	return nil
}

// Usage implements fscache.Engine.
func (e *Engine) Usage(k fscache.Key) (int64, error) {
	if err := errors.Join(checkName("domain", k.Domain), checkName("object id", k.ID)); err != nil {
		return 0, err
	}
	st, err := e.root.Lstat(filepath.Join(k.Domain, k.ID))
	switch {
	case errors.Is(err, os.ErrClosed):
		return 0, fscache.ErrClosed
	case errors.Is(err, fs.ErrNotExist):
		return 0, nil
	case err != nil:
		return 0, fmt.Errorf("asking for the size of object %s: %w", k, err)
	}
	if s, ok := st.Sys().(*syscall.Stat_t); ok && st.Mode().IsRegular() {
		return s.Blocks * diskBlock, nil
	}
	return 0, nil
}

// Space implements fscache.Engine.
func (e *Engine) Space() (fscache.Space, error) { return fscache.SpaceOf(e.dir) }
