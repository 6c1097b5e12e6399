package simkernel

import (
	"context"
	"errors"
	"fmt"

	"holdfast/fscache"
)

// SetRoom says how many bytes the cache has in all; 0: as many as it wants.
func (k *Kernel) SetRoom(bytes int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.room = bytes
}

// taken is how many bytes the cache files take; k.mu is held.
func (k *Kernel) taken() (n int64) {
	for _, f := range k.files {
		n += f.taken()
	}
	return n
}

func (f *file) taken() int64 { return int64(len(f.pages)) * page }

// fits says whether there is room for a write of whole pages; k.mu is held.
func (k *Kernel) fits(f *file, off, n int64) bool {
	if k.room == 0 {
		return true
	}
	for at := off; at < off+n; at += page {
		if f.pages[at] != nil {
			n -= page
		}
	}
	return k.taken()+n <= k.room
}

// Cull implements fscache.Engine. An object that the kernel has open is busy (namei.c, cachefiles_cull: S_KERNEL_FILE; fs/locks.c,
// check_conflicting_open).
func (e *Engine) Cull(ctx context.Context, k fscache.Key) error {
	if err := errors.Join(ctx.Err(), checkName(k.Domain), checkName(k.ID)); err != nil {
		return err
	}
	held, err := e.cull(k)
	e.drop(held...)
	return err
}

func (e *Engine) cull(k fscache.Key) (held []fscache.Held, err error) {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	_, added := e.added[k]
	switch {
	case e.closed:
		return nil, fscache.ErrClosed
	case added, e.waits, e.k.used(k), e.k.device != nil && e.k.device.objects[k] != nil:
		return nil, fmt.Errorf("object %s: %w", k, fscache.ErrBusy)
	}
	if e.k.group != nil && (e.k.group.marks[k] || e.fan.quiet[k] != 0) {
		held = e.unwatch(k)
	}
	delete(e.k.files, k)
	return held, nil
}

// Usage implements fscache.Engine.
func (e *Engine) Usage(k fscache.Key) (int64, error) {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if e.closed {
		return 0, fscache.ErrClosed
	}
	if f := e.k.files[k]; f != nil {
		return f.taken(), nil
	}
	return 0, nil
}

// Space implements fscache.Engine.
func (e *Engine) Space() (fscache.Space, error) {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	const plenty = 1 << 40
	total := e.k.room
	if total == 0 {
		total = plenty
	}
	return fscache.Space{Total: total, Free: total - e.k.taken()}, nil
}
