package fanotify

import (
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// The group here is a pipe, which takes no answer until the test says so: nothing else keeps the kernel from taking one.
func TestRequestIsPendingUntilItsAnswerWasWritten(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	event, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	e := &Engine{
		group: w, inFlight: 1,
		pending: map[int32]pendingEvent{int32(event): {token: 1, slot: noSlot, object: &object{key: testObject.Key}, len: page}},
	}
	e.room.L = &e.mu
	request := fscache.Request{Op: fscache.OpRead, Object: testObject.Key, Len: page, ID: uint64(event), Token: 1}
	if err := w.SetWriteDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if err := e.Answer(request, fscache.OK); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("Answer: %v, want that it could not be written", err)
	}
	if got := e.Pending(); len(got) != 1 || got[0].ID != request.ID {
		t.Errorf("before the answer was written a successor is told of %v, want the request", got)
	}
	if err := e.Answer(request, fscache.OK); !errors.Is(err, fscache.ErrAnswered) {
		t.Errorf("a second Answer: %v, want ErrAnswered", err)
	}
	if err := w.SetWriteDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if err := e.finish(int32(event), noSlot, fscache.OK); err != nil {
		t.Error(err)
	}
	if got := e.Pending(); len(got) != 0 {
		t.Errorf("after the answer was written a successor is told of %v", got)
	}
	if inUse(int32(event)) {
		t.Error("the event's number is still taken")
	}
}
