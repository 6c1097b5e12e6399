package daemon

import "math/bits"

// A bitset holds a bit for each chunk of an object.
type bitset []uint64

func newBitset(n int) bitset { return make(bitset, (n+63)/64) }

func (b bitset) has(i int) bool { return b[i/64]&(1<<(i%64)) != 0 }

// set sets the bits of s and returns how many were clear.
func (b bitset) set(s span) (changed int) {
	s.words(func(w int, mask uint64) bool {
		changed += bits.OnesCount64(mask &^ b[w])
		b[w] |= mask
		return true
	})
	return changed
}

// clear clears the bits of s.
func (b bitset) clear(s span) {
	s.words(func(w int, mask uint64) bool { b[w] &^= mask; return true })
}

// all reports whether every bit of s is set.
func (b bitset) all(s span) bool {
	return s.words(func(w int, mask uint64) bool { return b[w]&mask == mask })
}

// any reports whether a bit of s is set.
func (b bitset) any(s span) bool {
	return !s.words(func(w int, mask uint64) bool { return b[w]&mask == 0 })
}

// count returns how many bits of s are set.
func (b bitset) count(s span) (n int) {
	s.words(func(w int, mask uint64) bool { n += bits.OnesCount64(b[w] & mask); return true })
	return n
}

// A span is a run of an object's chunks: the rows first to last-1 of its table.
type span struct{ first, last int }

func (s span) empty() bool { return s.first >= s.last }

func (s span) overlaps(o span) bool { return s.first < o.last && o.first < s.last }

// words calls f with each word of a bitset that s touches and the bits of it that belong to s, until f returns false;
// it reports whether f never did.
func (s span) words(f func(w int, mask uint64) bool) bool {
	for i := s.first; i < s.last; {
		n := min(64-i%64, s.last-i)
		mask := (^uint64(0) >> (64 - n)) << (i % 64)
		if !f(i/64, mask) {
			return false
		}
		i += n
	}
	return true
}
