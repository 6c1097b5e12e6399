package enginetest

import (
	"testing"

	"holdfast/fscache"
)

// upgradeLosesNothing has one request that the predecessor finishes, one that it leaves, and one that it never read.
func upgradeLosesNothing(t *testing.T, h Harness) {
	if !h.Upgrades {
		t.Skip("a living engine of this kind is not taken over from")
	}
	r := newRig(t, h)
	r.start(1)
	a := blob("d", "a")
	dir := r.mount("image", a)
	finished := r.read(dir, a.Key, 0, page)
	reqFinished := r.request()
	left := r.read(dir, a.Key, 32*page, page)
	reqLeft := r.request()

	// Prepared: the successor knows everything and touches nothing.
	snapshot := fscache.Inherited{Alive: true}
	if _, f := r.e.Lifeline(); f != nil { // a simulated kernel has none
		var err error
		if snapshot.Lifeline, err = Dup(f); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if snapshot.Objects, err = r.store.Held(); err != nil {
		t.Fatal(err)
	}
	s := takeOver(t, h, r.store, snapshot)
	r.mu.Lock()
	s.bootstraps = r.bootstraps
	for k, size := range r.sizes {
		s.add(fscache.Object{Key: k, Size: size})
	}
	r.mu.Unlock()
	if _, err := s.e.Next(); err == nil {
		t.Fatal("the successor read before the predecessor had stopped")
	}
	r.asleep(finished)
	r.asleep(left)

	// Thawed, the predecessor serves on as if nothing had been.
	old, next := r.e.(fscache.Successor), s.e.(fscache.Successor)
	if err := r.e.Freeze(); err != nil {
		t.Fatal(err)
	}
	r.loops.Wait()
	if err := old.Thaw(); err != nil {
		t.Fatal(err)
	}
	r.start(1)
	done := r.read(dir, a.Key, 64*page, page)
	r.fill(r.request())
	r.get(done, a.Key, 64*page)

	// Committed.
	if err := r.e.Freeze(); err != nil {
		t.Fatal(err)
	}
	r.loops.Wait()
	late := r.read(dir, a.Key, 96*page, page)
	pending := old.Pending()
	if len(pending) != 2 {
		t.Errorf("pending: %v, want two", pending)
	}
	if err := next.Expect(pending, nil, nil); err != nil {
		t.Fatal(err)
	}
	s.start(1)
	s.fill(s.request())
	s.get(late, a.Key, 96*page)
	r.fill(reqFinished)
	r.get(finished, a.Key, 0)
	next.Finished(reqFinished.ID)
	r.mu.Lock()
	s.mounts, r.mounts = r.mounts, nil
	r.mu.Unlock()
	r.close()

	next.Replay()
	req := s.request()
	if req.Object != a.Key || req.Off != reqLeft.Off || req.Len != reqLeft.Len {
		t.Errorf("replayed %v, was %v", req, reqLeft)
	}
	s.fill(req)
	s.get(left, a.Key, 32*page)
	s.noRequest()
	if pending := next.Pending(); len(pending) != 0 {
		t.Errorf("pending at the end: %v", pending)
	}
}
