package daemon

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
	"holdfast/rafs"
)

// partsRig is a rig with 10 MiB of room that culls parts of mounted objects.
func partsRig(t *testing.T, f func(r *rig, cull func())) {
	synctest.Test(t, func(t *testing.T) {
		r, cull := tightRig(t, simkernel.Fanotify, func(o *Options) { o.CullMounted, o.ReadAhead = true, 1 })
		defer r.close()
		f(r, cull)
	})
}

// bring fetches all of a blob as a prefetch does.
func (r *rig) bring(b *testBlob) {
	r.t.Helper()
	o := r.object(b)
	if err := newPrefetch(r.d.filler, &gate{}, 0).bring(r.t.Context(), o, span{0, o.table.Len()}); err != nil {
		r.t.Fatal(err)
	}
	o.completing.Wait()
}

// there is what the cache file of a blob holds, in MiB.
func (r *rig) there(b *testBlob) (list [][2]int64) {
	r.t.Helper()
	extents, err := r.e.Present(b.key)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, x := range extents {
		list = append(list, [2]int64{x.Off / mib, (x.Off + x.Len) / mib})
	}
	return list
}

func TestUnreadPartsOfMountedObjectsAreCulledLast(t *testing.T) {
	partsRig(t, func(r *rig, cull func()) {
		old, b, c := blobOf("old", 2), blobOf("bb", 5), blobOf("cc", 4)
		r.leave(old, time.Now())
		defer r.mount(nil, b)()
		defer r.mount(nil, c)()
		r.bring(b)
		r.wantOK(b, 0, mib)
		r.wantOK(b, 3*mib+4096, mib) // chunks 3 and 4
		cull()
		r.wantOK(c, 0, mib/2)
		r.wantOK(c, mib, mib/2)
		time.Sleep(time.Minute)
		r.wantCached(old, false, "it is not mounted")
		if got := r.there(b); len(got) != 1 || got[0] != [2]int64{0, 5} {
			r.t.Errorf("of the mounted one MiB %v are left, though there was an unmounted one", got)
		}
		r.wantOK(c, 2*mib, mib/2)
		r.wantOK(c, 3*mib, mib/2)
		time.Sleep(time.Minute)
		if got := r.there(b); len(got) != 2 || got[0] != [2]int64{0, 1} || got[1] != [2]int64{3, 5} {
			r.t.Errorf("MiB %v are left, want those that were read: 0 to 1, 3 to 5", got)
		}
		if got := r.there(c); len(got) != 1 || got[0] != [2]int64{0, 4} {
			r.t.Errorf("of what was read MiB %v are left, want 0 to 4", got)
		}
		if s := r.d.status().Space; s.Culled != 1 || s.Parts != 2*mib {
			r.t.Errorf("%d objects and %d bytes of mounted ones culled, want 1 and 2 MiB", s.Culled, s.Parts)
		}
		r.readAll(b)
	})
}

func TestNothingOfMountedObjectsIsCulledUnasked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, cull := tightRig(t, simkernel.Fanotify, nil)
		defer r.close()
		b := blobOf("bb", 9)
		defer r.mount(nil, b)()
		r.bring(b)
		cull()
		time.Sleep(time.Minute)
		if got := r.there(b); len(got) != 1 || got[0] != [2]int64{0, 9} {
			t.Errorf("MiB %v are left", got)
		}
	})
}

// The kernel has to ask about what may become a hole (I1), and need not about what cannot.
func TestKernelAsksAboutCompleteObjectsWhosePartsMayBeCulled(t *testing.T) {
	partsRig(t, func(r *rig, _ func()) {
		a, b := blobOf("aa", 2), blobOf("bb", 2)
		defer r.mount(nil, a)()
		defer r.mount(nil, b)()
		r.bring(a)
		if kept, err := r.object(a).kept(); !kept || r.e.complete[a.key] != 0 {
			r.t.Errorf("prefetched and not read: synced %v (%v), left to the kernel %d times, want synced and not left to it", kept, err, r.e.complete[a.key])
		}
		r.wantOK(b, 0, mib)
		r.wantOK(b, mib, mib)
		synctest.Wait()
		if kept, err := r.object(b).kept(); !kept || r.e.complete[b.key] != 1 {
			r.t.Errorf("all read: synced %v (%v), left to the kernel %d times, want once", kept, err, r.e.complete[b.key])
		}
		r.wantOK(a, mib, mib)
		r.wantOK(a, 0, mib)
		synctest.Wait()
		if r.e.complete[a.key] != 1 {
			r.t.Errorf("all read after it was prefetched: left to the kernel %d times, want once", r.e.complete[a.key])
		}
	})
}

// What this process did not put there another one may have given to readers, who may not have copied it yet (I1).
func TestWhatAnotherProcessCachedIsNotCulledUnderAMount(t *testing.T) {
	partsRig(t, func(r *rig, cull func()) {
		b := blobOf("bb", 4)
		unmount := r.mount(nil, b)
		r.bring(b)
		unmount()
		defer r.mount(nil, b)()
		cull()
		r.d.room.full()
		time.Sleep(time.Minute)
		if got := r.there(b); len(got) != 1 || got[0] != [2]int64{0, 4} {
			r.t.Errorf("MiB %v are left", got)
		}
	})
}

