package enginetest

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/fscache"
)

func closeUnblocksNext(t *testing.T, h Harness) {
	e := h.Open(t, fscache.Inherited{}, nil, nil)
	if _, f := e.Lifeline(); f != nil {
		f.Fd() // whoever gives the lifeline away may ask for its number: that must not make it block
	}
	ended := make(chan error, 3)
	for range cap(ended) {
		go func() { // ends with Close
			_, err := e.Next()
			ended <- err
		}()
	}
	select {
	case err := <-ended:
		t.Fatalf("Next returned without a request: %v", err)
	case <-time.After(shortly):
	}
	if err := e.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	for range cap(ended) {
		select {
		case err := <-ended:
			if !errors.Is(err, fscache.ErrClosed) {
				t.Errorf("Next: %v, want ErrClosed", err)
			}
		case <-time.After(patience):
			t.Fatal("Next did not return")
		}
	}
}

func closedEngineRefuses(t *testing.T, h Harness) {
	e := h.Open(t, fscache.Inherited{}, nil, nil)
	a := blob("d", "a")
	ctx := context.Background()
	if err := e.Add(ctx, a); err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		if err := e.Close(); err != nil {
			t.Errorf("Close number %d: %v", i+1, err)
		}
	}
	_, nextErr := e.Next()
	_, presentErr := e.Present(a.Key)
	for what, err := range map[string]error{
		"Next":     nextErr,
		"Present":  presentErr,
		"Add":      e.Add(ctx, blob("d", "b")),
		"Remove":   e.Remove(a.Key),
		"WriteAt":  e.WriteAt(a.Key, content(a.Key, 0, page), 0),
		"Complete": e.Complete(a.Key),
		"Sync":     e.Sync(a.Key),
		"Flush":    e.Flush(a.Key, fscache.Extent{Len: page}),
		"Answer":   e.Answer(fscache.Request{Op: fscache.OpRead, Object: a.Key, Len: page}, fscache.EIO),
	} {
		if !errors.Is(err, fscache.ErrClosed) {
			t.Errorf("%s: %v, want ErrClosed", what, err)
		}
	}
}

func addAgainChangesNothing(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a := blob("d", "a")
	dir := r.mount("image", a)
	done := r.read(dir, a.Key, 0, page)
	req := r.request()
	r.add(a)
	r.fill(req)
	r.get(done, a.Key, 0)
}

func addWithAnotherSizeFails(t *testing.T, h Harness) {
	r := newRig(t, h)
	a := blob("d", "a")
	r.add(a)
	a.Size += page
	if err := r.e.Add(context.Background(), a); err == nil {
		t.Error("Add with another size succeeded")
	}
}

func addRefusesBadNames(t *testing.T, h Harness) {
	r := newRig(t, h)
	for _, bad := range []string{"", ".", "..", "/", "a/b", "../a", "/etc/passwd", "a\x00b", strings.Repeat("n", 256)} {
		if err := r.e.Add(context.Background(), blob("d", bad)); err == nil {
			t.Errorf("Add of id %q succeeded", bad)
		}
		if err := r.e.Add(context.Background(), blob(bad, "a")); err == nil {
			t.Errorf("Add in domain %q succeeded", bad)
		}
	}
	for _, size := range []int64{0, -page, 1, page + 1} {
		o := fscache.Object{Key: fscache.Key{Domain: "d", ID: "s"}, Size: size}
		if err := r.e.Add(context.Background(), o); err == nil {
			t.Errorf("Add with size %d succeeded", size)
		}
	}
}

func unknownObjectIsRefused(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	k := fscache.Key{Domain: "d", ID: "nobody"}
	_, presentErr := r.e.Present(k)
	m := r.image("image", fscache.Object{Key: k, Size: blobSize})
	for what, err := range map[string]error{
		"Present":  presentErr,
		"Remove":   r.e.Remove(k),
		"WriteAt":  r.e.WriteAt(k, content(k, 0, page), 0),
		"Complete": r.e.Complete(k),
		"Sync":     r.e.Sync(k),
		"Flush":    r.e.Flush(k, fscache.Extent{Len: page}),
		"Mount":    r.e.Mount(context.Background(), m),
	} {
		if !errors.Is(err, fscache.ErrUnknown) {
			t.Errorf("%s: %v, want ErrUnknown", what, err)
		}
	}
}

func badWriteIsRefused(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a := blob("d", "a")
	r.mount("image", a)
	for _, at := range []struct{ off, n int64 }{
		{1, page}, {512, page}, {0, 100}, {-page, page}, {blobSize, page}, {blobSize - page, 2 * page}, {1<<63 - page, page},
	} {
		if err := r.e.WriteAt(a.Key, fscache.AlignedBuffer(int(at.n)), at.off); err == nil {
			t.Errorf("WriteAt of %d bytes at %d succeeded", at.n, at.off)
		}
	}
	if have, err := r.e.Present(a.Key); err != nil || len(have) != 0 {
		t.Errorf("Present after refused writes: %v, %v", have, err)
	}
}

