package drill

import "time"

// A timeline holds, for each stretch of a drill, how long a read had waited at most, and how many reads ended. It has a bounded number of
// stretches: when a drill outlasts them, each becomes twice as long.
type timeline struct {
	bin   time.Duration
	stall []time.Duration
	reads []int64
}

const (
	firstBin = 50 * time.Millisecond
	maxBins  = 2048
)

func newTimeline() *timeline { return &timeline{bin: firstBin} }

// add takes note of a read that waited from start to end, counted from the drill's start.
func (t *timeline) add(start, end time.Duration) {
	t.wait(start, end)
	t.reads[max(end, 0)/t.bin]++
}

// wait takes note of a wait. It is felt in every stretch it reaches into, with the time it had taken by the end of the stretch.
func (t *timeline) wait(start, end time.Duration) {
	start, end = max(start, 0), max(end, 0)
	t.reach(end)
	for b := int(start / t.bin); b <= int(end/t.bin); b++ {
		until := min(end, time.Duration(b+1)*t.bin)
		t.stall[b] = max(t.stall[b], until-start)
	}
}

// reach makes the timeline long enough for a moment.
func (t *timeline) reach(at time.Duration) {
	for at/t.bin >= maxBins {
		t.double()
	}
	for n := int(at/t.bin) + 1; len(t.stall) < n; {
		t.stall, t.reads = append(t.stall, 0), append(t.reads, 0)
	}
}

func (t *timeline) double() {
	t.bin *= 2
	n := (len(t.stall) + 1) / 2
	for b := range n {
		stall, reads := t.stall[2*b], t.reads[2*b]
		if 2*b+1 < len(t.stall) {
			stall, reads = max(stall, t.stall[2*b+1]), reads+t.reads[2*b+1]
		}
		t.stall[b], t.reads[b] = stall, reads
	}
	t.stall, t.reads = t.stall[:n], t.reads[:n]
}

// merge adds what another timeline holds. The other one is changed.
func (t *timeline) merge(o *timeline) {
	for t.bin < o.bin {
		t.double()
	}
	for o.bin < t.bin {
		o.double()
	}
	if n := len(o.stall); n > 0 {
		t.reach(time.Duration(n-1) * t.bin)
	}
	for b := range o.stall {
		t.stall[b] = max(t.stall[b], o.stall[b])
		t.reads[b] += o.reads[b]
	}
}
