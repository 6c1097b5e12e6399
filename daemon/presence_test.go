package daemon

import (
	"context"
	"errors"
	"slices"
	"testing"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
	"holdfast/rafs"
)

func TestImagesThatDisagreeAboutABlobDoNotShareIt(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, nil)
		defer r.close()
		b, forged := newBlob("aa", 1, rafs.CodecNone, mib), newBlob("aa", 2, rafs.CodecNone, mib)
		unmount := r.mount(nil, b)
		if _, err := r.d.hold(t.Context(), forged.key, forged.table, forged, &gate{}); !errors.Is(err, errConflict) {
			t.Errorf("a second description of a mounted blob: %v, want errConflict", err)
		}
		r.wantOK(b, 0, mib)
		unmount()
		// What the first one cached is not the second one's either.
		if mode == simkernel.Cachefiles {
			if _, err := r.d.hold(t.Context(), forged.key, forged.table, forged, &gate{}); !errors.Is(err, errConflict) {
				t.Errorf("a second description of a blob whose cache cannot be read back: %v, want errConflict", err)
			}
			return
		}
		defer r.mount(nil, forged)()
		r.wantOK(forged, 0, mib)
	})
}

// tamper writes to a blob's cache file as no daemon would.
func tamper(t *testing.T, k *simkernel.Kernel, b *testBlob, p []byte, off int64) {
	t.Helper()
	e, err := k.Open()
	if err != nil {
		t.Fatal(err)
	}
	o := fscache.Object{Key: b.key, Size: int64(b.table.Size())}
	if err := errors.Join(e.Add(context.Background(), o), e.WriteAt(b.key, p, off), e.Remove(b.key), e.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestPresenceOfThisBootIsTrusted(t *testing.T) {
	root, k := t.TempDir(), simkernel.New(simkernel.Fanotify)
	ahead := func(o *Options) { o.ReadAhead = 64 * kib }
	b := newBlob("aa", 1, rafs.CodecNone, many(4, 64*kib)...)
	r := rigOver(t, k, root, ahead)
	unmount := r.mount(nil, b)
	r.wantOK(b, 0, 64*kib)
	unmount()
	r.close()
	tamper(t, k, b, make([]byte, 4*kib), 64*kib+4*kib) // one block of chunk 1, as a torn write leaves it
	r = rigOver(t, k, root, ahead)
	defer r.close()
	r.e.read = func() error { return errors.New("nothing is to be read back") }
	defer r.mount(nil, b)()
	b.asked()
	r.wantOK(b, 0, 64*kib)
	if n := len(b.asked()); n != 0 {
		t.Errorf("%d fetches for what was cached before the restart", n)
	}
	r.wantOK(b, 64*kib, 64*kib)
	if n := len(b.asked()); n != 1 {
		t.Errorf("%d fetches for a chunk of which one block was cached, want 1", n)
	}
}

func TestPresenceOfAnotherBootIsCheckedByDigest(t *testing.T) {
	root, k := t.TempDir(), simkernel.New(simkernel.Fanotify)
	b := newBlob("aa", 1, rafs.CodecNone, append(many(4, 64*kib), 100, 0)...)
	r := rigOver(t, k, root, nil)
	r.d.boot = "another boot"
	unmount := r.mount(nil, b)
	r.wantOK(b, 0, int64(len(b.want)))
	unmount()
	r.close()
	tamper(t, k, b, make([]byte, 4*kib), 2*64*kib) // chunk 2: zeros where data was
	padded := slices.Clone(b.want[4*64*kib : 4*64*kib+4*kib])
	padded[4000] = 1
	tamper(t, k, b, padded, 4*64*kib) // the padding of the short chunk
	r = rigOver(t, k, root, func(o *Options) { o.ReadAhead = 1 })
	defer r.close()
	defer r.mount(nil, b)()
	if r.e.dropped != 2 {
		t.Errorf("%d chunks dropped, want the 2 damaged ones", r.e.dropped)
	}
	b.asked()
	r.wantOK(b, 0, int64(len(b.want)))
	if asked := b.asked(); !slices.Equal(asked, [][2]int64{{2 * 64 * kib, 64 * kib}, {4 * 64 * kib, 100}}) {
		t.Errorf("fetched %v, want the damaged chunks only", asked)
	}
}

func TestCheckThatCouldNotBeMadeIsNotTakenAsMade(t *testing.T) {
	root, k := t.TempDir(), simkernel.New(simkernel.Fanotify)
	b := newBlob("aa", 1, rafs.CodecNone, mib)
	r := rigOver(t, k, root, nil)
	r.d.boot = "another boot"
	unmount := r.mount(nil, b)
	r.wantOK(b, 0, mib)
	unmount()
	r.close()
	tamper(t, k, b, make([]byte, 4*kib), 0)
	for range 2 {
		r = rigOver(t, k, root, nil)
		r.e.read = func() error { return fscache.ErrNotOpen }
		unmount = r.mount(nil, b)
		if n := r.object(b).missing; n != 1 {
			t.Errorf("%d chunks missing, want the one that could not be checked", n)
		}
		unmount()
		r.close()
	}
}
