package daemon

import (
	"errors"
	"testing"
	"time"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
	"holdfast/rafs"
)

// TestReadIsDeniedAfterOneDeadlineThoughTheKernelAsksTwice reads more than a page of a dead source: the kernel asks for all of it,
// then for the first page of it.
func TestReadIsDeniedAfterOneDeadlineThoughTheKernelAsksTwice(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, func(o *Options) { o.ReadDeadline = time.Minute })
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecNone, mib)
		defer r.mount(nil, b)()
		b.setBefore(failing(errors.New("connection refused")))
		for range 2 { // the next read tries again, at once
			began := time.Now()
			r.wantError(b, 0, 64*kib)
			if took := time.Since(began); took != time.Minute {
				t.Errorf("a read of a dead source took %v with a deadline of 1m", took)
			}
			if n := len(r.e.reads(b.key)); n != 2 {
				t.Fatalf("the kernel asked %d times: the test shows nothing", n)
			}
			if len(b.asked()) == 0 {
				t.Error("the source was not tried")
			}
		}
		b.setBefore(nil)
		r.wantOK(b, 0, 64*kib)
	})
}

func TestDenialIsForOnePartOfItAndForAMoment(t *testing.T) {
	var d denials
	now := time.Now()
	read := func(off, n int64) fscache.Request { return fscache.Request{Op: fscache.OpRead, Off: off, Len: n} }
	again := func(r fscache.Request, at time.Time) bool {
		e, ok := d.again(r, at)
		if ok && e != fscache.ENOSPC {
			t.Errorf("the second request is told errno %d, the first was told %d", e, fscache.ENOSPC)
		}
		return ok
	}
	d.note(read(8*kib, 64*kib), fscache.ENOSPC, now)
	for _, r := range []fscache.Request{read(0, 4*kib), read(8*kib, 64*kib), read(4*kib, 8*kib), read(68*kib, 8*kib)} {
		if again(r, now) {
			t.Errorf("%d bytes at %d are no part of what was denied", r.Len, r.Off)
		}
	}
	if again(read(12*kib, 4*kib), now.Add(denialLife+1)) {
		t.Error("a denial outlives its time")
	}
	d.note(read(8*kib, 64*kib), fscache.ENOSPC, now)
	if !again(read(12*kib, 4*kib), now) || again(read(12*kib, 4*kib), now) {
		t.Error("a denial is not for one request after it")
	}
	d.note(read(0, 4*kib), fscache.ENOSPC, now)
	for range 2 * maxDenials {
		d.note(read(0, 64*kib), fscache.ENOSPC, now)
	}
	if len(d.list) != maxDenials {
		t.Errorf("%d denials are remembered, want %d", len(d.list), maxDenials)
	}
}
