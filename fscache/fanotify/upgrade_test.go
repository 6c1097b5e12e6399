package fanotify

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/enginetest"
)

// successor opens an engine that takes over from p's, which lives.
func (p *past) successor(reserved *Reservation, objects ...fscache.Object) *past {
	p.t.Helper()
	s := &past{t: p.t, dir: p.dir, store: p.store, inbox: enginetest.NewInbox(64, 128)}
	held, err := p.store.Held()
	if err != nil {
		p.t.Fatal(err)
	}
	s.e = open(p.t, Config{
		Dir: p.dir, Inbox: s.inbox, Holder: s.store, Reserved: reserved,
		Inherited: fscache.Inherited{Lifeline: copyOf(p.t, p.e), Objects: held, Alive: true},
	})
	for _, o := range objects {
		add(p.t, s.e, o)
	}
	return s
}

func TestSuccessorChangesNothingBeforeExpect(t *testing.T) {
	a, full := blobOf("a", 16), blobOf("full", 2)
	p := begin(t, a, full)
	for off := int64(0); off < full.Size; off += page {
		p.fill(fscache.Request{Object: full.Key, Off: off})
	}
	if err := p.e.Complete(full.Key); err != nil {
		t.Fatal(err)
	}
	done := p.read(a.Key, 0)
	r := p.next()
	before, err := markedInodes(p.e.group)
	if err != nil {
		t.Fatal(err)
	}
	s := p.successor(nil, a, full, blobOf("new", 4))
	after, err := markedInodes(p.e.group)
	if err != nil || !maps.Equal(before, after) {
		t.Errorf("marks were %v, are %v, %v", before, after, err)
	}
	if _, err := s.e.Next(); err == nil {
		t.Error("Next before Expect returned a request")
	}
	asleep(t, done)
	if err := s.e.Close(); err != nil { // the upgrade fails
		t.Fatal(err)
	}
	p.fill(r)
	p.answer(r, fscache.OK)
	if err := await(t, done); err != nil {
		t.Error(err)
	}
}

func TestExpectRefusesANumberThatIsNotReservedAndChangesNothing(t *testing.T) {
	a := blobOf("a", 16)
	p := begin(t, a)
	done := p.read(a.Key, 0)
	r := p.next()
	s := p.successor(nil, a)
	if err := p.e.Freeze(); err != nil {
		t.Fatal(err)
	}
	bad := fscache.Pending{Op: fscache.OpRead, Object: a.Key, Off: page, Len: page, ID: 15_000}
	if err := s.e.Expect(append(p.e.Pending(), bad), nil, nil); err == nil {
		t.Fatal("a number that is free was accepted")
	}
	if _, err := s.e.Next(); err == nil {
		t.Error("Next returned a request")
	}
	if err := s.e.Expect(p.e.Pending(), nil, nil); err != nil {
		t.Errorf("Expect of what is there: %v", err)
	}
	if err := s.e.Expect(p.e.Pending(), nil, nil); err == nil {
		t.Error("Expect again succeeded")
	}
	p.fill(r)
	p.answer(r, fscache.OK)
	if err := await(t, done); err != nil {
		t.Error(err)
	}
}

func TestReplayWakesWhoReads(t *testing.T) {
	a := blobOf("a", 16)
	p := begin(t, a)
	done := p.read(a.Key, 0)
	was := p.next()
	s := p.successor(nil, a)
	if err := p.e.Freeze(); err != nil {
		t.Fatal(err)
	}
	if err := s.e.Expect(p.e.Pending(), nil, nil); err != nil {
		t.Fatal(err)
	}
	got := make(chan fscache.Request, 3)
	for range cap(got) {
		go func() { // ends with Close
			for {
				r, err := s.e.Next()
				if err != nil {
					return
				}
				got <- r
			}
		}()
	}
	select {
	case r := <-got:
		t.Fatalf("Next returned %v before Replay", r)
	case <-time.After(20 * time.Millisecond):
	}
	p.e.Close()
	s.e.Replay()
	r := <-got
	if r.ID != was.ID || r.Off != was.Off || r.Object != was.Object {
		t.Errorf("replayed %v, was %v", r, was)
	}
	s.fill(r)
	s.answer(r, fscache.OK)
	if err := await(t, done); err != nil {
		t.Error(err)
	}
	done = s.read(a.Key, page) // and events are read again
	r = <-got
	s.fill(r)
	s.answer(r, fscache.OK)
	if err := await(t, done); err != nil {
		t.Error(err)
	}
}

