package drill

import (
	"fmt"
	"sync"
	"time"
)

// An outcome is how one read, or one comparison, ended. Times count from the drill's start.
type outcome struct {
	start, end time.Duration
	errno      string // "EIO" and the like; "": no error
	wrong      bool   // a byte is not what the image holds, or bytes are missing
	several    bool   // a comparison after several reads, each of which had a stall of its own
}

// judge says which invariants an outcome violates. Wrong bytes are never excused. An error is, by the faults after which a reader has to be told
// one (see [holds.excuse]). A stall is measured without the time for which faults were held: while a daemon is frozen nobody can expect an answer.
func judge(o outcome, h *holds, bound time.Duration) (v Violated) {
	if o.wrong {
		v.Wrong = 1
	}
	if o.errno != "" && !h.excuse(o) {
		v.Errors = 1
	}
	if waited := o.end - o.start; !o.several && waited > bound && waited-h.overlap(o.start, o.end) > bound {
		v.OverBound = 1
	}
	return v
}

// A hold is a time for which a fault was held.
type hold struct {
	kind     Kind
	from, to time.Duration // to: 0 while it is held
}

// holds are all of them so far.
type holds struct {
	deadline time.Duration // after which the daemon gives up on a source

	mu   sync.Mutex
	list []hold
}

// begin takes note that a fault is held from at on, and returns what to call when it is over.
func (h *holds) begin(k Kind, at time.Duration) (end func(at time.Duration)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := len(h.list)
	h.list = append(h.list, hold{kind: k, from: at})
	return func(at time.Duration) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.list[i].to = at
	}
}

// excuse reports whether a fault excuses an error: a full disk does, for the reads it reaches into, if the error can mean that; a source that was cut
// does once a reader has waited for as long as the daemon tries.
func (h *holds) excuse(o outcome) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, w := range h.list {
		if o.end < w.from || w.to != 0 && o.start > w.to {
			continue
		}
		switch {
		case w.kind == DiskFull && (o.errno == "ENOSPC" || o.errno == "EDQUOT" || o.errno == "EIO"):
			return true
		case w.kind == SourceCut && o.errno == "EIO" && o.end >= w.from+h.deadline && (w.to == 0 || w.to-w.from >= h.deadline):
			return true
		}
	}
	return false
}

// overlap returns for how much of a time faults were held. They are held one at a time.
func (h *holds) overlap(from, to time.Duration) (sum time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, w := range h.list {
		until := w.to
		if until == 0 {
			until = to
		}
		sum += max(0, min(to, until)-max(from, w.from))
	}
	return sum
}

// verdict sums up. A drill that did nothing, or not all that it was told to, has not proved what it was to prove.
func (r *Report) verdict() {
	sum := r.Quiet
	done := 0
	for _, k := range r.Kinds {
		sum = sum.plus(k.Violated)
		done += k.Count
	}
	v := Verdict{I1: sum.Wrong == 0 && sum.Errors == 0, I2: sum.Unanswered == 0, Bound: sum.OverBound == 0}
	say := func(n int64, format string) {
		if n > 0 {
			v.Reasons = append(v.Reasons, fmt.Sprintf(format, n))
		}
	}
	say(sum.Wrong, "I1: %d reads gave wrong bytes")
	say(sum.Errors, "I1: %d reads failed, and no fault excuses that")
	say(sum.Unanswered, "I2: %d reads, mounts or daemons never came back")
	say(sum.OverBound, "%d reads stalled for longer than the bound")
	if r.Early != "" {
		v.Reasons = append(v.Reasons, "it ended early: "+r.Early)
	}
	if done == 0 {
		v.Reasons = append(v.Reasons, "no fault was done")
	}
	if r.Reads.Count == 0 {
		v.Reasons = append(v.Reasons, "nothing was read")
	}
	v.OK = len(v.Reasons) == 0
	r.Verdict = v
}
