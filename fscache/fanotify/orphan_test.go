package fanotify

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

func TestInheritedEventIsAnsweredByItsNumberWithItsData(t *testing.T) {
	a, b := blobOf("a", 16), blobOf("b", 16)
	p := begin(t, a, b)
	one := p.read(a.Key, 3*page)
	was1 := p.next()
	two := p.read(b.Key, 5*page)
	was2 := p.next()
	p.open(p.end(), a, b)
	for range 2 {
		r := p.next()
		was := was1
		if r.ID == was2.ID {
			was = was2
		}
		was.Token = r.Token
		if r != was {
			t.Errorf("handed out %+v, was %+v", r, was)
		}
		p.fill(r)
		p.answer(r, fscache.OK)
		if err := p.e.Answer(r, fscache.OK); !errors.Is(err, fscache.ErrAnswered) {
			t.Errorf("second Answer: %v, want ErrAnswered", err)
		}
	}
	if err := errors.Join(await(t, one), await(t, two)); err != nil {
		t.Error(err)
	}
}

func TestNewEventNeverGetsAnInheritedNumber(t *testing.T) {
	a := blobOf("a", 64)
	p := begin(t, a)
	inherited := map[uint64]bool{}
	var old []<-chan error
	for i := range int64(5) {
		old = append(old, p.read(a.Key, i*page))
		inherited[p.next().ID] = true
	}
	p.open(p.end(), a)
	var orphans []fscache.Request
	for range old {
		orphans = append(orphans, p.next())
	}
	for i := range int64(10) {
		done := p.read(a.Key, (20+i)*page)
		r := p.next()
		if inherited[r.ID] {
			t.Errorf("a new event has number %d, which an inherited one has", r.ID)
		}
		p.fill(r)
		p.answer(r, fscache.OK)
		if err := await(t, done); err != nil {
			t.Error(err)
		}
	}
	for _, d := range old {
		asleep(t, d)
	}
	for _, r := range orphans {
		p.fill(r)
		p.answer(r, fscache.OK)
	}
	for _, d := range old {
		if err := await(t, d); err != nil {
			t.Error(err)
		}
	}
	for n := range inherited {
		if inUse(int32(n)) {
			t.Errorf("number %d was not given back", n)
		}
	}
}

func TestNumberInUseIsLeftAloneAndItsHolderMayGoFirst(t *testing.T) {
	a := blobOf("a", 64)
	p := begin(t, a)
	old := p.read(a.Key, 0)
	n := p.next().ID
	left := p.end()
	f, err := os.Open(os.DevNull) // takes the lowest number
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Dup3(int(f.Fd()), int(n), unix.O_CLOEXEC); err != nil && int(f.Fd()) != int(n) {
		t.Fatal(err)
	}
	p.open(left, a)
	orphan := p.next()
	if !inUse(int32(n)) || p.e.orphans[int32(n)].placed {
		t.Fatal("the number was not left alone")
	}
	if f.Fd() != uintptr(n) {
		f.Close()
	}
	_ = unix.Close(int(n)) // whoever had it
	// New events until one has the inherited number.
	var done []<-chan error
	var mine fscache.Request
	for i := int64(10); mine.ID != n; i++ {
		done = append(done, p.read(a.Key, i*page))
		mine = p.next()
		p.fill(mine)
		if mine.ID != n {
			defer p.answer(mine, fscache.EIO)
		}
		if i == 30 {
			t.Fatal("no event got the number")
		}
	}
	p.answer(mine, fscache.OK) // to be written after the inherited one's
	asleep(t, done[len(done)-1])
	asleep(t, old)
	if err := p.e.Answer(mine, fscache.OK); !errors.Is(err, fscache.ErrAnswered) {
		t.Errorf("second Answer: %v, want ErrAnswered", err)
	}
	p.fill(orphan)
	p.answer(orphan, fscache.OK)
	if err := errors.Join(await(t, old), await(t, done[len(done)-1])); err != nil {
		t.Error(err)
	}
	if p.inbox.Lent() != len(done)-1 {
		t.Errorf("%d slots are lent, %d events are not answered", p.inbox.Lent(), len(done)-1)
	}
}

// withoutIdentity makes messages look as if their process had died right behind read(2).
func withoutIdentity(messages [][]byte) {
	for _, m := range messages {
		unidentify(m)
	}
}

