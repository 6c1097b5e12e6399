package daemon

import (
	"math/bits"
	"sync"

	"holdfast/fscache"
	"holdfast/rafs/blob"
)

// Buffers are recycled by size class, powers of two from a block to the largest stored chunk. What lies idle is left to
// the garbage collector (sync.Pool), so a daemon that does nothing holds none.
const bufferClasses = 14 // 4 KiB << 13 = 32 MiB, the first class that holds rafs.MaxChunkSize stored at its worst

var bufferPools [bufferClasses]sync.Pool

// A buffer is aligned memory of at least the size asked for, with a capacity of blob.Slack bytes more.
type buffer struct {
	b     []byte
	class int
}

// getBuffer returns a buffer of n bytes with any content; the caller frees it once.
func getBuffer(n int) *buffer {
	class := bits.Len(uint(max(n, 1)-1) / fscache.BlockSize)
	if p, ok := bufferPools[class].Get().(*buffer); ok {
		p.b = p.b[:n]
		return p
	}
	return &buffer{b: fscache.AlignedBuffer(fscache.BlockSize<<class + blob.Slack)[:n], class: class}
}

func (p *buffer) free() {
	if p.class != shared {
		bufferPools[p.class].Put(p)
	}
}

// shared is the class of what is never recycled.
const shared = -1

// zeros is what zero rows are written from. Nobody writes to it.
var zeros = sync.OnceValue(func() *buffer { return &buffer{b: fscache.AlignedBuffer(maxBatch), class: shared} })
