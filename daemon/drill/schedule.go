package drill

import (
	"math/rand/v2"
	"slices"
	"time"
)

// A schedule says which fault comes next, and after what pause. The same seed and kinds give the same schedule.
type schedule struct {
	rand     *rand.Rand
	kinds    []Kind
	queue    []Kind // what is left of this turn
	interval time.Duration
}

func newSchedule(seed uint64, kinds []Kind, interval time.Duration) *schedule {
	return &schedule{rand: rand.New(rand.NewPCG(seed, 3)), kinds: slices.Clone(kinds), interval: interval}
}

// next returns the next fault. Each turn has every kind once, in an order of its own; a pause is from half to one and a half times the interval.
func (s *schedule) next() (pause time.Duration, k Kind) {
	if len(s.queue) == 0 {
		s.queue = slices.Clone(s.kinds)
		s.rand.Shuffle(len(s.queue), func(i, j int) { s.queue[i], s.queue[j] = s.queue[j], s.queue[i] })
	}
	k, s.queue = s.queue[0], s.queue[1:]
	return s.interval/2 + time.Duration(s.rand.Int64N(int64(s.interval)+1)), k
}

// drop takes a kind out. It returns whether any is left.
func (s *schedule) drop(k Kind) bool {
	is := func(o Kind) bool { return o == k }
	s.kinds, s.queue = slices.DeleteFunc(s.kinds, is), slices.DeleteFunc(s.queue, is)
	return len(s.kinds) > 0
}
