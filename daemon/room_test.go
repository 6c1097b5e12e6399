package daemon

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
	"holdfast/rafs"
	"holdfast/state"
)

// tight has little room: 10 MiB, of which 20 % are to be left, and culling begins below 10 % and ends at 30 %.
func tight(o *Options) {
	o.Limits.Space = fscache.Watermarks{Run: 30, Cull: 20, Stop: 10}
	o.Limits.Inodes = fscache.DefaultLimits.Inodes
}

// tightRig is a rig with 10 MiB of room, and its culler.
func tightRig(t *testing.T, mode simkernel.Mode, change func(*Options)) (r *rig, cull func()) {
	t.Helper()
	k := simkernel.New(mode)
	k.SetRoom(10 * mib)
	r = rigOver(t, k, t.TempDir(), func(o *Options) {
		tight(o)
		if change != nil {
			change(o)
		}
	})
	return r, func() {
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() { r.d.keepRoom(ctx) })
		synctest.Wait()
		t.Cleanup(func() { cancel(); wg.Wait() })
	}
}

// inDomain gives a blob to a domain.
func (b *testBlob) inDomain(domain string) *testBlob {
	b.key.Domain = domain
	return b
}

// leave has all of a blob cached and not mounted, last used at a time.
func (r *rig) leave(b *testBlob, at time.Time) {
	r.t.Helper()
	unmount := r.mount(nil, b)
	r.readAll(b)
	unmount()
	if err := r.d.state.UseObjects(b.key.Domain, []string{b.key.ID}, at); err != nil {
		r.t.Fatal(err)
	}
}

// retire puts a blob on record as being removed.
func (r *rig) retire(b *testBlob) {
	r.t.Helper()
	list, err := r.d.state.RetireObjects(func(_ *state.Graph, o state.Object) bool { return keyOf(o) == b.key })
	if err != nil || len(list) != 1 {
		r.t.Fatalf("%d objects retired, %v", len(list), err)
	}
}

func (r *rig) cached(b *testBlob) bool {
	r.t.Helper()
	n, err := r.e.Usage(b.key)
	if err != nil {
		r.t.Fatal(err)
	}
	return n > 0
}

func (r *rig) wantCached(b *testBlob, want bool, why string) {
	r.t.Helper()
	if r.cached(b) != want {
		r.t.Errorf("%s is cached: %v, want %v: %s", b.key, !want, want, why)
	}
}

func blobOf(id string, megabytes int) *testBlob {
	return newBlob(id, uint64(len(id))+uint64(id[0]), rafs.CodecNone, many(megabytes, mib)...)
}

func TestReaderWithoutRoomWaitsForCullingAndGetsItsBytes(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r, cull := tightRig(t, mode, nil)
		defer r.close()
		old, b := blobOf("old", 8), blobOf("new", 4)
		r.leave(old, time.Now())
		defer r.mount(nil, b)()
		done := make(chan error, 1)
		go func() { done <- r.read(b, 0, 2*mib) }() // ends with the read
		synctest.Wait()
		select {
		case err := <-done:
			t.Fatalf("the reader was let go with the disk full: %v", err)
		default:
		}
		time.Sleep(10 * time.Second)
		cull()
		if err := <-done; err != nil {
			t.Fatalf("after culling: %v", err)
		}
		r.wantCached(old, false, "it had to go")
		r.wantOK(b, 2*mib, 2*mib)
	})
}

func TestNothingIsWrittenBelowTheStopMark(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r, cull := tightRig(t, mode, nil)
		defer r.close()
		b := blobOf("bb", 10)
		defer r.mount(nil, b)()
		cull()
		for i := range int64(8) {
			r.wantOK(b, i*mib, mib)
		}
		r.wantError(b, 8*mib, 2*mib)
		waited := false
		for _, a := range r.e.reads(b.key) {
			waited = waited || a.errno == fscache.ENOSPC && a.took == DefaultSpaceDeadline
			if a.errno != fscache.OK && a.errno != fscache.ENOSPC {
				t.Errorf("told %d after %v, want ENOSPC", a.errno, a.took)
			}
		}
		if !waited {
			t.Errorf("nobody was told ENOSPC after %v", DefaultSpaceDeadline)
		}
		if s, err := r.e.Space(); err != nil || s.Free < mib {
			t.Errorf("%d bytes free, %v: it was written below the mark of 1 MiB", s.Free, err)
		}
		r.wantOK(b, 0, 8*mib) // what is there is read
		r.kernel.SetRoom(20 * mib)
		began := time.Now()
		r.wantOK(b, 8*mib, 2*mib)
		if d := time.Since(began); d > time.Second {
			t.Errorf("it took %v to recover", d)
		}
	})
}

