package cachefiles

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/internal/erofs"
	"holdfast/state/crash"
)

// How long Mount waits for the kernel's own work, which nothing announces: a worker that sends an open request, and the
// file that an object gets after its size was told. After a takeover the kernel may never send one: objects that another
// mount uses are open for it already.
const (
	kernelPatience = 20 * time.Second
	adoptPatience  = time.Second
	attachPatience = time.Second // of Present
	attachInterval = time.Millisecond
)

// AsksForBootstrap implements fscache.Engine: the superblock and all metadata are read through the cache.
func (e *Engine) AsksForBootstrap() bool { return true }

// Mount implements fscache.Engine. It returns when every blob is open and can be written to; one whose open is refused
// fails the mount. When ctx ends it returns at once; the kernel takes its part of the mount back when the bootstrap's open is answered.
func (e *Engine) Mount(ctx context.Context, m fscache.Mount) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := erofs.CheckMountPoint(m.Dir); err != nil {
		return err
	}
	if err := e.mount(ctx, m); err != nil {
		return fmt.Errorf("mounting %s on %s: %w", m.Bootstrap.Key, m.Dir, err)
	}
	return nil
}

func (e *Engine) mount(ctx context.Context, m fscache.Mount) error {
	if err := e.checkMount(m); err != nil {
		return err
	}
	options := []erofs.Option{
		{Name: "source", Value: "none"},
		{Name: "fsid", Value: m.Bootstrap.Key.ID},
		{Name: "domain_id", Value: volumeOf(m.Bootstrap.Key.Domain)},
	}
	for _, b := range m.Blobs {
		options = append(options, erofs.Option{Name: "device", Value: b.Key.ID})
	}
	e.nameFiles(m.Blobs)
	// Not in this process: it would sleep until the bootstrap's open is answered, and could not die. Its successor, which alone can answer
	// it then, waits for the locks it has.
	crash.Point("cachefiles.mount.before-new")
	fd, err := erofs.NewApart(ctx, options)
	if err != nil {
		return e.mountError(m, err)
	}
	defer unix.Close(fd)
	crash.Point("cachefiles.mount.after-new")
	if err := e.waitOpen(ctx, m.Blobs); err != nil {
		return err
	}
	crash.Point("cachefiles.mount.before-attach")
	err = erofs.Attach(fd, m.Dir)
	crash.Point("cachefiles.mount.after-attach")
	return err
}

// checkMount refuses what the kernel would take wrongly, and forgets what earlier mounts of these objects ended with.
func (e *Engine) checkMount(m fscache.Mount) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, o := range append([]fscache.Object{m.Bootstrap}, m.Blobs...) {
		known, err := e.object(o.Key)
		if err != nil {
			return err
		}
		if known.size != o.Size {
			return fmt.Errorf("object %s was added with %d bytes, the image says %d", o.Key, known.size, o.Size)
		}
		if o.Key.Domain != m.Bootstrap.Key.Domain {
			return fmt.Errorf("object %s is not in domain %s: a mount has one domain", o.Key, m.Bootstrap.Key.Domain)
		}
		known.refused = nil
	}
	return nil
}

// mountName is what EROFS calls a mount by its bootstrap (fs/erofs/super.c, erofs_set_sysfs_name).
func mountName(bootstrap fscache.Key) string { return volumeOf(bootstrap.Domain) + "," + bootstrap.ID }

// mountError says what can be done about an errno of mount(2) (fs/erofs/super.c, fs/erofs/fscache.c).
func (e *Engine) mountError(m fscache.Mount, err error) error {
	var left *erofs.LeftError
	if errors.As(err, &left) {
		e.log.Warn("gave a mount up while the kernel waits for its bootstrap's open: its process, which was killed, ends when that is answered",
			zap.Stringer("bootstrap", m.Bootstrap.Key), zap.Int("pid", left.PID))
	}
	var refused *erofs.RefusedError
	if !errors.As(err, &refused) {
		return err
	}
	e.mu.Lock()
	var cause error
	if o := e.objects[m.Bootstrap.Key]; o != nil {
		cause = o.refused
	}
	e.mu.Unlock()
	switch {
	case cause != nil:
		return fmt.Errorf("%w: the bootstrap's open was refused: %w", err, cause)
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%w: domain %s has this bootstrap mounted (unmount that), or another one whose name agrees with it "+
			"in the first %d bytes of %q", err, m.Bootstrap.Key.Domain, erofs.MaxName, mountName(m.Bootstrap.Key))
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: another cache has this domain", err)
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTBLK), errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w: EROFS over fscache needs CONFIG_EROFS_FS_ONDEMAND, and an image of features this kernel has", err)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: the image is damaged, has another number of blobs than the %d given, or a block size that is not a page; see the kernel's log", err, len(m.Blobs))
	case errors.Is(err, unix.EIO), errors.Is(err, unix.ENOBUFS):
		return fmt.Errorf("%w: the bootstrap could not be read from the cache", err)
	}
	return err
}

// waitOpen waits until the kernel has every blob open. mount(2) does not: EROFS has the blobs opened in the background.
func (e *Engine) waitOpen(ctx context.Context, blobs []fscache.Object) error {
	patience := kernelPatience
	if e.adopted {
		patience = adoptPatience
	}
	unseen := time.NewTimer(patience) // for opens that were not even asked for
	defer unseen.Stop()
	for _, b := range blobs {
		h, err := e.waitHandle(ctx, b.Key, unseen.C)
		for err == nil && h != nil {
			if err = waitAttached(ctx, h); err == nil {
				break
			}
			if errors.Is(err, fscache.ErrNotOpen) { // an inherited one, of an opening that was over: there is another, or will be
				h, err = e.waitHandle(ctx, b.Key, unseen.C)
			}
		}
		switch {
		case err != nil:
			return err
		case h != nil:
		case e.adopted:
			e.log.Info("the kernel has not opened a blob: it can be written when something reads it", zap.Stringer("object", b.Key))
			unseen.Reset(0)
		default:
			return fmt.Errorf("the kernel did not open blob %s within %v: see its log", b.Key, patience)
		}
	}
	return nil
}

// waitHandle waits for an open that was answered. It returns nil if none was asked for until unseen fires.
func (e *Engine) waitHandle(ctx context.Context, k fscache.Key, unseen <-chan time.Time) (*handle, error) {
	for {
		e.mu.Lock()
		o, err := e.object(k)
		if err != nil {
			e.mu.Unlock()
			return nil, err
		}
		h, refused, changed := o.handle, o.refused, e.changed
		e.mu.Unlock()
		timeout := unseen
		switch {
		case refused != nil:
			return nil, fmt.Errorf("the open of blob %s was refused: %w", k, refused)
		case h != nil && h.opened.Load():
			return h, nil
		case h != nil:
			timeout = nil // it is ours to answer
		}
		select {
		case <-changed:
		case <-timeout:
			return nil, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// waitAttached waits until the object has a file, which follows copen closely. ErrNotOpen: h was closed before.
func waitAttached(ctx context.Context, h *handle) error {
	tick := time.NewTicker(attachInterval)
	defer tick.Stop()
	for deadline := time.Now().Add(kernelPatience); ; {
		err := h.file()
		switch {
		case err == nil:
			return nil
		case errors.Is(err, os.ErrClosed):
			return fscache.ErrNotOpen
		case time.Now().After(deadline):
			return fmt.Errorf("the kernel made no cache file for blob %s within %v: see its log", h.object.key, kernelPatience)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Unmount implements fscache.Engine.
func (e *Engine) Unmount(ctx context.Context, dir string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return erofs.Unmount(dir)
}