func TestUnidentifiedEventIsServedFromEveryCandidate(t *testing.T) {
	for name, c := range map[string]struct {
		answers []fscache.Errno
		want    error
	}{
		"all there":       {[]fscache.Errno{fscache.OK, fscache.OK}, nil},
		"the first fails": {[]fscache.Errno{fscache.EIO, fscache.OK}, unix.EIO},
		"the last fails":  {[]fscache.Errno{fscache.OK, fscache.ENOSPC}, unix.ENOSPC},
	} {
		t.Run(name, func(t *testing.T) {
			a, b, complete, small := blobOf("a", 16), blobOf("b", 16), blobOf("complete", 16), blobOf("small", 2)
			p := begin(t, a, b, complete, small)
			if err := p.e.Complete(complete.Key); err != nil {
				t.Fatal(err)
			}
			done := p.read(b.Key, 4*page)
			was := p.next()
			left := p.end()
			withoutIdentity(left.Messages)
			p.open(left, a, b, small)
			for i, k := range []fscache.Key{a.Key, b.Key} {
				r := p.next()
				if r.Object != k || r.Off != was.Off || r.Len != was.Len || r.ID != was.ID {
					t.Fatalf("handed out %+v, want %s like %+v", r, k, was)
				}
				asleep(t, done)
				p.fill(r)
				p.answer(r, c.answers[i])
			}
			if err := await(t, done); !errors.Is(err, c.want) {
				t.Errorf("the reader got %v, want %v", err, c.want)
			}
		})
	}
}

func TestUnidentifiedEventWhenEverythingIsCompleteIsAllowed(t *testing.T) {
	a := blobOf("a", 16)
	p := begin(t, a)
	done := p.read(a.Key, 0)
	p.next()
	for off := int64(0); off < a.Size; off += page {
		p.fill(fscache.Request{Object: a.Key, Off: off})
	}
	if err := p.e.Complete(a.Key); err != nil {
		t.Fatal(err)
	}
	left := p.end()
	withoutIdentity(left.Messages)
	p.open(left, a)
	go func() { _, _ = p.e.Next() }() // ends with Close
	if err := await(t, done); err != nil {
		t.Error(err)
	}
}

func TestUnidentifiedEventIsDeniedWhenItMayBeOfNoObject(t *testing.T) {
	for name, known := range map[string][]fscache.Object{"one is known": {blobOf("a", 16)}, "none is": nil} {
		t.Run(name, func(t *testing.T) {
			a, b := blobOf("a", 16), blobOf("b", 16)
			p := begin(t, a, b)
			done := p.read(b.Key, 0)
			p.next()
			left := p.end()
			withoutIdentity(left.Messages)
			p.open(left, known...)
			go func() { _, _ = p.e.Next() }() // ends with Close
			if err := await(t, done); !errors.Is(err, unix.EIO) {
				t.Errorf("the reader got %v, want EIO", err)
			}
		})
	}
}

func TestUnidentifiedEventOfTooManyCandidatesIsDenied(t *testing.T) {
	var objects []fscache.Object
	for i := range maxCandidates + 1 {
		objects = append(objects, blobOf(fmt.Sprint(i), 1))
	}
	p := begin(t, objects...)
	done := p.read(objects[7].Key, 0)
	p.next()
	left := p.end()
	withoutIdentity(left.Messages)
	p.open(left, objects...)
	go func() { _, _ = p.e.Next() }() // ends with Close
	if err := await(t, done); !errors.Is(err, unix.EIO) {
		t.Errorf("the reader got %v, want EIO", err)
	}
}

func TestTwoCandidatesOfOneNumberAreBothServed(t *testing.T) {
	a, b := blobOf("a", 16), blobOf("b", 16)
	p := begin(t, a, b)
	done := p.read(a.Key, 3*page)
	was := p.next()
	left := p.end()
	left.Pending = []fscache.Pending{
		{Op: fscache.OpRead, Object: b.Key, Off: 9 * page, Len: page, ID: was.ID}, // an earlier one's, or it is the message that is
		{Op: fscache.OpRead, Object: a.Key, Off: 3 * page, Len: page, ID: was.ID}, // the same as the message
	}
	p.open(left, a, b)
	first, second := p.next(), p.next()
	if first.Object == second.Object || first.ID != was.ID || second.ID != was.ID {
		t.Fatalf("handed out %+v and %+v", first, second)
	}
	p.fill(first)
	p.answer(first, fscache.OK)
	asleep(t, done)
	p.fill(second)
	p.answer(second, fscache.OK)
	if err := await(t, done); err != nil {
		t.Error(err)
	}
}

