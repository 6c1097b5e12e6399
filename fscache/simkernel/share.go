package simkernel

import (
	"bytes"
	"fmt"

	"holdfast/fscache"
)

// Share implements fscache.Engine: what is equal may be one, which nobody can tell.
func (e *Engine) Share(k fscache.Key, x fscache.Extent, with fscache.Key, at int64) (int64, error) {
	a, b := make([]byte, x.Len), make([]byte, x.Len)
	if err := e.ReadAt(k, a, x.Off); err != nil {
		return 0, err
	}
	if err := e.ReadAt(with, b, at); err != nil {
		return 0, err
	}
	if !bytes.Equal(a, b) {
		return 0, fmt.Errorf("object %s at %d, object %s at %d: the extents differ", k, x.Off, with, at)
	}
	return x.Len, nil
}