func TestReaderOfWhatIsBeingCulledWaitsForTheHole(t *testing.T) {
	partsRig(t, func(r *rig, _ func()) {
		b := blobOf("bb", 1)
		defer r.mount(nil, b)()
		r.bring(b)
		done := make(chan error, 1)
		r.e.dropping = func() {
			go func() { done <- r.read(b, 0, mib) }() // ends with the read
			synctest.Wait()
			select {
			case err := <-done:
				r.t.Errorf("the reader did not wait: %v", err)
			default:
			}
		}
		if !r.d.cullPart(r.object(b)) {
			r.t.Error("nothing was culled")
		}
		if err := <-done; err != nil {
			r.t.Error(err)
		}
		r.wantCached(b, true, "it was fetched for the reader")
	})
}

// Readers come at any time: before the holes are made, while they are, and after.
func TestReadersOfWhatIsBeingCulledGetTheirBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, simkernel.Fanotify, func(o *Options) { o.CullMounted = true })
		defer r.close()
		b := newBlob("bb", 1, rafs.CodecZstd, many(512, 16*kib)...)
		defer r.mount(nil, b)()
		o := r.object(b)
		holes := 0
		for round := range 20 {
			var wg sync.WaitGroup
			for i := range 8 {
				rng := rand.New(rand.NewPCG(uint64(round), uint64(i)))
				wg.Go(func() {
					n := 1 + rng.Int64N(64*kib)
					r.wantOK(b, rng.Int64N(o.size()-n), n)
				})
			}
			wg.Go(func() {
				for range 10 {
					if r.d.cullPart(o) {
						holes++
					}
				}
			})
			wg.Wait()
			r.bring(b)
		}
		if holes == 0 {
			t.Error("nothing was culled")
		}
		r.readAll(b)
	})
}

// Whoever waits for holdfast prefetch is told that it will not come, rather than waiting for ever.
func TestPrefetchWhosePartsWereCulledHasFailed(t *testing.T) {
	partsRig(t, func(r *rig, _ func()) {
		b := blobOf("bb", 2)
		defer r.mount(nil, b)()
		r.bring(b)
		m := &mount{blobs: []*hold{{o: r.object(b)}}}
		if p := r.d.prefetchInfo([]*mount{m}); !p.Done || p.Failed != "" {
			r.t.Fatalf("%+v", p)
		}
		if !r.d.cullPart(r.object(b)) {
			r.t.Fatal("nothing was culled")
		}
		if p := r.d.prefetchInfo([]*mount{m}); p.Done || p.Failed == "" {
			r.t.Errorf("%+v", p)
		}
	})
}

func TestCullingOfMountedObjectsIsRefusedWhereTheKernelDoesNotAsk(t *testing.T) {
	for mode, want := range map[simkernel.Mode]bool{simkernel.Cachefiles: false, simkernel.Fanotify: true} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, mode, nil)
			defer r.close()
			o := r.d.opt
			o.CullMounted = true
			if err := o.complete(); (err == nil) != want {
				t.Errorf("engine %s: %v", r.e.Name(), err)
			}
		})
	}
}

// partsHost is a simulated host with an image that was brought in and read by nobody, whose daemon culls parts.
func partsHost(t *testing.T, f func(h *simHost, im simImage, dir string)) {
	t.Setenv("GOMEMLIMIT", "off")
	images := simImages(t, 2)
	base := shmDir(t)
	dir := filepath.Join(base, "mnt")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		h := newSimHost(simkernel.Fanotify, base, t.Fatalf)
		h.others = images[1:]
		h.change = func(o *Options) { o.CullMounted, o.Prefetch, o.ReadAhead = true, true, 1 }
		defer h.end()
		h.boot(0)
		h.mount(images[0], dir)
		time.Sleep(time.Second)
		synctest.Wait()
		f(h, images[0], dir)
	})
}

// cullParts culls what it can, and says in how many steps.
func (l *life) cullParts() (n int) {
	for _, o := range l.d.objects.all() {
		for l.d.cullPart(o) {
			n++
		}
	}
	return n
}

func TestUpgradeThatFailsLeavesTheKernelAskingAboutWhatMayBeCulled(t *testing.T) {
	partsHost(t, func(h *simHost, im simImage, dir string) {
		h.freezeError = errors.New("it will not")
		if err := h.upgrade()(); err == nil {
			h.fail("upgraded")
		}
		h.freezeError = nil
		synctest.Wait()
		if h.running().cullParts() == 0 {
			h.fail("nothing was culled")
		}
		if v := h.kernel.Violations(); len(v) > 0 {
			h.fail("%s", v[0])
		}
		h.served(im, dir)
	})
}

// What a successor did not put there its predecessor may have given to readers.
func TestSuccessorCullsNothingItFound(t *testing.T) {
	partsHost(t, func(h *simHost, im simImage, dir string) {
		if err := h.upgrade()(); err != nil {
			h.fail("upgrade: %v", err)
		}
		synctest.Wait()
		if n := h.running().cullParts(); n > 0 {
			h.fail("parts were culled in %d steps", n)
		}
		h.served(im, dir)
	})
}

