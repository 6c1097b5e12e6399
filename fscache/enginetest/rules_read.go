package enginetest

import (
	"errors"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

const page = fscache.BlockSize

func readerWaitsUntilAnswered(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a := blob("d", "a")
	dir := r.mount("image", a)
	done := r.read(dir, a.Key, 5*page, page)
	req := r.request()
	r.asleep(done)
	// Written but not answered: still asleep.
	r.write(a.Key, 5*page, page)
	r.asleep(done)
	r.fill(req)
	r.get(done, a.Key, 5*page)
}

func readReturnsTheBytesWritten(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(2)
	r.serve()
	a := blob("d", "a")
	dir := r.mount("image", a)
	for _, at := range []struct{ off, n int64 }{
		{0, page}, {7 * page, page}, {100, 200}, {blobSize - page, page}, {64 * page, 32 * page}, {0, blobSize},
	} {
		r.get(r.read(dir, a.Key, at.off&^7, at.n&^7), a.Key, at.off&^7)
	}
}

func requestCoversTheRead(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a := blob("d", "a")
	dir := r.mount("image", a)
	const from, to = 9 * page, 12 * page
	done := r.read(dir, a.Key, from+8, to-from-16)
	for next := int64(from); next < to; { // the kernel may ask in parts, in order
		req := r.request()
		if req.Op != fscache.OpRead || req.Object != a.Key || req.Off > next || req.Off+req.Len <= next {
			t.Fatalf("request %v does not cover %d", req, next)
		}
		next = req.Off + req.Len
		r.fill(req)
	}
	r.get(done, a.Key, from+8)
}

func deniedReaderGetsEIO(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a := blob("d", "a")
	dir := r.mount("image", a)
	for i, errno := range []fscache.Errno{fscache.EIO, fscache.ENOSPC, fscache.EAGAIN} {
		off := int64(i) * 16 * page
		done := r.read(dir, a.Key, off, page)
		if res := r.deny(done, errno); !errors.Is(res.err, unix.EIO) {
			t.Errorf("reader denied with %d got %v, want EIO", errno, res.err)
		}
		done = r.read(dir, a.Key, off, page)
		r.fill(r.request())
		r.get(done, a.Key, off)
	}
}

func eachRequestGoesToOneCaller(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(8)
	a := blob("d", "a")
	dir := r.mount("image", a)
	const readers = 24
	var done [readers]<-chan result
	for i := range done {
		done[i] = r.read(dir, a.Key, int64(i)*2*page, page)
	}
	seen := make(map[fscache.Request]bool)
	ids := make(map[uint64]bool)
	var reqs []fscache.Request
	for range done {
		req := r.request()
		at := fscache.Request{Off: req.Off, Len: req.Len}
		if seen[at] || ids[req.ID] {
			t.Errorf("request %v was handed out twice", req)
		}
		seen[at], ids[req.ID] = true, true
		reqs = append(reqs, req)
	}
	r.noRequest()
	for _, req := range reqs {
		r.fill(req)
	}
	for i := range done {
		r.get(done[i], a.Key, int64(i)*2*page)
	}
}

func secondAnswerIsRefused(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a := blob("d", "a")
	dir := r.mount("image", a)
	done := r.read(dir, a.Key, 0, page)
	first := r.request()
	r.fill(first)
	r.get(done, a.Key, 0)
	for _, errno := range []fscache.Errno{fscache.OK, fscache.EIO} {
		if err := r.e.Answer(first, errno); !errors.Is(err, fscache.ErrAnswered) {
			t.Errorf("second Answer: %v, want ErrAnswered", err)
		}
	}
	// The kernel uses the first one's name again: a late second answer must not reach the new reader.
	done = r.read(dir, a.Key, 32*page, page)
	req := r.request()
	if err := r.e.Answer(first, fscache.OK); !errors.Is(err, fscache.ErrAnswered) {
		t.Errorf("second Answer while %v has a new request: %v, want ErrAnswered", req, err)
	}
	r.asleep(done)
	r.fill(req)
	r.get(done, a.Key, 32*page)
}

func answersInAnyOrder(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(2)
	a := blob("d", "a")
	dir := r.mount("image", a)
	const readers = 6
	var done [readers]<-chan result
	var reqs [readers]fscache.Request
	for i := range done {
		done[i] = r.read(dir, a.Key, int64(i)*8*page, page)
		reqs[i] = r.request()
	}
	for _, i := range []int{3, 0, 5, 1, 4, 2} {
		r.fill(reqs[i])
		r.get(done[i], a.Key, int64(i)*8*page)
	}
}

// answerReachesItsOwnReader fills every request for one object and denies every one for another, as fast as it can: an
// answer that went astray would fail a reader of the first or let one of the second on.
func answerReachesItsOwnReader(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(4)
	good, bad := blob("d", "a"), blob("d", "b")
	dir := r.mount("image", good, bad)
	var answering sync.WaitGroup
	over := make(chan struct{})
	for range 4 {
		answering.Go(func() { // ends with over
			for {
				select {
				case req := <-r.reads:
					if req.Object == good.Key {
						r.fill(req)
					} else {
						r.answer(req, fscache.EIO)
					}
				case <-over:
					return
				}
			}
		})
	}
	var reading sync.WaitGroup
	for i := range int64(8) {
		reading.Go(func() {
			for n := range int64(blobSize / page / 8) {
				r.check(dir, good.Key, (n*8+i)*page, page)
			}
		})
		reading.Go(func() {
			for n := range int64(64) {
				if err := h.Readers.Read(dir, bad.Key, make([]byte, page), n*page); !errors.Is(err, unix.EIO) {
					t.Errorf("denied reader got %v, want EIO", err)
				}
			}
		})
	}
	reading.Wait()
	close(over)
	answering.Wait()
}

func concurrentReadersOfOneRange(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(3)
	r.serve()
	a := blob("d", "a")
	dir := r.mount("image", a)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for off := int64(0); off < 64*page; off += 4 * page {
				r.check(dir, a.Key, off, 4*page)
			}
		})
	}
	wg.Wait()
}

