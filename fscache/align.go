package fscache

import "unsafe"

// alignSkip is the number of bytes from the start of b to the next BlockSize boundary of memory. The Go heap does not
// move allocations, so the answer stays true while b lives.
func alignSkip(b []byte) int {
	return int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (BlockSize - 1))
}

// IsAligned says whether b starts on a BlockSize boundary of memory.
func IsAligned(b []byte) bool { return alignSkip(b) == 0 }
