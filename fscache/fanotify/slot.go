package fanotify

import (
	"encoding/binary"
	"fmt"

	"holdfast/fscache"
)

// A slot of the inbox holds one event as the kernel wrote it, and behind it which file the event is of. The event itself has only the
// number of a descriptor, which dies with the process.
const (
	identityAt  = maxEventLen
	identityLen = 24 // u64 device, inode, check

	// SlotLen is how long the slots of an engine's inbox are at least, in bytes.
	SlotLen = identityAt + identityLen
)

// noSlot stands for the slot of an engine that has no inbox.
const noSlot = -1

// identityCheck tells an identity from one that was not written, or not to its end.
func identityCheck(id inode) uint64 {
	return (id.dev*0x9e3779b97f4a7c15^id.ino)*0xbf58476d1ce4e5b9 ^ 0x686f6c6466617374
}

// unidentify removes what an earlier event left in the slot.
//
// ORDER: before the read. A process that dies right behind it must not leave a new event with an old one's file.
func unidentify(slot []byte) { clear(slot[identityAt:SlotLen]) }

// identify writes down which file the slot's event is of.
func identify(slot []byte, id inode) {
	binary.NativeEndian.PutUint64(slot[identityAt:], id.dev)
	binary.NativeEndian.PutUint64(slot[identityAt+8:], id.ino)
	binary.NativeEndian.PutUint64(slot[identityAt+16:], identityCheck(id))
}

// identity reads it back. ok is false where a process died before it was written.
func identity(slot []byte) (id inode, ok bool) {
	if len(slot) < SlotLen {
		return inode{}, false
	}
	id.dev = binary.NativeEndian.Uint64(slot[identityAt:])
	id.ino = binary.NativeEndian.Uint64(slot[identityAt+8:])
	return id, binary.NativeEndian.Uint64(slot[identityAt+16:]) == identityCheck(id)
}

// take lends a slot for the next read; the engine's own memory if it has no inbox. reading is held.
func (e *Engine) take() (int, []byte, error) {
	if e.inbox == nil {
		return noSlot, e.private[:], nil
	}
	slot, p, ok := e.inbox.Take()
	if !ok {
		return noSlot, nil, fmt.Errorf("the inbox has no slot left for %d events", e.limit+1)
	}
	if len(p) < SlotLen {
		e.inbox.Free(slot)
		return noSlot, nil, fmt.Errorf("the inbox has slots of %d bytes, an event needs %d", len(p), SlotLen)
	}
	return slot, p, nil
}

// free gives a slot back.
func (e *Engine) free(slot int) {
	if slot != noSlot {
		e.inbox.Free(slot)
	}
}

// checkInbox refuses one that has no slot besides that of the read which waits.
func checkInbox(b fscache.Inbox) error {
	if b != nil && b.Slots() < 2 {
		return fmt.Errorf("an inbox of %d slots: it needs two at least", b.Slots())
	}
	return nil
}
