package fscache

import "testing"

func TestWatermarksOutOfOrderAreRefused(t *testing.T) {
	for _, w := range []Watermarks{{7, 5, -1}, {7, 5, 5}, {5, 5, 1}, {100, 5, 1}, {5, 7, 1}, {0, 0, 0}} {
		if err := w.Check(); err == nil {
			t.Errorf("%+v: accepted", w)
		}
		if err := (Limits{Space: w, Inodes: Watermarks{7, 5, 1}}).Check(); err == nil {
			t.Errorf("%+v of space: accepted", w)
		}
		if err := (Limits{Space: Watermarks{7, 5, 1}, Inodes: w}).Check(); err == nil {
			t.Errorf("%+v of inodes: accepted", w)
		}
	}
	if err := DefaultLimits.Check(); err != nil {
		t.Error(err)
	}
	if err := (Watermarks{Run: 2, Cull: 1}).Check(); err != nil {
		t.Error(err)
	}
}

func TestTheLowerOfSpaceAndInodesCounts(t *testing.T) {
	l := Limits{Space: Watermarks{Run: 30, Cull: 20, Stop: 10}, Inodes: Watermarks{Run: 30, Cull: 20, Stop: 10}}
	for _, c := range []struct {
		name                string
		free, inodes        int64
		ample, low, stopped bool
	}{
		{"at run", 300, 300, true, false, false},
		{"space below run", 299, 1000, false, false, false},
		{"inodes below run", 1000, 299, false, false, false},
		{"at cull", 200, 200, false, false, false},
		{"space below cull", 199, 1000, false, true, false},
		{"inodes below cull", 1000, 199, false, true, false},
		{"space at stop", 100, 1000, false, true, false},
		{"space below stop", 99, 1000, false, true, true},
		{"inodes below stop", 1000, 99, false, true, true},
	} {
		s := Space{Total: 1000, Free: c.free, Inodes: 1000, FreeInodes: c.inodes}
		if a, w, st := l.Ample(s), l.Low(s), l.Stopped(s, 0); a != c.ample || w != c.low || st != c.stopped {
			t.Errorf("%s: ample %v, low %v, stopped %v", c.name, a, w, st)
		}
	}
	if s := (Space{Total: 1000, Free: 300}); !l.Ample(s) {
		t.Error("a file system without a number of inodes is short of them")
	}
	if s := (Space{Total: 1000, Free: 300}); !l.Stopped(s, 201) || l.Stopped(s, 200) {
		t.Error("what is written does not count")
	}
}
