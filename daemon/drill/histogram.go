package drill

import (
	"math/bits"
	"time"
)

// A histogram counts latencies in buckets whose width grows with the latency, as HDR histograms do: 16 to each power of two, so that a bucket's
// bounds are never more than 6.25 % apart. The zero value is empty. One goroutine has it at a time.
type histogram struct {
	counts [(maxExponent + 1) << subBits]int64
	n      int64
	max    time.Duration
}

const (
	subBits     = 4
	maxExponent = 45 // of a power of two in microseconds: a year; what is longer is counted as that
)

// bucketOf returns the bucket of a latency. The unit is a microsecond: reads that are shorter are all the same here.
func bucketOf(d time.Duration) int {
	us := uint64(max(d, 0)) / uint64(time.Microsecond)
	if us < 1<<subBits {
		return int(us)
	}
	e := bits.Len64(us) - 1 - subBits // how often us was halved to get subBits+1 bits
	return min((e+1)<<subBits+int(us>>e&(1<<subBits-1)), len(histogram{}.counts)-1)
}

// bucketEnd returns the first latency that is above a bucket's.
func bucketEnd(b int) time.Duration {
	if b < 1<<subBits {
		return time.Duration(b+1) * time.Microsecond
	}
	e, m := b>>subBits-1, b&(1<<subBits-1)
	return time.Duration(uint64(m+(1<<subBits)+1)<<e) * time.Microsecond
}

func (h *histogram) add(d time.Duration) {
	h.counts[bucketOf(d)]++
	h.n++
	h.max = max(h.max, d)
}

func (h *histogram) merge(o *histogram) {
	for i, c := range o.counts {
		h.counts[i] += c
	}
	h.n += o.n
	h.max = max(h.max, o.max)
}

// quantile returns a latency that a share q of all are not above: the end of the bucket in which that falls, and never more than the longest.
func (h *histogram) quantile(q float64) time.Duration {
	want := int64(q*float64(h.n) + 0.999999)
	var seen int64
	for b, c := range h.counts {
		if seen += c; c > 0 && seen >= want {
			return min(bucketEnd(b), h.max)
		}
	}
	return h.max
}

// buckets lists what is not empty.
func (h *histogram) buckets() []Bucket {
	var list []Bucket
	for b, c := range h.counts {
		if c > 0 {
			list = append(list, Bucket{bucketEnd(b), c})
		}
	}
	return list
}