func presentListsWhatWasWritten(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a := blob("d", "a")
	r.mount("image", a)
	if have, err := r.e.Present(a.Key); err != nil || len(have) != 0 {
		t.Fatalf("Present of an empty object: %v, %v", have, err)
	}
	r.write(a.Key, 16*page, 16*page)
	r.write(a.Key, 64*page, 32*page)
	r.write(a.Key, 32*page, 16*page)
	r.write(a.Key, blobSize-16*page, 16*page)
	want := []fscache.Extent{{Off: 16 * page, Len: 32 * page}, {Off: 64 * page, Len: 32 * page}, {Off: blobSize - 16*page, Len: 16 * page}}
	have, err := r.e.Present(a.Key)
	if err != nil || !slices.Equal(have, want) {
		t.Errorf("Present: %v, %v, want %v", have, err, want)
	}
	if err := r.e.Flush(a.Key, fscache.Extent{Off: 16 * page, Len: 32 * page}); err != nil {
		t.Errorf("Flush: %v", err)
	}
	if err := r.e.Sync(a.Key); err != nil {
		t.Errorf("Sync: %v", err)
	}
}

func readAtReturnsWhatWasWritten(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a := blob("d", "a")
	r.mount("image", a)
	r.write(a.Key, 4*page, page)
	p := make([]byte, 3*page)
	err := r.e.ReadAt(a.Key, p, 3*page)
	if errors.Is(err, errors.ErrUnsupported) {
		return // the engine says so: allowed
	}
	want := slices.Concat(make([]byte, page), content(a.Key, 4*page, page), make([]byte, page))
	if err != nil || !bytes.Equal(p, want) {
		t.Errorf("ReadAt: %v, right bytes: %v", err, bytes.Equal(p, want))
	}
	if err := r.e.ReadAt(a.Key, p, blobSize-page); err == nil {
		t.Error("ReadAt past the end succeeded")
	}
	r.noRequest()
}

func shareChangesNoByte(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a, b := blob("d", "a"), blob("d", "b")
	r.mount("image", a, b)
	r.write(a.Key, 4*page, 2*page)
	if err := r.e.WriteAt(b.Key, content(a.Key, 4*page, page), 8*page); err != nil { // the second page is a hole
		t.Fatal(err)
	}
	_, err := r.e.Share(b.Key, fscache.Extent{Off: 8 * page, Len: 2 * page}, a.Key, 4*page)
	if errors.Is(err, errors.ErrUnsupported) {
		return // the engine says so: allowed
	}
	if err == nil {
		t.Error("a hole shares space with data")
	}
	n, err := r.e.Share(b.Key, fscache.Extent{Off: 8 * page, Len: page}, a.Key, 4*page)
	if err != nil || n != page {
		t.Fatalf("Share: %d bytes, %v", n, err)
	}
	got, err := r.e.Present(b.Key)
	if want := []fscache.Extent{{Off: 8 * page, Len: page}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("present: %v, %v; want %v", got, err, want)
	}
	p := make([]byte, page)
	if err := r.e.ReadAt(b.Key, p, 8*page); err != nil || !bytes.Equal(p, content(a.Key, 4*page, page)) {
		t.Errorf("what is shared reads back wrong: %v", err)
	}
	if _, err := r.e.Share(b.Key, fscache.Extent{Off: blobSize, Len: page}, a.Key, 0); err == nil {
		t.Error("Share past the end succeeded")
	}
	r.noRequest()
}

func dropMakesAHole(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a := blob("d", "a")
	dir := r.mount("image", a)
	r.write(a.Key, 0, 48*page)
	err := r.e.Drop(a.Key, fscache.Extent{Off: 16 * page, Len: 16 * page})
	if errors.Is(err, errors.ErrUnsupported) {
		return // the engine says so: allowed
	}
	if err != nil {
		t.Fatalf("Drop: %v", err)
	}
	want := []fscache.Extent{{Off: 0, Len: 16 * page}, {Off: 32 * page, Len: 16 * page}}
	if have, err := r.e.Present(a.Key); err != nil || !slices.Equal(have, want) {
		t.Errorf("Present: %v, %v, want %v", have, err, want)
	}
	if err := r.e.Drop(a.Key, fscache.Extent{Off: blobSize, Len: page}); err == nil {
		t.Error("Drop past the end succeeded")
	}
	done := r.read(dir, a.Key, 20*page, page)
	r.fill(r.request())
	r.get(done, a.Key, 20*page)
	r.write(a.Key, 0, blobSize)
	if err := r.e.Complete(a.Key); err != nil {
		t.Fatalf("Complete: %v", err)
	}
	if err := r.e.Drop(a.Key, fscache.Extent{Off: 16 * page, Len: 16 * page}); !errors.Is(err, fscache.ErrBusy) {
		t.Errorf("Drop of a complete object's bytes: %v, want ErrBusy", err)
	}
	done = r.read(r.mount("image2", a), a.Key, 20*page, page)
	r.get(done, a.Key, 20*page)
}

