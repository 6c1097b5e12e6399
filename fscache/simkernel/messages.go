package simkernel

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/cachefiles"
	"holdfast/fscache/fanotify"
)

// messageSize is room for any message, and for what a process notes behind it.
const messageSize = cachefiles.CACHEFILES_MSG_MAX_SIZE

// encodeCachefiles lays a request out as read(2) of the device does (include/uapi/linux/cachefiles.h).
func encodeCachefiles(b []byte, p fscache.Pending) {
	le := binary.NativeEndian
	n, op := 16, uint32(cachefiles.CACHEFILES_OP_CLOSE)
	switch p.Op {
	case fscache.OpOpen:
		op = cachefiles.CACHEFILES_OP_OPEN
		keys := append(append(b[32:32], volumePrefix...), p.Object.Domain...)
		keys = append(keys, 0)
		le.PutUint32(b[16:], uint32(len(keys)))
		le.PutUint32(b[20:], uint32(len(p.Object.ID)))
		le.PutUint32(b[24:], p.Handle) // the number of a descriptor, which nobody looks at here
		n = 32 + len(append(keys, p.Object.ID...))
	case fscache.OpRead:
		op = cachefiles.CACHEFILES_OP_READ
		le.PutUint64(b[16:], uint64(p.Off))
		le.PutUint64(b[24:], uint64(p.Len))
		n = 32
	}
	le.PutUint32(b, uint32(p.ID))
	le.PutUint32(b[4:], op)
	le.PutUint32(b[8:], uint32(n))
	le.PutUint32(b[12:], p.Handle)
}

// messageLen is the length that a message of cachefiles has in its slot; 0: there is none.
func messageLen(b []byte) int {
	if len(b) < 16 {
		return 0
	}
	if n := binary.NativeEndian.Uint32(b[8:]); int64(n) <= int64(len(b)) {
		return int(n)
	}
	return 0
}

// An event is as long as its metadata and its range; behind it the process notes which object it is about.
const (
	eventLen = 48
	noteAt   = 64
)

// encodeEvent lays an event out as read(2) of the group does (include/uapi/linux/fanotify.h).
func encodeEvent(b []byte, number uint64, off, n int64) {
	le := binary.NativeEndian
	le.PutUint32(b, eventLen)
	b[4] = 3 // FANOTIFY_METADATA_VERSION
	le.PutUint16(b[6:], 24)
	le.PutUint64(b[8:], unix.FAN_PRE_ACCESS)
	le.PutUint32(b[16:], uint32(number))
	b[24] = 6 // FAN_EVENT_INFO_TYPE_RANGE
	le.PutUint16(b[26:], 24)
	le.PutUint64(b[32:], uint64(off))
	le.PutUint64(b[40:], uint64(n))
}

// note writes down which object an event is about: its descriptor, which alone says so, dies with the process. The length comes
// last: without it there is no note.
func note(b []byte, k fscache.Key) {
	b[noteAt+1] = byte(len(k.Domain))
	copy(b[noteAt+2:], k.Domain)
	copy(b[noteAt+2+len(k.Domain):], k.ID)
	b[noteAt] = byte(len(k.Domain) + len(k.ID))
}

// decodeEvent is what a message and its note say to a successor. Without a note the object's key is empty.
func decodeEvent(b []byte) (fscache.Pending, bool) {
	if len(b) < eventLen {
		return fscache.Pending{}, false
	}
	ev, _, err := fanotify.DecodeEvent(b[:eventLen])
	if err != nil || ev.FD < 0 {
		return fscache.Pending{}, false
	}
	p := fscache.Pending{Op: fscache.OpRead, Off: ev.Off, Len: ev.Len, ID: uint64(ev.FD)}
	if len(b) > noteAt+2 && b[noteAt] > 0 && int(b[noteAt])+noteAt+2 <= len(b) {
		d, all := int(b[noteAt+1]), string(b[noteAt+2:noteAt+2+int(b[noteAt])])
		p.Object = fscache.Key{Domain: all[:d], ID: all[d:]}
	}
	return p, true
}