// TestTwoEventsOfOneNumberAreBothAnswered has two processes with an event each under one number, as nobody who occupies numbers can make it.
func TestTwoEventsOfOneNumberAreBothAnswered(t *testing.T) {
	a := blobOf("a", 16)
	p := begin(t, a)
	f, err := os.Open(p.path(a.Key))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	one := p.read(a.Key, 0)
	was := p.next()
	first := p.end()
	group, _, err := adoptGroup(first.Lifeline)
	if err != nil {
		t.Fatal(err)
	}
	two := make(chan error, 1)
	go func() { // ends when the kernel lets it go
		_, err := f.ReadAt(make([]byte, page), page)
		two <- err
	}()
	below, err := Reserve(int(was.ID)) // the event gets the lowest free number: the same
	if err != nil {
		t.Fatal(err)
	}
	var m [SlotLen]byte
	for {
		if _, err := group.Read(m[:maxEventLen]); err == nil {
			break
		} else if !errors.Is(err, unix.EAGAIN) {
			t.Fatal(err)
		}
	}
	ev, _, err := DecodeEvent(m[:maxEventLen])
	if err != nil || uint64(ev.FD) != was.ID {
		t.Fatalf("the second event has number %d, %v, want %d", ev.FD, err, was.ID)
	}
	_ = unix.Close(int(ev.FD))
	below.Release()
	var st unix.Stat_t
	if err := unix.Stat(p.path(a.Key), &st); err != nil {
		t.Fatal(err)
	}
	identify(m[:], inode{dev: st.Dev, ino: st.Ino})
	first.Lifeline = group
	first.Messages = append(first.Messages, m[:])
	p.open(first, a)
	for range 2 {
		r := p.next()
		p.fill(r)
		p.answer(r, fscache.OK)
	}
	if err := errors.Join(await(t, one), await(t, two)); err != nil {
		t.Error(err)
	}
}

func TestRecordOfAnObjectThatIsGoneIsOlderThanTheMessageOfItsNumber(t *testing.T) {
	a := blobOf("a", 16)
	p := begin(t, a)
	done := p.read(a.Key, 0)
	was := p.next()
	left := p.end()
	left.Pending = []fscache.Pending{{Op: fscache.OpRead, Object: blobOf("gone", 1).Key, Off: 0, Len: page, ID: was.ID}}
	p.open(left, a)
	r := p.next()
	p.fill(r)
	p.answer(r, fscache.OK)
	if err := await(t, done); err != nil {
		t.Error(err)
	}
}

func TestOnlyWhatNobodyCanIdentifyIsSwept(t *testing.T) {
	a := blobOf("a", 16)
	p := begin(t, a)
	var done []<-chan error
	for i := range int64(4) {
		done = append(done, p.read(a.Key, i*page))
		p.next()
	}
	left := p.end()
	var first, second Event
	first, _, _ = DecodeEvent(left.Messages[0][:maxEventLen])
	second, _, _ = DecodeEvent(left.Messages[1][:maxEventLen])
	left.Messages[1][0] = 255 // makes no sense
	left.Messages = left.Messages[:3]
	third, _, _ := DecodeEvent(left.Messages[2][:maxEventLen])
	identify(left.Messages[2], inode{dev: 1, ino: 1}) // of a file nobody knows
	p.open(left, a)
	r := p.next()
	if r.ID != uint64(first.FD) {
		t.Errorf("handed out %+v, want the first", r)
	}
	p.fill(r)
	p.answer(r, fscache.OK)
	for i, d := range done {
		want := error(unix.EIO)
		if int64(i) == first.Off/page {
			want = nil
		}
		if err := await(t, d); !errors.Is(err, want) {
			t.Errorf("reader %d got %v, want %v (the damaged one is %d, the stranger %d)", i, err, want, second.Off/page, third.Off/page)
		}
	}
}

func TestRecordsThatMakeNoSenseAreIgnored(t *testing.T) {
	a := blobOf("a", 16)
	p := begin(t, a)
	left := p.end()
	for _, bad := range []fscache.Pending{
		{Op: fscache.OpOpen, ID: 5}, {Op: fscache.OpRead, ID: 1 << 40}, {Op: fscache.OpRead, ID: 5, Off: -1},
		{Op: fscache.OpRead, ID: 5, Len: -1}, {Op: fscache.OpRead, ID: 5, Off: 1 << 62, Len: 1 << 62},
	} {
		bad.Object = a.Key
		left.Pending = append(left.Pending, bad)
	}
	left.Messages = [][]byte{nil, {1}, make([]byte, SlotLen)}
	p.open(left, a)
	if got := p.e.Pending(); len(got) != 0 {
		t.Errorf("Pending: %v", got)
	}
}

