package fanotify

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/internal/erofs"
	"holdfast/state/crash"
)

// Abandon implements fscache.Successor. Somebody else must hold this engine's group by now (I4), and the blobs must not have been added.
//
// The files of the mount were opened under marks, so they raise events for any group that marks their inodes again: from then on every
// read is denied, for as long as anything has the inode open. What was read since the old group went may be zeros in the page cache. It is dropped
// where nobody maps it. Blobs that are complete are left alone: their readers get what is there. The cache files of the others are unlinked, so that
// what is mounted anew has files of its own.
func (e *Engine) Abandon(ctx context.Context, m fscache.Mount) error {
	var errs []error
	var unlink []string
	for _, b := range m.Blobs {
		name, err := e.deny(b)
		if name != "" {
			unlink = append(unlink, name)
		}
		errs = append(errs, err)
	}
	crash.Point("fanotify.abandon.before-detach")
	mounted, err := erofs.Mounted(m.Dir)
	if err == nil && mounted {
		errs = append(errs, dropPages(ctx, m.Dir), erofs.Detach(m.Dir))
	} else if !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	crash.Point("fanotify.abandon.before-unlink")
	for _, name := range unlink {
		if err := e.root.Remove(name); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("making the mount on %s unreadable, whose fanotify group is lost: %w", m.Dir, err)
	}
	return nil
}

// deny marks the cache file of a blob with holes, for reads of it to be denied. It returns the file's name if it did.
func (e *Engine) deny(b fscache.Object) (string, error) {
	if err := checkObject(b); err != nil {
		return "", err
	}
	if _, err := e.object(b.Key); err == nil {
		return "", fmt.Errorf("object %s was added: its readers are served, with whatever zeros they have", b.Key)
	} else if !errors.Is(err, fscache.ErrUnknown) {
		return "", err
	}
	name := filepath.Join(b.Key.Domain, b.Key.ID)
	f, err := e.root.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NOATIME|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", fmt.Errorf("cache file of object %s: %w", b.Key, err)
	}
	defer f.Close()
	o := &object{key: b.Key, path: filepath.Join(e.dir, name), size: b.Size, seek: f}
	holes, err := o.hasHoles()
	if err != nil || !holes {
		return "", err
	}
	if o.inode, err = inodeOf(f); err != nil {
		return "", err
	}
	e.mu.Lock()
	e.abandoned[o.inode] = true
	e.mu.Unlock()
	// Evictable: the mark goes with the inode, when nothing has it open any more. Others would keep the unlinked file for ever.
	if err := o.changeMark(e.group, unix.FAN_MARK_ADD|unix.FAN_MARK_EVICTABLE); err != nil {
		return "", fmt.Errorf("mark on cache file %s: %w", o.path, err)
	}
	e.log.Warn("denying reads of a cache file whose fanotify group is lost", zap.String("path", o.path))
	return name, nil
}

// dropPages removes what the page cache has of the files below dir. Metadata is read for it, which raises no event.
func dropPages(ctx context.Context, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return fs.WalkDir(root.FS(), ".", func(path string, d fs.DirEntry, err error) error {
		if err := errors.Join(err, ctx.Err()); err != nil {
			return fmt.Errorf("dropping cached pages: %w", err)
		}
		if !d.Type().IsRegular() {
			return nil
		}
		f, err := root.Open(path)
		if err != nil {
			return fmt.Errorf("dropping cached pages: %w", err)
		}
		defer f.Close()
		if err := control(f, func(fd int) error { return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED) }); err != nil {
			return fmt.Errorf("dropping cached pages of %s: %w", path, err)
		}
		return nil
	})
}
