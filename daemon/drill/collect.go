package drill

import (
	"sync"
	"sync/atomic"
	"time"
)

// maxViolations is how many violations a report lists. All are counted.
const maxViolations = 1000

// A collector gathers what readers find, and says which fault it belongs to: the last that was done before the read ended, unless that fault was over
// before the read began.
type collector struct {
	began time.Time
	holds holds
	bound time.Duration
	at    atomic.Pointer[activeFault] // the last fault; nil before the first

	reads, bytes, errors, excused atomic.Int64
	violated                      atomic.Int64

	mu    sync.Mutex
	quiet Violated
	list  []Violation
}

// An activeFault is a fault from when it is done until the next one is.
type activeFault struct {
	previous *activeFault
	number   int
	kind     Kind
	at       time.Duration
	fault    Fault        // as it is reported; whoever does the fault has it
	until    atomic.Int64 // when the daemon answered again; 0: not yet
	maxStall atomic.Int64
	violated Violated // guarded by collector.mu
}

func (c *collector) now() time.Duration { return time.Since(c.began) }

// felt tells every fault that a read reached into how long the read took.
func (c *collector) felt(o outcome) {
	took := int64(o.end - o.start)
	for f := c.at.Load(); f != nil; f = f.previous {
		if u := f.until.Load(); u != 0 && int64(o.start) > u {
			return // and the faults before it were over even earlier
		}
		if o.end < f.at {
			continue
		}
		for old := f.maxStall.Load(); took > old && !f.maxStall.CompareAndSwap(old, took); {
			old = f.maxStall.Load()
		}
	}
}

// touched returns the fault that a read belongs to, nil if none.
func (c *collector) touched(start, end time.Duration) *activeFault {
	f := c.at.Load()
	if f == nil || end < f.at {
		return nil
	}
	if u := f.until.Load(); u != 0 && int64(start) > u {
		return nil
	}
	return f
}

// note judges a read or a comparison and counts it for its fault.
func (c *collector) note(o outcome, path string, off int64, n int) {
	f := c.touched(o.start, o.end)
	if !o.several {
		c.felt(o)
	}
	v := judge(o, &c.holds, c.bound)
	if o.errno != "" {
		c.errors.Add(1)
		if v.Errors == 0 {
			c.excused.Add(1)
		}
	}
	if v == (Violated{}) {
		return
	}
	at := Violation{At: o.end, Path: path, Off: off, Len: n, Waited: o.end - o.start}
	if v.Wrong > 0 {
		at.Invariant, at.What = "I1", "wrong bytes"
		if o.errno != "" {
			at.What = "wrong bytes before " + o.errno
		}
	} else if v.Errors > 0 {
		at.Invariant, at.What = "I1", o.errno
	} else {
		at.Invariant, at.What = "bound", "stalled for longer than the bound"
	}
	c.violation(f, v, at)
}

// violation counts a violation for a fault, or for none.
func (c *collector) violation(f *activeFault, v Violated, at Violation) {
	c.violated.Add(v.Sum())
	c.mu.Lock()
	defer c.mu.Unlock()
	if f == nil {
		c.quiet = c.quiet.plus(v)
	} else {
		f.violated = f.violated.plus(v)
		at.Fault = f.number
	}
	if len(c.list) < maxViolations {
		c.list = append(c.list, at)
	}
}

// unanswered counts something that never came back.
func (c *collector) unanswered(f *activeFault, what, path string, since time.Duration) {
	now := c.now()
	c.violation(f, Violated{Unanswered: 1}, Violation{At: now, Invariant: "I2", What: what, Path: path, Waited: now - since})
}
