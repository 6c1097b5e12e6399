package fanotify_test

import (
	"os"
	"testing"

	"go.uber.org/zap/zaptest"

	"holdfast/fscache"
	"holdfast/fscache/enginetest"
	"holdfast/fscache/fanotify"
)

func TestConformance(t *testing.T) {
	enginetest.Run(t, func(t *testing.T) enginetest.Harness { return harness(t.TempDir()) })
}

func TestConformanceOnXFS(t *testing.T) {
	mnt := fanotify.MountXFS(t, 0)
	enginetest.Run(t, func(t *testing.T) enginetest.Harness {
		dir, err := os.MkdirTemp(mnt, "")
		if err != nil {
			t.Fatal(err)
		}
		return harness(dir)
	})
}

// harness has the engine's cache in a directory.
func harness(dir string) enginetest.Harness {
	return enginetest.Harness{
		Open: func(t testing.TB, left fscache.Inherited, inbox fscache.Inbox, holder fscache.Holder) fscache.Engine {
			t.Helper()
			e, err := fanotify.Open(fanotify.Config{Dir: dir, Inherited: left, Inbox: inbox, Holder: holder, Log: zaptest.NewLogger(t)})
			if err != nil {
				t.Fatal(err)
			}
			return e
		},
		Readers:     enginetest.RealReaders{},
		Successor:   enginetest.Replays,
		Upgrades:    true,
		AfterMounts: enginetest.DetachMount,
	}
}

// Two objects with the same bytes take the space of one.
func TestSharedExtentsTakeNoSpace(t *testing.T) {
	dir := fanotify.MountXFS(t, 0)
	h := harness(dir)
	e := h.Open(t, fscache.Inherited{}, nil, nil)
	defer e.Close()
	const size = 40 << 20 // more than the kernel does at a time
	a, b := fscache.Object{Key: fscache.Key{Domain: "d", ID: "a"}, Size: size}, fscache.Object{Key: fscache.Key{Domain: "d", ID: "b"}, Size: size}
	data := fscache.AlignedBuffer(size)
	for i := range data {
		data[i] = byte(i >> 12 % 251)
	}
	for _, o := range []fscache.Object{a, b} {
		if err := e.Add(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		if err := e.WriteAt(o.Key, data, 0); err != nil {
			t.Fatal(err)
		}
		if err := e.Sync(o.Key); err != nil {
			t.Fatal(err)
		}
	}
	before, err := e.Space()
	if err != nil {
		t.Fatal(err)
	}
	if n, err := e.Share(b.Key, fscache.Extent{Len: size}, a.Key, 0); err != nil || n != size {
		t.Fatalf("Share: %d bytes, %v", n, err)
	}
	after, err := e.Space()
	if err != nil {
		t.Fatal(err)
	}
	if won := after.Free - before.Free; won < size*9/10 {
		t.Errorf("sharing %d bytes freed %d", size, won)
	}
}