func writtenDataOutlivesTheEngine(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a := blob("d", "a")
	dir := r.mount("image", a)
	r.write(a.Key, 0, 16*page)
	r.unmount(dir)
	r.close()

	s := newRig(t, h)
	s.start(1)
	dir = s.mount("image", a)
	want := []fscache.Extent{{Off: 0, Len: 16 * page}}
	if have, err := s.e.Present(a.Key); err != nil || !slices.Equal(have, want) {
		t.Errorf("Present in the next engine: %v, %v, want %v", have, err, want)
	}
	s.serve()
	s.get(s.read(dir, a.Key, 0, 32*page), a.Key, 0)
}

func completedObjectRaisesNoRequest(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a := blob("d", "a")
	dir := r.mount("image", a)
	r.write(a.Key, 0, blobSize)
	for range 2 {
		if err := r.e.Complete(a.Key); err != nil {
			t.Fatalf("Complete: %v", err)
		}
	}
	r.add(a) // adding a complete object again does not make it ask
	for _, off := range []int64{0, 8 * page, blobSize - 64*page} {
		r.get(r.read(dir, a.Key, off, 4*page), a.Key, off)
	}
	r.noRequest()
}

func removeOfUsedObjectFails(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a := blob("d", "a")
	dir := r.mount("image", a)
	r.write(a.Key, 0, 16*page)
	if err := r.e.Remove(a.Key); !errors.Is(err, fscache.ErrBusy) {
		t.Errorf("Remove while mounted: %v, want ErrBusy", err)
	}
	done := r.read(dir, a.Key, 64*page, page)
	r.fill(r.request())
	r.get(done, a.Key, 64*page)

	r.unmount(dir)
	if err := eventually(func() error { return r.e.Remove(a.Key) }); err != nil {
		t.Fatalf("Remove after unmount: %v", err)
	}
	if err := r.e.Remove(a.Key); !errors.Is(err, fscache.ErrUnknown) {
		t.Errorf("Remove again: %v, want ErrUnknown", err)
	}
	r.serve()
	dir = r.mount("image2", a)
	r.get(r.read(dir, a.Key, 0, 32*page), a.Key, 0)
}

// eventually tries again while the kernel, which lets go of objects in its own time after umount, says busy.
func eventually(try func() error) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		err := try()
		if !errors.Is(err, fscache.ErrBusy) || time.Now().After(deadline) {
			return err
		}
	}
}

func unmountWhileBusyFails(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	r.serve()
	a := blob("d", "a")
	dir := r.mount("image", a)
	release, err := h.Readers.Hold(dir, a.Key)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.e.Unmount(context.Background(), dir); !errors.Is(err, fscache.ErrBusy) || !strings.Contains(err.Error(), dir) {
		t.Errorf("Unmount with an open file: %v, want ErrBusy and the directory's name", err)
	}
	r.get(r.read(dir, a.Key, 0, page), a.Key, 0)
	if err := release(); err != nil {
		t.Fatal(err)
	}
	r.unmount(dir)
	if err := r.e.Unmount(context.Background(), dir); err == nil {
		t.Error("Unmount of what is not mounted succeeded")
	}
}

func mountErrorsNameTheDirectory(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a := blob("d", "a")
	taken := r.mount("image", a)
	m := r.image("image2", a)
	file := m.BootstrapPath
	for what, dir := range map[string]string{
		"taken": taken, "missing": filepath.Join(m.Dir, "missing"), "a file": file, "relative": "relative/dir",
	} {
		m.Dir = dir
		if err := r.e.Mount(context.Background(), m); err == nil || !strings.Contains(err.Error(), dir) {
			t.Errorf("Mount on what is %s: %v, want an error that names %s", what, err, dir)
		}
	}
	r.serve()
	r.get(r.read(taken, a.Key, 0, page), a.Key, 0)
}

func domainsShareNothing(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a, b := blob("d1", "same"), blob("d2", "same")
	dirA, dirB := r.mount("image", a), r.mount("image", b)
	doneA := r.read(dirA, a.Key, 0, page)
	reqA := r.request()
	if reqA.Object != a.Key {
		t.Errorf("request for %s, want %s", reqA.Object, a.Key)
	}
	r.fill(reqA)
	r.get(doneA, a.Key, 0)
	if have, err := r.e.Present(b.Key); err != nil || len(have) != 0 {
		t.Errorf("the other domain has %v, %v", have, err)
	}
	doneB := r.read(dirB, b.Key, 0, page)
	reqB := r.request()
	if reqB.Object != b.Key {
		t.Errorf("request for %s, want %s", reqB.Object, b.Key)
	}
	r.fill(reqB)
	r.get(doneB, b.Key, 0)
}

func twoMountsShareABlob(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a := blob("d", "a")
	one, two := r.mount("image", a), r.mount("image2", a)
	done := r.read(one, a.Key, 0, page)
	r.fill(r.request())
	r.get(done, a.Key, 0)
	r.serve()
	r.get(r.read(two, a.Key, 0, page), a.Key, 0)
	r.unmount(one)
	r.get(r.read(two, a.Key, 8*page, page), a.Key, 8*page)
}
