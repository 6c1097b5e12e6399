package daemon

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
	"holdfast/rafs"
	"holdfast/rafs/source"
)

// rot makes the cache hold other bytes of chunk i than were written.
func rot(t *testing.T, d *Daemon, o *object, i int) {
	t.Helper()
	off, _ := o.at(i)
	if err := d.engine.WriteAt(o.key, make([]byte, fscache.BlockSize), off); err != nil {
		t.Fatal(err)
	}
}

func TestRottenChunksAreFoundAndRepairedInPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, simkernel.Fanotify, func(o *Options) { o.ReadAhead = mib })
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecZstd, many(8, 64*kib)...)
		defer r.mount(nil, b)()
		r.wantOK(b, 0, 512*kib)
		synctest.Wait() // it is complete, and its mark is gone
		o := r.object(b)
		rot(t, r.d, o, 2)
		rot(t, r.d, o, 5)
		report, err := r.d.checkCache(t.Context(), "", false)
		if err != nil || report.Bad != 2 || report.Repaired != 0 {
			t.Fatalf("%+v, %v: want two bad chunks", report, err)
		}
		i := slices.IndexFunc(report.Objects, func(c CheckedObject) bool { return c.ID == "aa" })
		if c := report.Objects[i]; c.Chunks != 8 || c.Bytes != 512*kib || len(c.Bad) != 2 || c.Bad[0].Offset != 2*64*kib || c.Bad[1].Offset != 5*64*kib || c.Bad[1].Bytes != 64*kib {
			t.Errorf("found %+v", c)
		}
		b.asked()
		if report, err = r.d.checkCache(t.Context(), "", true); err != nil || report.Repaired != 2 {
			t.Fatalf("repair: %+v, %v", report, err)
		}
		if n := len(b.asked()); n != 2 {
			t.Errorf("the source was asked %d times, want for the two chunks", n)
		}
		if r.e.dropped != 0 || !o.has(span{0, 8}) {
			t.Error("a hole was made under readers that nobody is asked about")
		}
		r.wantOK(b, 0, 512*kib)
		if report, err = r.d.checkCache(t.Context(), "", false); err != nil || report.Bad != 0 {
			t.Errorf("after the repair: %+v, %v", report, err)
		}
	})
}

func TestWhatCannotBeRepairedIsLeftAndTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, simkernel.Fanotify, func(o *Options) { o.ReadAhead = mib })
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecNone, many(4, 64*kib)...)
		defer r.mount(nil, b)()
		r.wantOK(b, 0, 256*kib)
		synctest.Wait()
		o := r.object(b)
		rot(t, r.d, o, 1)
		b.stored[64*kib]++ // the source has rotted too
		report, err := r.d.checkCache(t.Context(), "", true)
		if err != nil || report.Bad != 1 || report.Repaired != 0 {
			t.Fatalf("%+v, %v: want one that is not repaired", report, err)
		}
		i := slices.IndexFunc(report.Objects, func(c CheckedObject) bool { return len(c.Bad) > 0 })
		if x := report.Objects[i].Bad[0]; x.Failed == "" || x.Repaired {
			t.Errorf("%+v, want why", x)
		}
		got := make([]byte, fscache.BlockSize)
		if err := r.d.engine.ReadAt(o.key, got, 64*kib); err != nil || slices.ContainsFunc(got, func(b byte) bool { return b != 0 }) || !o.has(span{0, 4}) {
			t.Errorf("wrong bytes were written over wrong bytes (%v)", err)
		}
		gone := source.Permanent(errors.New("no such blob"))
		b.setBefore(refuse(gone))
		report, err = r.d.checkCache(t.Context(), "", true)
		if err != nil || report.Repaired != 0 || !strings.Contains(report.Objects[i].Bad[0].Failed, gone.Error()) {
			t.Errorf("%+v, %v: want what the source says", report, err)
		}
	})
}

func TestAnEngineThatCannotReadBackSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, simkernel.Cachefiles, func(o *Options) { o.ReadAhead = mib })
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecNone, many(4, 64*kib)...)
		defer r.mount(nil, b)()
		r.wantOK(b, 0, 256*kib)
		report, err := r.d.checkCache(t.Context(), "", false)
		if err != nil || len(report.Objects) == 0 || slices.ContainsFunc(report.Objects, func(c CheckedObject) bool { return c.Unchecked == "" }) {
			t.Errorf("%+v, %v: want each object unchecked and why", report, err)
		}
	})
}

func TestAnImageThatIsNotMountedIsCheckedInAllItsDomains(t *testing.T) {
	im := layeredImages(t, []int{1, 2})[0]
	c := newCollector(t, simkernel.New(simkernel.Fanotify), t.TempDir())
	defer c.close()
	for _, domain := range []string{"d", "e"} {
		_, unmount := c.mounted(im, domain)
		unmount()
	}
	list, done, err := c.toCheck(t.Context(), im.ref)
	if err != nil || len(list) != 4 {
		t.Fatalf("%d objects, %v: want two in each of two domains", len(list), err)
	}
	rot(t, c.Daemon, list[3], 0)
	if err := done(); err != nil {
		t.Fatal(err)
	}
	report, err := c.checkCache(t.Context(), im.digest, true)
	if err != nil || report.Bad != 1 || report.Repaired != 1 || len(report.Objects) != 4 {
		t.Errorf("%+v, %v", report, err)
	}
	if n := len(c.objects.all()); n != 0 || !c.mounts.empty() {
		t.Errorf("%d objects are still held", n)
	}
	var e *Error
	if _, err := c.checkCache(t.Context(), "oci:/nowhere:x", false); !errors.As(err, &e) || e.Code != CodeNotFound {
		t.Errorf("check of an image that is not on record: %v", err)
	}
}

func TestScrubberFindsWhatRotsAndKeepsToItsRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, simkernel.Fanotify, func(o *Options) { o.ReadAhead, o.ScrubRate = mib, 64*kib })
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecNone, many(64, 64*kib)...)
		defer r.mount(nil, b)()
		r.wantOK(b, 0, 4*mib)
		synctest.Wait()
		rot(t, r.d, r.object(b), 60)
		ctx, cancel := context.WithCancel(t.Context())
		var scrubbing sync.WaitGroup
		scrubbing.Go(func() { r.d.scrub(ctx) })
		time.Sleep(30 * time.Second) // the first mebibyte is free, then one chunk a second
		synctest.Wait()
		if s := r.d.status().Scrub; s.Chunks < 40 || s.Chunks > 48 || s.Bad != 0 {
			t.Errorf("after half a minute: %+v", s)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if s := r.d.status().Scrub; s.Bad != 1 || s.Passes != 1 || s.Last.IsZero() {
			t.Errorf("after a pass: %+v, want the rotten chunk found", s)
		}
		cancel()
		scrubbing.Wait()
	})
}
