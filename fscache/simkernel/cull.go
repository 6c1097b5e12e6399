package simkernel

import (
	"context"
	"fmt"

	"holdfast/fscache"
)

// Cull implements fscache.Engine.
func (e *Engine) Cull(ctx context.Context, k fscache.Key) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if e.closed {
		return fscache.ErrClosed
	}
	if _, added := e.added[k]; added || e.k.used(k) {
		return fmt.Errorf("object %s: %w", k, fscache.ErrBusy)
	}
	delete(e.k.files, k)
	return nil
}

// Usage implements fscache.Engine.
func (e *Engine) Usage(k fscache.Key) (int64, error) {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if e.closed {
		return 0, fscache.ErrClosed
	}
	if f := e.k.files[k]; f != nil {
		return int64(len(f.pages)) * page, nil
	}
	return 0, nil
}
