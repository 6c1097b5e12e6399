package fanotify

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/internal/erofs"
)

// AsksForBootstrap implements fscache.Engine: reads of a bootstrap raise no event.
func (e *Engine) AsksForBootstrap() bool { return false }

// Mount implements fscache.Engine: it mounts the bootstrap's file itself, with each blob's cache file as a device. Reads
// of the bootstrap raise no event, so its file must be complete; m.Bootstrap is not used.
func (e *Engine) Mount(ctx context.Context, m fscache.Mount) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := erofs.CheckMountPoint(m.Dir); err != nil {
		return err
	}
	if err := e.mount(m); err != nil {
		return fmt.Errorf("mounting %s on %s: %w", m.BootstrapPath, m.Dir, err)
	}
	return nil
}

func (e *Engine) mount(m fscache.Mount) error {
	if !filepath.IsAbs(m.BootstrapPath) {
		return errors.New("the bootstrap's path is not absolute")
	}
	devices := make([]string, 0, len(m.Blobs))
	for _, b := range m.Blobs {
		o, err := e.object(b.Key)
		if err != nil {
			return err
		}
		if o.size != b.Size {
			return fmt.Errorf("object %s was added with %d bytes, the image says %d", b.Key, o.size, b.Size)
		}
		if err := e.prepare(o); err != nil {
			return err
		}
		devices = append(devices, o.path)
	}
	fd, err := erofs.NewFromFiles(m.BootstrapPath, devices)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return erofs.Attach(fd, m.Dir)
}

// prepare marks what is not complete, before the mount opens it: whether a file raises events is settled then.
func (e *Engine) prepare(o *object) error {
	o.changing.Lock()
	defer o.changing.Unlock()
	if o.gone.Load() {
		return fmt.Errorf("object %s: %w", o.key, fscache.ErrUnknown)
	}
	return e.watch(o)
}

// Unmount implements fscache.Engine.
func (e *Engine) Unmount(ctx context.Context, dir string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return erofs.Unmount(dir)
}