func TestLeastRecentlyUsedIsCulledUntilTheRunMark(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r, cull := tightRig(t, mode, nil)
		defer r.close()
		now := time.Now()
		recent, oldest, older := blobOf("a-recent", 3), blobOf("b-oldest", 2), blobOf("c-older", 1)
		r.leave(recent, now)
		r.leave(oldest, now.Add(-2*time.Hour))
		r.leave(older, now.Add(-time.Hour))
		cull()
		time.Sleep(time.Minute)
		for _, b := range []*testBlob{recent, oldest, older} {
			r.wantCached(b, true, "there is enough room")
		}
		b := blobOf("dd", 3)
		defer r.mount(nil, b)()
		r.readAll(b) // 9 of 10 MiB: 2 must go
		time.Sleep(time.Minute)
		r.wantCached(oldest, false, "it was used first")
		r.wantCached(recent, true, "others were used before")
		r.wantCached(b, true, "it is mounted")
		r.wantOK(b, 0, 3*mib)
	})
}

// Deleting files keeps the disk busy that readers use too, whoever asked for it.
func TestGCPausesBetweenObjects(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r, _ := tightRig(t, mode, nil)
		defer r.close()
		blobs := []*testBlob{blobOf("a", 1), blobOf("b", 1), blobOf("c", 1)}
		for _, b := range blobs {
			r.leave(b, time.Now())
		}
		began := time.Now()
		if _, err := r.d.gc(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		for _, b := range blobs {
			r.wantCached(b, false, "no image refers to it")
		}
		if took := time.Since(began); took < time.Duration(len(blobs)-1)*cullPause {
			t.Errorf("%d objects were removed in %v", len(blobs), took)
		}
	})
}

// Readers meet fewer deletions than one in a hundred, unless somebody waits for room.
func TestCullerRestsForLongerWhileNobodyWaitsForRoom(t *testing.T) {
	const each = 5 * time.Millisecond
	for name, want := range map[string]struct {
		urgent         bool
		least, longest time.Duration
	}{
		"nobody waits":   {false, 2 * cullShare * each, 4 * cullShare * each},
		"a reader waits": {true, 2 * cullPause, cullShare * each},
	} {
		t.Run(name, func(t *testing.T) {
			eachMode(t, func(t *testing.T, mode simkernel.Mode) {
				r, cull := tightRig(t, mode, func(o *Options) { o.DomainQuota = map[string]int64{LocalDomain: 1} })
				defer r.close()
				blobs := []*testBlob{blobOf("a", 1), blobOf("b", 1), blobOf("c", 1)}
				for _, b := range blobs {
					r.leave(b, time.Now())
				}
				r.e.culling = each
				if want.urgent {
					go func() { // ends with the test
						for r.d.room.wait(t.Context(), time.Minute) == nil {
						}
					}()
				}
				began := time.Now()
				cull()
				for r.d.room.culled.Load() < 3 {
					time.Sleep(time.Millisecond)
				}
				if took := time.Since(began); took < want.least || took > want.longest {
					t.Errorf("3 objects were culled in %v, want %v to %v", took, want.least, want.longest)
				}
			})
		})
	}
}

func TestWhatIsMountedIsNeverCulled(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r, cull := tightRig(t, mode, nil)
		defer r.close()
		b := blobOf("bb", 8)
		defer r.mount(nil, b)()
		r.readAll(b)
		if err := r.d.state.UseObjects(b.key.Domain, []string{b.key.ID}, time.Time{}); err != nil {
			t.Fatal(err)
		}
		cull()
		r.d.room.full()
		time.Sleep(time.Minute)
		r.readAll(b)
		if n := r.d.room.culled.Load(); n != 0 {
			t.Errorf("%d objects were culled", n)
		}
	})
}

func TestDomainOverItsQuotaLosesItsOwnObjectsOnly(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r, cull := tightRig(t, mode, func(o *Options) { o.DomainQuota = map[string]int64{"small": 3 * mib, AllDomains: 100 * mib} })
		defer r.close()
		now := time.Now()
		other := blobOf("aa", 2).inDomain("other")
		old, young := blobOf("bb", 2).inDomain("small"), blobOf("cc", 2).inDomain("small")
		r.leave(other, now.Add(-3*time.Hour))
		r.leave(old, now.Add(-2*time.Hour))
		r.leave(young, now)
		cull()
		time.Sleep(time.Minute)
		r.wantCached(old, false, "its domain was over its quota")
		r.wantCached(young, true, "its domain is not over its quota any more")
		r.wantCached(other, true, "its domain is not over its quota")
	})
}

