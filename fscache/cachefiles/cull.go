package cachefiles

import (
	"context"
	"errors"
	"fmt"

	"holdfast/fscache"
)

// Cull implements fscache.Engine.
func (e *Engine) Cull(_ context.Context, k fscache.Key) error {
	return fmt.Errorf("culling object %s: %w", k, errors.ErrUnsupported)
}

// Usage implements fscache.Engine.
func (e *Engine) Usage(k fscache.Key) (int64, error) {
	return 0, fmt.Errorf("usage of object %s: %w", k, errors.ErrUnsupported)
}
