package fanotify

import (
	"errors"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/enginetest"
)

// A spyInbox calls freed before it frees a slot.
type spyInbox struct {
	*enginetest.Inbox
	freed func()
}

func (s spyInbox) Free(slot int) {
	s.freed()
	s.Inbox.Free(slot)
}

func TestSlotIsFreedOnlyAfterTheAnswer(t *testing.T) {
	var done <-chan error
	var number int32
	freed := 0
	spy := spyInbox{enginetest.NewInbox(4, 128), func() {
		freed++
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Fatal("the slot was freed before the reader was let go")
		}
		if !inUse(number) {
			t.Error("the number was free before the slot")
		}
	}}
	e := open(t, Config{Inbox: spy})
	path := add(t, e, testObject)
	for i := range int64(20) {
		done = reading(path, i*page)
		r, err := e.Next()
		if err != nil {
			t.Fatal(err)
		}
		if spy.Lent() != 1 {
			t.Errorf("%d slots are lent", spy.Lent())
		}
		number = int32(r.ID)
		if err := e.Answer(r, fscache.OK); err != nil {
			t.Fatal(err)
		}
	}
	if freed != 20 || spy.Lent() != 0 {
		t.Errorf("%d slots freed, %d lent", freed, spy.Lent())
	}
}

func TestEveryPathGivesItsSlotBack(t *testing.T) {
	inbox := enginetest.NewInbox(4, 128)
	e := open(t, Config{Inbox: inbox})
	path := add(t, e, testObject)
	// Of a file that is no object.
	o := e.objects[testObject.Key]
	e.mu.Lock()
	delete(e.byInode, o.inode)
	e.mu.Unlock()
	next := make(chan error, 1)
	go func() { // ends with Freeze
		_, err := e.Next()
		next <- err
	}()
	for range 10 {
		if err := await(t, reading(path, 0)); !errors.Is(err, unix.EIO) {
			t.Errorf("reader got %v, want EIO", err)
		}
	}
	if err := e.Freeze(); err != nil {
		t.Fatal(err)
	}
	await(t, next)
	if inbox.Lent() != 0 || len(inbox.Messages()) != 0 {
		t.Errorf("%d slots are lent", inbox.Lent())
	}
}

func TestUnansweredEventKeepsItsSlotWhenTheEngineIsClosed(t *testing.T) {
	inbox := enginetest.NewInbox(4, 128)
	e := open(t, Config{Inbox: inbox})
	path := add(t, e, testObject)
	done := reading(path, 0)
	if _, err := e.Next(); err != nil {
		t.Fatal(err)
	}
	e.Close()
	await(t, done)
	if inbox.Lent() != 1 {
		t.Errorf("%d slots are lent, want that of the event", inbox.Lent())
	}
}

func TestEventsWaitInTheKernelWhileSlotsAreShort(t *testing.T) {
	e := open(t, Config{Inbox: enginetest.NewInbox(3, 128)})
	if e.limit != 2 {
		t.Errorf("%d events are let in, want one less than there are slots", e.limit)
	}
	if _, err := Open(Config{Dir: t.TempDir(), Inbox: enginetest.NewInbox(1, 128)}); err == nil {
		t.Error("an inbox of one slot was accepted")
	}
	small := open(t, Config{Inbox: enginetest.NewInbox(4, SlotLen-8)})
	if _, err := small.Next(); err == nil {
		t.Error("slots that are too small were used")
	}
}

func TestIdentityIsAllThereOrNotThere(t *testing.T) {
	slot := make([]byte, SlotLen)
	id := inode{dev: 0xfe00, ino: 12345}
	if _, ok := identity(slot); ok {
		t.Error("an empty slot has an identity")
	}
	identify(slot, id)
	if got, ok := identity(slot); !ok || got != id {
		t.Errorf("identity: %v, %v", got, ok)
	}
	if _, ok := identity(slot[:SlotLen-1]); ok {
		t.Error("a slot that was cut has an identity")
	}
	for i := identityAt; i < SlotLen; i += 8 {
		torn := slices.Clone(slot)
		clear(torn[i : i+8])
		if got, ok := identity(torn); ok {
			t.Errorf("identity with a part missing: %v", got)
		}
	}
	unidentify(slot)
	if _, ok := identity(slot); ok {
		t.Error("the identity was not removed")
	}
}

// TestSlotOfTheReadThatWaitsHasNoIdentity: a slot that was used before must not give the next event the file of the last one.
func TestSlotOfTheReadThatWaitsHasNoIdentity(t *testing.T) {
	mem := make([]byte, 2*128)
	inbox := enginetest.NewInboxIn(mem, 128)
	e := open(t, Config{Inbox: inbox})
	path := add(t, e, testObject)
	for range 3 {
		done := reading(path, 0)
		r, err := e.Next()
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Answer(r, fscache.OK); err != nil {
			t.Fatal(err)
		}
		if err := await(t, done); err != nil {
			t.Fatal(err)
		}
	}
	e.reading.Lock()
	slot, p, err := e.take()
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := identity(p); !ok {
		t.Fatal("the slot was not used before")
	}
	e.free(slot)
	e.reading.Unlock()
	ended := make(chan error, 1)
	go func() { // ends with Freeze
		_, err := e.Next()
		ended <- err
	}()
	for inbox.Lent() == 0 {
		runtime.Gosched()
	}
	if err := e.Freeze(); err != nil {
		t.Fatal(err)
	}
	await(t, ended)
	for p := range slices.Chunk(mem, 128) {
		if id, ok := identity(p); ok && &p[0] == &mem[slot*128] {
			t.Errorf("the read that waited had a slot with the identity %v", id)
		}
	}
}
