package blob

import (
	"sync"

	"holdfast/rafs"
	"holdfast/rafs/tree"
)

// A Dedup remembers the chunks that were written, so that none is stored twice in an image. The writers of one
// conversion share one; they must write one after the other (the next may be used when the Flush of the one before has
// returned), or which blob stores a chunk would be a matter of luck.
type Dedup struct {
	mu     sync.RWMutex
	chunks map[dedupKey]tree.ChunkRef
}

type dedupKey struct {
	digest rafs.Digest
	size   uint32
}

// NewDedup returns an empty Dedup.
func NewDedup() *Dedup { return &Dedup{chunks: make(map[dedupKey]tree.ChunkRef)} }

func (d *Dedup) find(k dedupKey) (tree.ChunkRef, bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	ref, ok := d.chunks[k]
	return ref, ok
}

func (d *Dedup) add(k dedupKey, ref tree.ChunkRef) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.chunks[k] = ref
}