func TestDomainOverItsQuotaPushesNoOtherOut(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r, cull := tightRig(t, mode, func(o *Options) { o.DomainQuota = map[string]int64{"small": mib} })
		defer r.close()
		other, b := blobOf("aa", 5).inDomain("other"), blobOf("bb", 8).inDomain("small")
		r.leave(other, time.Now().Add(-time.Hour))
		defer r.mount(nil, b)()
		cull()
		r.wantOK(b, 0, mib)
		r.wantOK(b, mib, mib) // there is room
		r.wantError(b, 2*mib, 2*mib)
		for _, a := range r.e.reads(b.key) {
			if a.errno != fscache.OK && a.errno != fscache.ENOSPC {
				t.Errorf("told %d, want ENOSPC", a.errno)
			}
		}
		r.wantCached(other, true, "only a domain over its quota wanted its room")
	})
}

func TestWaitingForRoomHoldsUpNobodyElse(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, nil)
		defer r.close()
		stuck, quick := newBlob("aa", 1, rafs.CodecNone, many(64, 64*kib)...), newBlob("bb", 2, rafs.CodecNone, many(64, 64*kib)...)
		defer r.mount(nil, stuck)()
		defer r.mount(nil, quick)()
		r.wantOK(stuck, 0, 64*kib)
		r.e.fail(func(k fscache.Key, _ []byte, _ int64) error {
			if k == stuck.key {
				return fmt.Errorf("write: %w", fscache.ErrNoSpace)
			}
			return nil
		})
		var wg sync.WaitGroup
		for i := range int64(62) {
			wg.Go(func() { r.wantError(stuck, (i+2)*64*kib, 4*kib) })
		}
		synctest.Wait()
		began := time.Now()
		for i := range int64(64) {
			r.wantOK(quick, i*64*kib, 4*kib)
		}
		r.wantOK(stuck, 0, 4*kib)
		if d := time.Since(began); d > 100*time.Millisecond {
			t.Errorf("readers of another blob took %v beside 62 that wait for room", d)
		}
		wg.Wait()
	})
}

// What a process had begun to cull when it died is culled by the next, however much room there is.
func TestCullingThatWasBegunIsFinished(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r, cull := tightRig(t, mode, nil)
		defer r.close()
		begun, gone, other := blobOf("aa", 1), blobOf("bb", 1), blobOf("cc", 1)
		for _, b := range []*testBlob{begun, gone, other} {
			r.leave(b, time.Now())
		}
		if err := r.e.Cull(t.Context(), gone.key); err != nil {
			t.Fatal(err)
		}
		r.retire(begun)
		r.retire(gone)
		cull()
		time.Sleep(time.Minute)
		r.wantCached(begun, false, "its culling was begun")
		r.wantCached(other, true, "nobody wants its room")
		for _, b := range []*testBlob{begun, gone} {
			if o, err := r.d.state.Object(b.key.Domain, b.key.ID); err != nil || o.ID != "" {
				t.Errorf("%s is on record still: %+v, %v", b.key, o, err)
			}
		}
		defer r.mount(nil, begun)()
		r.readAll(begun)
	})
}

// An image that is mounted again while it is on record as being culled is not culled, then or later.
func TestMountEndsACullingThatWasBegun(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r, cull := tightRig(t, mode, nil)
		defer r.close()
		b := blobOf("aa", 1)
		r.leave(b, time.Now())
		r.retire(b)
		unmount := r.mount(nil, b)
		r.readAll(b)
		cull()
		time.Sleep(time.Minute)
		r.readAll(b)
		unmount()
		if o, err := r.d.state.Object(b.key.Domain, b.key.ID); err != nil || o.Removing {
			t.Errorf("on record: %+v, %v", o, err)
		}
	})
}

func TestPrefetchWaitsForRoom(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r, cull := tightRig(t, mode, nil)
		defer r.close()
		old, b := blobOf("old", 8), blobOf("new", 2)
		r.leave(old, time.Now())
		var g gate
		defer r.mount(&g, b)()
		o := r.object(b)
		done := make(chan error, 1)
		go func() { // ends with the prefetch
			done <- newPrefetch(r.d.filler, &g, 0).bring(t.Context(), o, span{0, o.table.Len()})
		}()
		time.Sleep(5 * time.Second)
		cull()
		if err := <-done; err != nil {
			t.Errorf("prefetch: %v", err)
		}
		if !o.has(span{0, o.table.Len()}) {
			t.Error("it is not all there")
		}
	})
}

func TestQuotasAndWatermarksOutOfRangeAreRefused(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"quota":      func(o *Options) { o.DomainQuota = map[string]int64{"d": -1} },
		"watermarks": func(o *Options) { o.Limits.Space = fscache.Watermarks{Run: 1, Cull: 2, Stop: 3} },
		"deadline":   func(o *Options) { o.SpaceDeadline = -1 },
	} {
		o := Options{Engine: &engine{}, Log: zap.NewNop(), Root: "/r", Socket: "/s"}
		change(&o)
		if err := o.complete(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
