package drill

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func TestBucketsAreInOrderAndNeverWiderThanASixteenth(t *testing.T) {
	for b := 1; b < len(histogram{}.counts); b++ {
		lo, hi := bucketEnd(b-1), bucketEnd(b)
		if hi <= lo {
			t.Fatalf("bucket %d ends at %v, the one before at %v", b, hi, lo)
		}
		if b > 1<<subBits && hi-lo > lo/16 {
			t.Errorf("bucket %d from %v to %v is wider than a sixteenth", b, lo, hi)
		}
		if got := bucketOf(lo); got != b {
			t.Errorf("%v is in bucket %d, want %d", lo, got, b)
		}
		if got := bucketOf(hi - time.Nanosecond); got != b {
			t.Errorf("%v is in bucket %d, want %d", hi-time.Nanosecond, got, b)
		}
	}
	if got := bucketOf(-time.Second); got != 0 {
		t.Errorf("a negative latency is in bucket %d", got)
	}
	if got := bucketOf(1 << 62); got != len(histogram{}.counts)-1 {
		t.Errorf("the longest latency is in bucket %d", got)
	}
}

func TestQuantilesAreThoseOfTheSortedLatenciesToASixteenth(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	var parts [3]histogram
	var all []time.Duration
	for i := range 10_000 {
		d := time.Duration(r.ExpFloat64() * float64(20*time.Millisecond))
		all = append(all, d)
		parts[i%3].add(d)
	}
	var h histogram
	for i := range parts {
		h.merge(&parts[i])
	}
	slices.Sort(all)
	for _, q := range []float64{0.001, 0.5, 0.9, 0.99, 0.999, 1} {
		want := all[max(0, int(q*float64(len(all)))-1)]
		if got := h.quantile(q); got < want || got > want+want/16+time.Microsecond {
			t.Errorf("quantile %v: got %v, want %v and at most a sixteenth more", q, got, want)
		}
	}
	var sum int64
	for _, b := range h.buckets() {
		sum += b.Count
	}
	if sum != int64(len(all)) || h.max != all[len(all)-1] {
		t.Errorf("%d latencies, the longest %v, want %d and %v", sum, h.max, len(all), all[len(all)-1])
	}
	if (&histogram{}).quantile(0.5) != 0 {
		t.Error("an empty histogram has a quantile")
	}
}

func TestReadIsFeltInEveryStretchItReachesIntoWithWhatItHadWaitedByThen(t *testing.T) {
	tl := newTimeline()
	tl.add(70*time.Millisecond, 180*time.Millisecond)
	want := []time.Duration{0, 30 * time.Millisecond, 80 * time.Millisecond, 110 * time.Millisecond}
	if !slices.Equal(tl.stall, want) || !slices.Equal(tl.reads, []int64{0, 0, 0, 1}) {
		t.Errorf("got %v, %v", tl.stall, tl.reads)
	}
}

func TestTimelineStaysBoundedAndLosesNoReadAndNoStall(t *testing.T) {
	a, b := newTimeline(), newTimeline()
	for i := range 5000 {
		at := time.Duration(i) * 100 * time.Millisecond
		a.add(at, at+time.Millisecond)
	}
	b.add(250*time.Second, 290*time.Second)
	a.merge(b)
	var reads int64
	for _, n := range a.reads {
		reads += n
	}
	if len(a.stall) > maxBins || reads != 5001 || slices.Max(a.stall) != 40*time.Second {
		t.Errorf("%d stretches, %d reads, longest stall %v", len(a.stall), reads, slices.Max(a.stall))
	}
	fine := newTimeline()
	fine.add(0, time.Second)
	fine.merge(a) // the coarser into the finer
	if fine.bin != a.bin || slices.Max(fine.stall) != 40*time.Second {
		t.Errorf("merged into a finer one: stretches of %v, longest stall %v", fine.bin, slices.Max(fine.stall))
	}
}

func TestSameSeedGivesTheSameScheduleInWhichEveryKindHasItsTurn(t *testing.T) {
	kinds := Kinds()
	a, b := newSchedule(7, kinds, time.Second), newSchedule(7, kinds, time.Second)
	other, differs := newSchedule(8, kinds, time.Second), false
	for range 20 {
		seen := map[Kind]bool{}
		for range kinds {
			pause, k := a.next()
			p2, k2 := b.next()
			_, k3 := other.next()
			differs = differs || k3 != k
			if pause != p2 || k != k2 {
				t.Fatalf("got %v %v and %v %v with the same seed", pause, k, p2, k2)
			}
			if pause < time.Second/2 || pause > 3*time.Second/2 {
				t.Errorf("pause of %v", pause)
			}
			seen[k] = true
		}
		if len(seen) != len(kinds) {
			t.Errorf("a turn had %d kinds of %d", len(seen), len(kinds))
		}
	}
	if !differs {
		t.Error("another seed gave the same order")
	}
}

func TestDroppedKindNeverComesAgain(t *testing.T) {
	s := newSchedule(1, []Kind{Kill, Freeze}, 0)
	s.next()
	if !s.drop(Freeze) {
		t.Fatal("nothing is left")
	}
	for range 10 {
		if _, k := s.next(); k != Kill {
			t.Fatalf("got %s", k)
		}
	}
	if s.drop(Kill) {
		t.Error("something is left")
	}
}