func TestObjectsOpenedAndClosedDuringAnUpgrade(t *testing.T) {
	a, gone, opened := blobOf("a", 16), blobOf("gone", 1), blobOf("opened", 16)
	p := begin(t, a, gone)
	s := p.successor(nil, a)
	// Meanwhile:
	p.fill(fscache.Request{Object: gone.Key})
	if err := errors.Join(p.e.Complete(gone.Key), p.e.Remove(gone.Key), p.e.Add(t.Context(), opened)); err != nil {
		t.Fatal(err)
	}
	if err := p.e.Freeze(); err != nil {
		t.Fatal(err)
	}
	var files []fscache.Held
	for _, h := range p.e.Holding() {
		if h.Object.Key == opened.Key {
			var err error
			if h.File, err = enginetest.Dup(h.File); err != nil {
				t.Fatal(err)
			}
			files = append(files, h)
		}
	}
	if err := s.e.Expect(p.e.Pending(), files, []fscache.Held{{Object: gone}}); err != nil {
		t.Fatal(err)
	}
	add(t, s.e, opened)
	p.e.Close()
	s.e.Replay()
	if err := s.e.WriteAt(opened.Key, pageOf(opened.Key, 0), 0); err != nil { // would wait for itself through another descriptor
		t.Fatal(err)
	}
	done := s.read(opened.Key, 0)
	s.answer(s.next(), fscache.OK)
	if err := await(t, done); err != nil {
		t.Error(err)
	}
	if len(s.e.adoptable) != 0 {
		t.Errorf("descriptors nobody wants: %v", s.e.adoptable)
	}
	// What the predecessor unmarked is unmarked again without complaint.
	if err := errors.Join(s.e.Complete(a.Key), s.e.Complete(opened.Key)); err != nil {
		t.Error(err)
	}
}

// TestSuccessorKeepsClearOfTheNumbersOfALivingProcess has a process of its own as the predecessor.
func TestSuccessorKeepsClearOfTheNumbersOfALivingProcess(t *testing.T) {
	l := newLife(t)
	const k = 50
	d := l.start(k)
	d.expect("ready")
	done := l.crowd(k)
	d.expect("holding")
	boxes, err := filepath.Glob(filepath.Join(l.root, "inbox", "*"))
	if err != nil || len(boxes) != 1 {
		t.Fatal(boxes, err)
	}
	mem, err := os.ReadFile(boxes[0])
	if err != nil {
		t.Fatal(err)
	}
	var pending []fscache.Pending
	theirs := map[uint64]bool{}
	for _, m := range enginetest.MessagesIn(mem, slotSize) {
		ev, _, err := DecodeEvent(m[:maxEventLen])
		if err != nil {
			t.Fatal(err)
		}
		theirs[uint64(ev.FD)] = true
		pending = append(pending, fscache.Pending{Op: fscache.OpRead, Object: victimObject.Key, Off: ev.Off, Len: ev.Len, ID: uint64(ev.FD)})
	}
	reserved, err := Reserve(256)
	if err != nil {
		t.Fatal(err)
	}
	group, err := enginetest.Dup(l.group)
	if err != nil {
		t.Fatal(err)
	}
	held := slices.Clone(l.held)
	for i := range held {
		if held[i].File, err = enginetest.Dup(held[i].File); err != nil {
			t.Fatal(err)
		}
	}
	p := &past{t: t, dir: filepath.Join(l.root, "cache"), inbox: enginetest.NewInbox(64, 128)}
	p.e = open(t, Config{
		Dir: p.dir, Inbox: p.inbox, Reserved: reserved,
		Inherited: fscache.Inherited{Lifeline: group, Objects: held, Alive: true},
	})
	add(t, p.e, victimObject)
	add(t, p.e, sideObject)
	if err := p.e.Expect(pending, nil, nil); err != nil {
		t.Fatal(err)
	}
	p.e.background.Wait()
	for i := range int64(k) {
		read := p.read(victimObject.Key, (1000+i)*page)
		r := p.next()
		if theirs[r.ID] {
			t.Errorf("a new event has number %d, which the predecessor has", r.ID)
		}
		p.fill(r)
		p.answer(r, fscache.OK)
		if err := await(t, read); err != nil {
			t.Error(err)
		}
	}
	d.kill()
	p.e.Replay()
	for range k {
		r := p.next()
		p.fill(r)
		p.answer(r, fscache.OK)
	}
	if err := await(t, done); err != nil {
		t.Error(err)
	}
	for n := range theirs {
		if p.e.orphans[int32(n)] != nil {
			t.Errorf("number %d is still kept", n)
		}
	}
}