// TestPendingIsAllThatASuccessorNeeds kills twice: the second successor has only the list that the first made once its objects were added.
func TestPendingIsAllThatASuccessorNeeds(t *testing.T) {
	a, b := blobOf("a", 16), blobOf("b", 16)
	p := begin(t, a, b)
	one := p.read(a.Key, 0)
	p.next()
	two := p.read(b.Key, 7*page)
	was := p.next()
	left := p.end()
	for _, m := range left.Messages {
		if ev, _, _ := DecodeEvent(m[:maxEventLen]); uint64(ev.FD) == was.ID {
			unidentify(m)
		}
	}
	p.open(left, a, b)
	records := p.e.Pending()
	if len(records) != 3 { // the second may be of either
		t.Errorf("Pending: %v", records)
	}
	r := p.next()
	p.fill(r)
	left = p.end()
	left.Messages, left.Pending = nil, records
	p.open(left, a, b)
	for range records {
		r := p.next()
		p.fill(r)
		p.answer(r, fscache.OK)
	}
	if err := errors.Join(await(t, one), await(t, two)); err != nil {
		t.Error(err)
	}
	if got := p.e.Pending(); len(got) != 0 {
		t.Errorf("Pending when all is answered: %v", got)
	}
}

// TestDeniedCandidateIsNotForgotten: the second successor must not allow what the first had reason to deny.
func TestDeniedCandidateIsNotForgotten(t *testing.T) {
	a, b := blobOf("a", 16), blobOf("b", 16)
	p := begin(t, a, b)
	done := p.read(a.Key, 0)
	p.next()
	left := p.end()
	withoutIdentity(left.Messages)
	p.open(left, a, b)
	p.answer(p.next(), fscache.EIO) // of a, whose bytes are not there
	records := p.e.Pending()
	left = p.end()
	left.Messages, left.Pending = nil, records
	p.open(left, a, b)
	for range 2 {
		r := p.next()
		p.fill(r)
		p.answer(r, fscache.OK)
	}
	if err := await(t, done); err != nil {
		t.Error(err)
	}
}

// A process may die between an answer and what follows it, and the next ones before they have put anything in order: a message of an event
// that was answered, of an object that is gone since, beside the message of an event that has its number now.
func TestMessageOfAnObjectThatIsGoneDoesNotDenyAnother(t *testing.T) {
	a := blobOf("a", 16)
	p := begin(t, a)
	done := p.read(a.Key, 0)
	p.next()
	left := p.end()
	stale := slices.Clone(left.Messages[0])
	identify(stale, inode{dev: 1, ino: 1}) // of a file that is under no mark
	left.Messages = append([][]byte{stale}, left.Messages...)
	p.open(left, a)
	r := p.next()
	p.fill(r)
	p.answer(r, fscache.OK)
	if err := await(t, done); err != nil {
		t.Errorf("the reader got %v", err)
	}
}

// A process may die with an event of a file that nobody wrote down, when no object has holes any more; and so may the next, before it has
// answered. Nothing but the list of what is pending says then that there is an event.
func TestEventOfNobodyKnowsWhatIsPendingUntilItIsAnswered(t *testing.T) {
	a := blobOf("a", 4)
	p := begin(t, a)
	done := p.read(a.Key, 0)
	r := p.next()
	p.fill(fscache.Request{Op: fscache.OpRead, Object: a.Key, Off: 0, Len: a.Size, ID: r.ID})
	left := p.end()
	unidentify(left.Messages[0])
	p.open(left, a)
	if err := p.e.Complete(a.Key); err != nil {
		t.Fatal(err)
	}
	list := p.e.Pending()
	if len(list) != 1 || list[0].ID != r.ID {
		t.Fatalf("pending %+v, want event %d", list, r.ID)
	}
	left = p.end()
	left.Messages, left.Pending = nil, list
	p.open(left, a)
	again := p.next()
	p.answer(again, fscache.OK)
	if err := await(t, done); err != nil {
		t.Errorf("the reader got %v", err)
	}
}
