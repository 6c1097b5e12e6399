package daemon

import (
	"slices"
	"sync"
	"time"

	"holdfast/fscache"
)

// When its read-ahead is denied, a read(2) asks once more for the page it needs (mm/filemap.c, filemap_get_pages), and would wait
// for the read deadline twice. A denial is remembered for that second request: for as long as it takes the kernel to ask.
const (
	denialLife = 100 * time.Millisecond
	maxDenials = 64 // of an object; a reader whose denial is pushed out waits twice
)

// denials are an object's requests that were denied a moment ago.
type denials struct {
	mu   sync.Mutex
	list []denial // oldest first
}

type denial struct {
	off, end int64
	errno    fscache.Errno
	until    time.Time
}

// note remembers that r was denied. It comes before the answer: the second request follows on it.
func (d *denials) note(r fscache.Request, e fscache.Errno, now time.Time) {
	if r.Len <= fscache.BlockSize { // no read-ahead: what asks next is another read
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.expire(now)
	if len(d.list) == maxDenials {
		d.list = d.list[1:]
	}
	d.list = append(d.list, denial{r.Off, r.Off + r.Len, e, now.Add(denialLife)})
}

// again reports whether r asks for a part of what was denied, and with what. It does so once for each denial: the next read tries again.
func (d *denials) again(r fscache.Request, now time.Time) (fscache.Errno, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.expire(now)
	for i, v := range d.list {
		if v.off <= r.Off && r.Off+r.Len <= v.end && r.Len < v.end-v.off {
			d.list = slices.Delete(d.list, i, i+1)
			return v.errno, true
		}
	}
	return fscache.OK, false
}

func (d *denials) expire(now time.Time) {
	d.list = slices.DeleteFunc(d.list, func(v denial) bool { return now.After(v.until) })
}
