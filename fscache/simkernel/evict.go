package simkernel

import "holdfast/fscache"

// Evict implements fscache.Engine; there is no page cache.
func (e *Engine) Evict(k fscache.Key, _ fscache.Extent) error {
	return e.with(k, func(*file) error { return nil })
}
