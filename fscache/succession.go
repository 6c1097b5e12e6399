package fscache

import (
	"context"
	"os"
)

// An Inbox lends memory that outlives the process, for the kernel to write requests into: read(2) straight into a slot leaves no
// instruction at which a request exists only in private memory (I2). Package state has the one that is used; its methods may be
// called from any goroutine.
type Inbox interface {
	// Take lends a slot, at least as long as any message of the engine's and zero at its beginning. ok is false while all are lent.
	Take() (slot int, p []byte, ok bool)
	// Free gives a slot back. ORDER: after the kernel has the answer; a successor would else not know of the request.
	Free(slot int)
	// Slots is how many there are.
	Slots() int
}

// A Held is a descriptor that an engine needs for an object, and that the supervisor holds beyond the process.
type Held struct {
	Object Object
	Handle uint32 // cachefiles: the kernel's id of this opening of the object; fanotify: 0
	File   *os.File
}

// A Holder puts descriptors where they outlive the process. Engines call it from any goroutine, with none of their locks held.
type Holder interface {
	// Hold returns when the descriptor is on record and the supervisor has it. It keeps no reference to h.File.
	// ORDER: record, then supervisor, then the kernel is told that the object is open: what a successor inherits it can name.
	Hold(h Held) error
	// Drop lets go of what Hold put away, after the engine has closed its own. Dropping what is not held changes nothing.
	Drop(h Held)
}

// A Pending is a request that some process read and has not answered.
type Pending struct {
	Op       Op
	Object   Key
	Off, Len int64  // OpRead
	ID       uint64 // message id, or number of the event's descriptor in the process that read it
	Handle   uint32 // cachefiles: the kernel's id of the object; fanotify: 0
}

// Inherited is what an engine's predecessor left, or, in a hot upgrade, lends. The engine owns the files whatever Open returns.
type Inherited struct {
	Lifeline *os.File // nil: there was no predecessor, and nothing else is set
	Objects  []Held

	// The predecessor is dead: what it had read and not answered, as messages from its inboxes and as records of them. Both may
	// name the same request, and requests it answered with its last breath.
	Messages [][]byte
	Pending  []Pending

	// Alive: the predecessor goes on reading and answering until Successor.Expect. Open then changes nothing in the kernel:
	// no restore, no sweep, no mark.
	Alive bool
}

// A Successor is the part of an engine that moves work from one process to the next. In the predecessor of a hot upgrade, after
// Freeze: Pending. In the successor, opened with Inherited.Alive and before its first Next: Expect, once; then Finished for each
// request the predecessor answered, and Replay, once, when it has ended.
type Successor interface {
	// Pending lists the requests that were read and not answered.
	Pending() []Pending
	// Thaw takes Freeze back: Next reads again. Callers that Freeze turned away call Next anew.
	Thaw() error
	// Abandon makes a mount unreadable that was made under a lifeline which is gone, so that nobody reads zeros from it (I1), and
	// unmounts it lazily, or, without a Dir, does it to what is mounted somewhere else. Its blobs must not have been added. What could not be done is in the error; the rest was done.
	Abandon(ctx context.Context, m Mount) error
	// Holding lists the objects whose descriptors this engine has, with the files, which stay the engine's.
	Holding() []Held
	// Expect tells which requests the predecessor still has, that of the inherited objects those with handles in gone are
	// closed, and which were opened since (their files are the engine's). From here on this process may read requests. It fails,
	// and nothing is changed, if the predecessor has a number that this process cannot keep clear of (fanotify).
	Expect(pending []Pending, opened []Held, gone []Held) error
	// Finished says that the predecessor has answered a request of Expect's. An id that is not expected is ignored.
	Finished(id uint64)
	// Replay says that the predecessor reads and answers no more: Next hands out what it did not finish.
	Replay()
}