func TestSuccessorCullsNothingWhileItsPredecessorWrites(t *testing.T) {
	partsRig(t, func(r *rig, _ func()) {
		b := blobOf("bb", 2)
		defer r.mount(nil, b)()
		o := r.object(b)
		r.d.unsettled.Store(true)
		if err := newPrefetch(r.d.filler, &gate{}, 0).bring(r.t.Context(), o, span{0, 1}); err != nil {
			r.t.Fatal(err)
		}
		if r.d.cullPart(o) {
			r.t.Error("culled")
		}
		r.bring(b)
		if r.e.complete[b.key] != 0 || r.e.synced[b.key] != 0 {
			r.t.Error("synced, or left to the kernel")
		}
	})
}

// What a reader waits for is not taken away to make room for the rest of it.
func TestWhatAReaderWaitsForIsNotCulled(t *testing.T) {
	o := newObject(fscache.Key{Domain: "d", ID: "o"}, blobOf("bb", 3).table, "", 1)
	if there, _ := o.give(span{0, 2}); there {
		t.Fatal("present")
	}
	o.claim(span{0, 3}, 0)
	o.mark(span{0, 1}, o.current(), span{0, 2})
	o.mark(span{2, 3}, o.current(), span{})
	o.abandon(span{1, 2}, errAbandoned)
	if spans, _ := o.retract(1 << 30); len(spans) != 1 || spans[0] != (span{2, 3}) {
		t.Errorf("%v is culled, want 2 to 3", spans)
	}
}

// The kernel would not be asked about the holes (I1), and what is fetched again is not what was synced (I5).
func TestSyncBegunBeforePartsWereCulledProvesNothing(t *testing.T) {
	for again := range 2 {
		o := newObject(fscache.Key{Domain: "d", ID: "o"}, blobOf("bb", 2).table, "", 1)
		o.claim(span{0, 2}, 0)
		o.mark(span{0, 2}, o.current(), span{})
		changes := o.changed()
		if o.synced(changes, nil, true) {
			t.Fatal("nobody has read anything, and the object is to be left to the kernel")
		}
		if spans, _ := o.retract(1 << 30); len(spans) != 1 {
			t.Fatalf("%v is culled, want all", spans)
		}
		o.abandon(span{0, 2}, errAbandoned)
		o.give(span{0, 2})
		if again == 1 {
			o.claim(span{0, 2}, 0)
			o.mark(span{0, 2}, o.current(), span{})
		}
		if o.synced(changes, nil, true) {
			t.Errorf("left to the kernel with %d chunks missing, fetched again: %v", o.missing, again == 1)
		}
		if kept, err := o.kept(); kept || err != nil {
			t.Errorf("synced: %v, %v", kept, err)
		}
	}
}

// A failed sync is not tried again: what it lost cannot be known.
func TestPartsOfAnObjectThatWasNotSyncedAreNotCulled(t *testing.T) {
	o := newObject(fscache.Key{Domain: "d", ID: "o"}, blobOf("bb", 1).table, "", 1)
	o.mark(span{0, 1}, o.current(), span{})
	o.synced(o.changed(), errors.New("input/output error"), true)
	if spans, _ := o.retract(1 << 30); len(spans) > 0 {
		t.Errorf("%v is culled", spans)
	}
}

// An idle daemon whose supervisor does not wake it ends only if the kernel asks about nothing.
func TestObjectWhosePartsMayBeCulledNeedsADaemon(t *testing.T) {
	partsRig(t, func(r *rig, _ func()) {
		b := blobOf("bb", 1)
		defer r.mount(nil, b)()
		r.bring(b)
		if o := r.object(b); !o.busyOrAsked(false) || o.busyOrAsked(true) {
			r.t.Error("complete, not left to the kernel, and taken for needing nobody; or for being busy")
		}
	})
}

func TestWhatPrefetchWasAskedForIsNotCulled(t *testing.T) {
	partsHost(t, func(h *simHost, _ simImage, dir string) {
		l := h.running()
		m, err := l.d.named(PrefetchRequest{Dir: dir})
		if err == nil {
			err = l.d.hurry(m[0])
		}
		if err != nil {
			h.fail("%v", err)
		}
		synctest.Wait()
		if n := l.cullParts(); n > 0 {
			h.fail("parts were culled in %d steps", n)
		}
	})
}

func TestCheckDoesNotTakeCulledChunksForWrongBytes(t *testing.T) {
	partsRig(t, func(r *rig, _ func()) {
		b := blobOf("bb", 1)
		defer r.mount(nil, b)()
		r.bring(b)
		o := r.object(b)
		if !r.d.cullPart(o) {
			r.t.Fatal("nothing was culled")
		}
		if bad, err := r.d.checkChunk(r.t.Context(), o, 0, false); bad != nil || err != nil {
			r.t.Errorf("%+v, %v", bad, err)
		}
	})
}