func slowObjectDelaysItsOwnReaders(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(2)
	a, b := blob("d", "a"), blob("d", "b")
	dir := r.mount("image", a, b)
	var slow []<-chan result
	var held []fscache.Request
	for i := range int64(8) {
		slow = append(slow, r.read(dir, a.Key, i*4*page, page))
		held = append(held, r.request())
	}
	for i := range int64(8) {
		done := r.read(dir, b.Key, i*4*page, page)
		r.fill(r.request())
		r.get(done, b.Key, i*4*page)
	}
	for i, req := range held {
		r.fill(req)
		r.get(slow[i], a.Key, int64(i)*4*page)
	}
}

func killedReaderDisturbsNobody(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a := blob("d", "a")
	dir := r.mount("image", a)
	killed, err := h.Readers.Start(dir, a.Key, 0, page)
	if err != nil {
		t.Fatal(err)
	}
	req := r.request()
	other := r.read(dir, a.Key, 32*page, page)
	otherReq := r.request()
	if err := killed.Kill(); err != nil {
		t.Fatal(err)
	}
	r.fill(req) // OK or ErrGone
	r.fill(otherReq)
	r.get(other, a.Key, 32*page)
	// What the killed reader left behind is not taken for data.
	r.serve()
	r.get(r.read(dir, a.Key, 0, 8*page), a.Key, 0)
}

// unansweredRequestSurvives has a successor that is told what keep leaves of what the predecessor left.
func unansweredRequestSurvives(keep func(*fscache.Inherited)) func(*testing.T, Harness) {
	return func(t *testing.T, h Harness) { requestSurvives(t, h, keep) }
}

func requestSurvives(t *testing.T, h Harness, keep func(*fscache.Inherited)) {
	r := newRig(t, h)
	r.start(1)
	a := blob("d", "a")
	dir := r.mount("image", a)
	done := r.read(dir, a.Key, 0, page)
	before := r.request()
	left, mounts := r.handOver()
	keep(&left)
	r.asleep(done)
	if err := r.e.Answer(before, fscache.OK); !errors.Is(err, fscache.ErrClosed) {
		t.Errorf("Answer on the closed engine: %v, want ErrClosed", err)
	}

	s := r.successor(left, mounts)
	switch h.Successor {
	case Redelivers, Replays:
		req := s.request()
		if req.Object != a.Key || req.Off != before.Off || req.Len != before.Len {
			t.Errorf("it got %v, was %v", req, before)
		}
		s.fill(req)
		s.get(done, a.Key, 0)
	case DeniesThenAsksAgain:
		if res := s.deny(done, fscache.EIO); !errors.Is(res.err, unix.EIO) {
			t.Errorf("the reader got %v, want EIO", res.err)
		}
		done = s.read(dir, a.Key, 0, page)
		s.fill(s.request())
		s.get(done, a.Key, 0)
	default:
		t.Fatalf("harness has no Successor: %d", h.Successor)
	}
	done = s.read(dir, a.Key, 40*page, page)
	s.fill(s.request())
	s.get(done, a.Key, 40*page)
}

func frozenEngineAnswers(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(2)
	a := blob("d", "a")
	dir := r.mount("image", a)
	done := r.read(dir, a.Key, 0, page)
	req := r.request()
	for range 2 {
		if err := r.e.Freeze(); err != nil {
			t.Fatalf("Freeze: %v", err)
		}
	}
	r.loops.Wait()
	late := r.read(dir, a.Key, 64*page, page)
	if _, err := r.e.Next(); !errors.Is(err, fscache.ErrClosed) {
		t.Errorf("Next after Freeze: %v, want ErrClosed", err)
	}
	r.asleep(done)
	r.fill(req)
	r.get(done, a.Key, 0)
	r.asleep(late)

	// What was not read is the successor's.
	left, mounts := r.handOver()
	s := r.successor(left, mounts)
	s.fill(s.request())
	s.get(late, a.Key, 64*page)
}

// successor opens an engine that takes over what r's had.
func (r *rig) successor(left fscache.Inherited, mounts []string) *rig {
	r.t.Helper()
	s := takeOver(r.t, r.h, r.store, left)
	s.adopt(r, mounts)
	return s
}

// adopt makes a successor's rig serve what its predecessor's did.
func (r *rig) adopt(before *rig, mounts []string) {
	r.bootstraps, r.mounts = before.bootstraps, mounts
	for k, size := range before.sizes {
		r.add(fscache.Object{Key: k, Size: size})
	}
	r.start(1)
}
