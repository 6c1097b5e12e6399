package cachefiles

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/internal/erofs"
	"holdfast/state/crash"
)

const (
	diskBlock    = 512                  // unit of a file's st_blocks, in bytes (stat(2))
	cullInterval = 5 * time.Millisecond // between looks for a file that the kernel is about to name
)

// Cull implements fscache.Engine. The kernel deletes the file, unless it has it open: it looks under the file's lock, so
// that whoever opens it next finds all of it or none (namei.c, cachefiles_cull).
//
// The kernel sends CLOSE before it gives a new object's file its name (interface.c, cachefiles_withdraw_cookie), so an object that it
// had open may have data though no file is found: that is looked for again for closePatience.
func (e *Engine) Cull(ctx context.Context, k fscache.Key) error {
	if err := errors.Join(checkName("domain", k.Domain, maxDomain), checkName("object id", k.ID, maxID)); err != nil {
		return err
	}
	if err := e.naming.Lock(ctx, k); err != nil {
		return err
	}
	defer e.naming.Unlock(k)
	tick := time.NewTicker(cullInterval)
	defer tick.Stop()
	for deadline := time.Now().Add(closePatience); ; {
		used, err := e.cullable(k)
		if err != nil {
			return err
		}
		found, err := e.cull(k)
		if err != nil && !errors.Is(err, fscache.ErrBusy) {
			return fmt.Errorf("culling object %s: %w", k, err)
		}
		if err == nil && (found || !used) {
			return nil
		}
		if time.Now().After(deadline) {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// cullable says whether k may be culled, and whether the kernel may have had it open since the cache was bound. The caller holds naming,
// so nobody adds it meanwhile.
func (e *Engine) cullable(k fscache.Key) (used bool, err error) {
	var over *handle
	defer func() { e.drop(over) }()
	e.mu.Lock()
	defer e.mu.Unlock()
	o := e.objects[k]
	switch {
	case e.closed:
		return false, fscache.ErrClosed
	case o != nil && o.added:
		return false, fmt.Errorf("object %s is added: unmount and remove it first: %w", k, fscache.ErrBusy)
	case e.waiting:
		return false, fmt.Errorf("object %s may be in use by the process that is upgraded: %w", k, fscache.ErrBusy)
	}
	if lives, err := erofs.Lives(mountName(k)); err != nil || lives {
		return false, fmt.Errorf("object %s is mounted: %w", k, errors.Join(err, fscache.ErrBusy))
	}
	if o != nil {
		over = e.letGo(o)
		if o.handle != nil {
			return false, fmt.Errorf("object %s is open in the kernel: unmount what uses it first: %w", k, fscache.ErrBusy)
		}
		delete(e.objects, k)
	}
	return !e.fresh || e.used[k], nil
}

// cull has the kernel delete the object's file, and says whether there was one.
func (e *Engine) cull(k fscache.Key) (found bool, err error) {
	path, err := CacheFile(e.dir.Name(), k)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	dir, name := filepath.Split(path)
	crash.Point("cachefiles.cull.before-cull")
	err = e.dev.cull(dir, name)
	crash.Point("cachefiles.cull.after-cull")
	switch {
	case errors.Is(err, unix.EBUSY):
		return true, fmt.Errorf("%w: %w", fscache.ErrBusy, err)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESTALE): // it went between the looking and the culling
		return false, nil
	case err != nil:
		return true, err
	}
	e.mu.Lock()
	delete(e.used, k) // a file that is made from here on is a new one
	e.mu.Unlock()
	d, err := os.Open(dir)
	if err != nil {
		return true, err
	}
	return true, errors.Join(d.Sync(), d.Close())
}

// cull writes the command that deletes a file of the caller's working directory (daemon.c, cachefiles_daemon_cull).
func (d *device) cull(dir, name string) error {
	done := make(chan error, 1)
	// A thread of its own, with a working directory of its own: it ends with the goroutine, which never unlocks it.
	go func() {
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Chdir(dir)
		}
		if err == nil {
			err = command(d.f, "cull "+name)
		}
		done <- err
	}()
	return <-done
}

// Usage implements fscache.Engine. A file that has no name yet is measured by what it holds.
func (e *Engine) Usage(k fscache.Key) (int64, error) {
	if err := errors.Join(checkName("domain", k.Domain, maxDomain), checkName("object id", k.ID, maxID)); err != nil {
		return 0, err
	}
	e.mu.Lock()
	closed, o := e.closed, e.objects[k]
	var h *handle
	if o != nil {
		h = o.handle
	}
	e.mu.Unlock()
	if closed {
		return 0, fscache.ErrClosed
	}
	if h != nil {
		if extents, err := h.present(o.size); err == nil {
			var n int64
			for _, x := range extents {
				n += x.Len
			}
			return n, nil
		}
	}
	path, err := CacheFile(e.dir.Name(), k)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	var st unix.Stat_t
	if err == nil {
		err = unix.Lstat(path, &st)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return 0, fmt.Errorf("asking for the size of object %s: %w", k, err)
	}
	return st.Blocks * diskBlock, nil
}

// Space implements fscache.Engine.
func (e *Engine) Space() (fscache.Space, error) {
	s, err := fscache.SpaceOf(e.dir.Name())
	if err == nil {
		s.Wanted, err = e.dev.wantsCulling()
	}
	return s, err
}

// wantsCulling says whether the kernel asks for culling (daemon.c, cachefiles_daemon_poll).
func (d *device) wantsCulling() (wants bool, err error) {
	err = control(d.f, func(fd int) error {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		_, err := unix.Poll(p, 0)
		wants = p[0].Revents&unix.POLLOUT != 0
		if errors.Is(err, unix.EINTR) {
			return nil // it is asked again
		}
		return err
	})
	return wants, err
}
