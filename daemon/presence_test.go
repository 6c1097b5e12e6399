package daemon

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
	"holdfast/rafs"
	"holdfast/rafs/image"
	"holdfast/state"
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

func TestPrefetchFetchesNothingThatAnOpenIsAboutToFind(t *testing.T) {
	r := newRig(t, simkernel.Cachefiles, nil)
	defer r.close()
	b := newBlob("aa", 1, rafs.CodecNone, many(4, 64*kib)...)
	unmount := r.mount(nil, b)
	r.wantOK(b, 0, int64(len(b.want)))
	unmount()
	b.asked()
	looked, look := make(chan struct{}), make(chan struct{})
	r.e.present = func(k fscache.Key) {
		o := r.d.objects.get(k)
		if k != b.key || o == nil {
			return
		}
		o.mu.Lock()
		opened := o.finding != nil
		o.mu.Unlock()
		if opened {
			close(looked)
			<-look
		}
	}
	defer r.mount(nil, b)()
	<-looked
	done := make(chan error, 1)
	go func() { // ends when it was found that all is there
		done <- newPrefetch(r.d.filler, &gate{}, 0).run(t.Context(), []image.Range{{Blob: 0, Off: 0, Len: uint64(len(b.want))}}, []*object{r.object(b)})
	}()
	time.Sleep(50 * time.Millisecond) // in which one that does not wait fetches
	close(look)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := len(b.asked()); n != 0 {
		t.Errorf("%d fetches of what the file had", n)
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

func TestWrongBytesUnderAnOfflineMountAreNotMadeAHole(t *testing.T) {
	root, k := t.TempDir(), simkernel.New(simkernel.Fanotify)
	b := newBlob("aa", 1, rafs.CodecNone, many(4, 64*kib)...)
	r := rigOver(t, k, root, nil)
	r.d.boot = "another boot"
	unmount := r.mount(nil, b)
	r.wantOK(b, 0, 4*64*kib)
	unmount()
	r.close()
	tamper(t, k, b, make([]byte, 4*kib), 64*kib)
	r = rigOver(t, k, root, nil)
	defer r.close()
	// What its image is cannot be told any more: it may use anything of its domain.
	m := state.Mount{ID: "m1", Image: "sha256:" + strings.Repeat("0", 64), Dir: "/mnt/x", Domain: b.key.Domain, Boot: r.d.boot, Stage: state.StageOffline}
	if err := r.d.state.UpdateMount(m); err != nil {
		t.Fatal(err)
	}
	_, err := r.d.hold(t.Context(), b.key, b.table, b, &gate{})
	if !errors.Is(err, errConflict) || !strings.Contains(err.Error(), m.Dir) || r.e.dropped != 0 {
		t.Errorf("%v, %d chunks dropped; want errConflict that names %s, and none", err, r.e.dropped, m.Dir)
	}
	if err := r.d.state.ForgetMount(m.ID); err != nil {
		t.Fatal(err)
	}
	defer r.mount(nil, b)()
	if r.e.dropped != 1 {
		t.Errorf("%d chunks dropped once it is gone, want the wrong one", r.e.dropped)
	}
}

func TestOfflineMountsOnRecordAreLeftAloneAndGoWithTheirBoot(t *testing.T) {
	root, k := t.TempDir(), simkernel.New(simkernel.Fanotify)
	r := rigOver(t, k, root, nil)
	boot := r.d.boot
	for _, m := range []state.Mount{{ID: "m1", Dir: "/mnt/x", Boot: boot, Stage: state.StageOffline}, {ID: "m2", Dir: "/mnt/y", Boot: "another boot", Stage: state.StageOffline}} {
		if err := r.d.state.UpdateMount(m); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.d.restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer r.close()
	got, err := r.d.state.Mounts()
	if err != nil || len(got) != 1 || got[0].ID != "m1" || !r.d.mounts.empty() || len(r.d.earlier) != 0 {
		t.Errorf("after restore: %+v on record (%v), the table empty: %v, to be mounted again: %+v; want m1 on record and nothing else", got, err, r.d.mounts.empty(), r.d.earlier)
	}
}

func TestOfflineMountIsNotTakenForWhatWasOnItsDirectoryBefore(t *testing.T) {
	root, k := t.TempDir(), simkernel.New(simkernel.Fanotify)
	for name, fresh := range map[string]bool{"under the same lifeline": false, "under another": true} {
		t.Run(name, func(t *testing.T) {
			r := rigOver(t, k, root, func(o *Options) { o.Fresh, o.Bereft = fresh, fresh })
			defer r.close()
			const dir = "/mnt/x"
			r.d.mountPoints = func() (map[string]string, error) { return map[string]string{dir: fsType}, nil }
			before := state.Mount{ID: "m1", Image: "sha256:" + strings.Repeat("0", 64), Dir: dir, Boot: r.d.boot, Created: time.Unix(1, 0)}
			offline := state.Mount{ID: "m2", Dir: dir, Boot: r.d.boot, Created: time.Unix(2, 0), Stage: state.StageOffline}
			if err := errors.Join(r.d.state.UpdateMount(before), r.d.state.UpdateMount(offline)); err != nil {
				t.Fatal(err)
			}
			if err := r.d.restore(t.Context()); err != nil {
				t.Fatal(err)
			}
			got, err := r.d.state.Mounts()
			if err != nil || len(got) != 1 || got[0].ID != "m2" || !r.d.mounts.empty() || (len(r.d.lost) != 0) != fresh {
				t.Errorf("on record: %+v (%v), the table empty: %v, lost: %v; want the one without a daemon on record, and the other lost only under another lifeline",
					got, err, r.d.mounts.empty(), r.d.lost)
			}
		})
	}
}
