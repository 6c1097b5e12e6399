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
	dict  *Dictionary // nil: none
	first int

	mu     sync.RWMutex
	chunks map[dedupKey]tree.ChunkRef
}

type dedupKey struct {
	digest rafs.Digest
	size   uint32
}

// NewDedup returns a Dedup that knows the chunks of dict, which may be nil. Its blob n, counted from 0, is the image's blob
// first+n: the ChunkRef.Blob of its chunks.
func NewDedup(dict *Dictionary, first int) *Dedup {
	return &Dedup{dict: dict, first: first, chunks: make(map[dedupKey]tree.ChunkRef)}
}

func (d *Dedup) find(k dedupKey) (tree.ChunkRef, bool) {
	if d.dict != nil {
		if ref, ok := d.dict.chunks[k]; ok {
			ref.Blob += d.first
			return ref, true
		}
	}
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

// A Dictionary holds the chunks of finished blobs, by digest and size. Once it is made any number of Dedups may use it.
type Dictionary struct {
	chunks map[dedupKey]tree.ChunkRef // ChunkRef.Blob counts from 0
	blobs  int
}

// NewDictionary returns an empty Dictionary.
func NewDictionary() *Dictionary { return &Dictionary{chunks: make(map[dedupKey]tree.ChunkRef)} }

// Add adds the chunks of the next blob, whose digests must be of the algorithm that the writers use. Of two equal chunks the
// one added first is used.
func (d *Dictionary) Add(t *rafs.Table) {
	index := uint32(0) // in the blob's own chunk array, which has no rows for gaps
	for i := range t.Len() {
		c := t.At(i)
		if c.Zero() {
			continue
		}
		k := dedupKey{c.Digest, c.Size}
		if _, ok := d.chunks[k]; !ok {
			d.chunks[k] = tree.ChunkRef{Blob: d.blobs, Index: index, Offset: c.Offset}
		}
		index++
	}
	d.blobs++
}
