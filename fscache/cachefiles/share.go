package cachefiles

import (
	"errors"
	"fmt"

	"holdfast/fscache"
)

// Share implements fscache.Engine. It cannot: the descriptors are for writing only, and the files are the kernel's.
func (e *Engine) Share(k fscache.Key, _ fscache.Extent, with fscache.Key, _ int64) (int64, error) {
	for _, k := range []fscache.Key{k, with} {
		if _, err := e.known(k); err != nil {
			return 0, err
		}
	}
	return 0, fmt.Errorf("sharing extents of objects %s and %s: %w", k, with, errors.ErrUnsupported)
}
