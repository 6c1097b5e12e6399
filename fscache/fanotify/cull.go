package fanotify

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// diskBlock is the unit of a file's st_blocks, in bytes (stat(2)).
const diskBlock = 512

// Cull implements fscache.Engine: it unlinks the cache file.
func (e *Engine) Cull(ctx context.Context, k fscache.Key) error {
	if err := errors.Join(ctx.Err(), checkName("domain", k.Domain), checkName("object id", k.ID)); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.objects[k] != nil || e.alive {
		return fmt.Errorf("object %s: %w", k, fscache.ErrBusy)
	}
	if err := e.root.Remove(filepath.Join(k.Domain, k.ID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("culling object %s: %w", k, err)
	}
	if err := e.root.Remove(k.Domain); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return fmt.Errorf("culling object %s: %w", k, err)
	}
	return syncDir(e.dir)
}

// Usage implements fscache.Engine.
func (e *Engine) Usage(k fscache.Key) (int64, error) {
	if err := errors.Join(checkName("domain", k.Domain), checkName("object id", k.ID)); err != nil {
		return 0, err
	}
	st, err := e.root.Lstat(filepath.Join(k.Domain, k.ID))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("asking for the size of object %s: %w", k, err)
	}
	if s, ok := st.Sys().(*syscall.Stat_t); ok && st.Mode().IsRegular() {
		return s.Blocks * diskBlock, nil
	}
	return 0, nil
}
