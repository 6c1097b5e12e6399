package fanotify

import (
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

func TestHeldDescriptorWritesBeforeTheFirstEvent(t *testing.T) {
	a := blobOf("a", 16)
	p := begin(t, a)
	p.open(p.end(), a)
	if err := p.e.WriteAt(a.Key, pageOf(a.Key, 0), 0); err != nil {
		t.Fatal(err)
	}
	done := p.read(a.Key, 0)
	p.answer(p.next(), fscache.OK)
	if err := await(t, done); err != nil {
		t.Error(err)
	}
}

func TestHeldDescriptorOfAnotherFileIsNotUsed(t *testing.T) {
	a, b := blobOf("a", 16), blobOf("b", 16)
	p := begin(t, a, b)
	left := p.end()
	for i := range left.Objects { // swapped
		if k := &left.Objects[i].Object.Key; *k == a.Key {
			*k = b.Key
		} else {
			*k = a.Key
		}
	}
	p.open(left, a, b)
	if err := p.e.WriteAt(a.Key, pageOf(a.Key, 0), 0); !errors.Is(err, fscache.ErrNotOpen) {
		t.Errorf("WriteAt: %v, want ErrNotOpen", err)
	}
	if held, err := p.store.Held(); err != nil || len(held) != 0 {
		t.Errorf("still held: %v, %v", held, err)
	} else {
		closeHeld(held)
	}
	// An event brings one, and that is held.
	done := p.read(a.Key, 0)
	r := p.next()
	p.fill(r)
	p.answer(r, fscache.OK)
	if err := await(t, done); err != nil {
		t.Error(err)
	}
	p.open(p.end(), a, b)
	if err := p.e.WriteAt(a.Key, pageOf(a.Key, page), page); err != nil {
		t.Error(err)
	}
}

func TestHeldIsWhatHasAMark(t *testing.T) {
	a := blobOf("a", 4)
	p := begin(t, a)
	held := func() int {
		t.Helper()
		list, err := p.store.Held()
		if err != nil {
			t.Fatal(err)
		}
		closeHeld(list)
		return len(list)
	}
	if held() != 1 || len(p.e.Holding()) != 1 {
		t.Fatal("a marked object is not held")
	}
	for off := int64(0); off < a.Size; off += page {
		p.fill(fscache.Request{Object: a.Key, Off: off})
	}
	if err := p.e.Complete(a.Key); err != nil {
		t.Fatal(err)
	}
	if held() != 0 || len(p.e.Holding()) != 0 {
		t.Error("a complete object is held")
	}
	p.open(p.end(), a)
	if held() != 0 || p.e.objects[a.Key].marked.Load() {
		t.Error("a file without holes is held, or marked, though nothing mounts it")
	}
	if err := p.e.Complete(a.Key); err != nil {
		t.Fatal(err)
	}
	if err := p.e.Remove(a.Key); err != nil {
		t.Fatal(err)
	}
	p.open(p.end(), blobOf("b", 4))
	if err := p.e.Remove(blobOf("b", 4).Key); err != nil {
		t.Fatal(err)
	}
	if held() != 0 {
		t.Error("a removed object is held")
	}
}

type failingHolder struct{ err error }

func (h failingHolder) Hold(fscache.Held) error { return h.err }
func (failingHolder) Drop(fscache.Held)         {}

func TestWhatCannotBeHeldIsNotMarked(t *testing.T) {
	full := errors.New("the store is full")
	e := open(t, Config{Holder: failingHolder{full}})
	if err := e.Add(context.Background(), testObject); !errors.Is(err, full) {
		t.Errorf("Add: %v, want what the holder said", err)
	}
	marks, err := markedInodes(e.group)
	if err != nil || len(marks) != 0 {
		t.Errorf("marks: %v, %v", marks, err)
	}
	if _, err := e.object(testObject.Key); !errors.Is(err, fscache.ErrUnknown) {
		t.Errorf("the object is known: %v", err)
	}
}

// TestLeaseOfADeadProcessStopsNobody: a process may die while it asks for a lease, which a descriptor that is held keeps.
func TestLeaseOfADeadProcessStopsNobody(t *testing.T) {
	a := blobOf("a", 16)
	p := begin(t, a)
	left := p.end()
	err := control(left.Objects[0].File, func(fd int) error {
		_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	p.open(left, a)
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("taking over took %v: the lease was waited for", took)
	}
	if err := p.e.Remove(a.Key); err != nil {
		t.Error(err)
	}
}

// TestFileWithoutHolesIsMarkedByItsMountUnlessItIsComplete: what lies in the file may turn out wrong, and be dropped, until Complete says otherwise.
func TestFileWithoutHolesIsMarkedByItsMountUnlessItIsComplete(t *testing.T) {
	full := blobOf("full", 2)
	for _, complete := range []bool{false, true} {
		p := begin(t, full)
		for off := int64(0); off < full.Size; off += page {
			p.fill(fscache.Request{Object: full.Key, Off: off})
		}
		if err := p.e.Complete(full.Key); err != nil {
			t.Fatal(err)
		}
		p.open(p.end(), full)
		if complete {
			if err := p.e.Complete(full.Key); err != nil {
				t.Fatal(err)
			}
		}
		m := imageOf(t, full)
		if err := p.e.Mount(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		if marked := p.e.objects[full.Key].marked.Load(); marked == complete || len(p.e.Holding()) == 0 != complete {
			t.Errorf("complete: %v, marked: %v, held: %v", complete, marked, p.e.Holding())
		}
		if err := p.e.Unmount(t.Context(), m.Dir); err != nil {
			t.Error(err)
		}
	}
}