func TestReserveKeepsClearOfLowNumbers(t *testing.T) {
	const below = 300
	r, err := Reserve(below)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Release()
	for n := range int32(below) {
		if !inUse(n) {
			t.Errorf("number %d is free", n)
		}
	}
	fd, err := placeholder()
	if err != nil {
		t.Fatal(err)
	}
	if fd < below {
		t.Errorf("the next descriptor is %d", fd)
	}
	_ = unix.Close(fd)
	if !r.keeps(below-1) || r.keeps(0) || r.keeps(below) {
		t.Error("numbers that were in use before, or are beyond, are said to be reserved, or the last is not")
	}
	if !r.give(below-1) || r.give(below-1) {
		t.Error("a number is given once")
	}
	r.Release()
	r.Release()
	if !inUse(below - 1) {
		t.Error("a number that was given away was closed")
	}
	_ = unix.Close(below - 1)
	if fd, err = placeholder(); err != nil || fd >= below-1 {
		t.Errorf("the next descriptor is %d, %v: the numbers were not released", fd, err)
	}
	_ = unix.Close(fd)
}

func TestReserveOfMoreThanTheLimitFailsAndGivesBack(t *testing.T) {
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	lower := old
	lower.Cur = 500
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &lower); err != nil {
		t.Fatal(err)
	}
	_, err := Reserve(501)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, unix.EMFILE) {
		t.Errorf("Reserve: %v, want EMFILE", err)
	}
	fd, err := placeholder()
	if err != nil || fd >= 499 {
		t.Errorf("the next descriptor is %d, %v: nothing was given back", fd, err)
	}
	_ = unix.Close(fd)
}

func TestThawedEngineReadsAgain(t *testing.T) {
	a := blobOf("a", 16)
	p := begin(t, a)
	if err := errors.Join(p.e.Freeze(), p.e.Thaw(), p.e.Thaw()); err != nil {
		t.Fatal(err)
	}
	done := p.read(a.Key, 0)
	r := p.next()
	p.fill(r)
	p.answer(r, fscache.OK)
	if err := await(t, done); err != nil {
		t.Error(err)
	}
	p.e.Close()
	if err := p.e.Thaw(); !errors.Is(err, fscache.ErrClosed) {
		t.Errorf("Thaw of a closed engine: %v, want ErrClosed", err)
	}
}

func TestFinishedGivesTheNumberBack(t *testing.T) {
	a := blobOf("a", 16)
	p := begin(t, a)
	reserved, err := Reserve(300)
	if err != nil {
		t.Fatal(err)
	}
	s := p.successor(reserved, a)
	var pending []fscache.Pending
	for n := range uint64(2) {
		pending = append(pending, fscache.Pending{Op: fscache.OpRead, Object: a.Key, Off: int64(n) * page, Len: page, ID: 290 + n})
	}
	if err := errors.Join(p.e.Freeze(), s.e.Expect(pending, nil, nil)); err != nil {
		t.Fatal(err)
	}
	s.e.background.Wait()
	if inUse(289) || !inUse(290) || !inUse(291) {
		t.Error("reserved numbers were not released, or those that are expected were")
	}
	s.e.Finished(290)
	s.e.Finished(290)
	s.e.Finished(1 << 40)
	if inUse(290) || !inUse(291) {
		t.Error("the number of a finished request was not given back, or another one was")
	}
	if got := s.e.Pending(); len(got) != 1 || got[0] != pending[1] {
		t.Errorf("Pending: %v, want the other one", got)
	}
	p.e.Close()
	s.e.Replay()
	if err := s.e.Answer(s.next(), fscache.EIO); !errors.Is(err, fscache.ErrGone) {
		t.Errorf("answer of an event the predecessor answered with its last breath: %v, want ErrGone", err)
	}
	if inUse(291) {
		t.Error("the number of an answered request was not given back")
	}
}
