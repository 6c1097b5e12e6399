package fanotify

import (
	"encoding/binary"
	"fmt"
	"math"
)

// Sizes and constants of include/uapi/linux/fanotify.h, in bytes. The range record came with Linux 6.14.
const (
	eventMetadataLen = 24 // struct fanotify_event_metadata
	infoHeaderLen    = 4  // struct fanotify_event_info_header
	infoRangeLen     = 24 // struct fanotify_event_info_range
	maxEventLen      = eventMetadataLen + infoRangeLen

	metadataVersion = 3 // FANOTIFY_METADATA_VERSION
	infoTypeRange   = 6 // FAN_EVENT_INFO_TYPE_RANGE
	noFD            = -1
)

// An Event is one decoded record of the group.
type Event struct {
	Mask uint64
	FD   int32 // the kernel's descriptor of the file read, and the event's name in the answer; -1: none
	PID  int32 // who reads; 0 when it is in another pid namespace

	// The bytes the reader needs, page-aligned by the kernel; the end may lie past the file's. Without a range record
	// (HasRange false) it may need any of them.
	HasRange bool
	Off, Len int64

	file inode // of the descriptor, once that was asked
}

// A MalformedError says which field of a kernel message does not make sense.
type MalformedError struct {
	Field string
	Value uint64
	Have  int // bytes there were
}

func (e *MalformedError) Error() string {
	return fmt.Sprintf("malformed fanotify event: %s is %d in a buffer of %d bytes", e.Field, e.Value, e.Have)
}

// DecodeEvent decodes the first event of b and returns what is left of b. Errors are *MalformedError; the Event then
// holds FD where that could still be told (else -1), so that its reader can be denied, and nothing of b is left.
//
// Layout: include/uapi/linux/fanotify.h, struct fanotify_event_metadata version 3 (since 2.6.37), followed by info
// records; records of types not known here are skipped by their length, as the header demands of readers.
func DecodeEvent(b []byte) (Event, []byte, error) {
	ev := Event{FD: noFD}
	if len(b) < eventMetadataLen {
		return ev, nil, &MalformedError{Field: "buffer length", Value: uint64(len(b)), Have: len(b)}
	}
	if v := b[4]; v != metadataVersion {
		return ev, nil, &MalformedError{Field: "vers", Value: uint64(v), Have: len(b)}
	}
	ev.Mask = binary.NativeEndian.Uint64(b[8:])
	ev.FD = int32(binary.NativeEndian.Uint32(b[16:]))
	ev.PID = int32(binary.NativeEndian.Uint32(b[20:]))
	if ev.FD < 0 {
		ev.FD = noFD
	}
	total := binary.NativeEndian.Uint32(b)
	if total < eventMetadataLen || uint64(total) > uint64(len(b)) {
		return ev, nil, &MalformedError{Field: "event_len", Value: uint64(total), Have: len(b)}
	}
	head := binary.NativeEndian.Uint16(b[6:])
	if head < eventMetadataLen || uint32(head) > total {
		return ev, nil, &MalformedError{Field: "metadata_len", Value: uint64(head), Have: len(b)}
	}
	if err := ev.decodeInfo(b[head:total]); err != nil {
		return ev, nil, err
	}
	return ev, b[total:], nil
}

// decodeInfo reads the info records of one event.
func (ev *Event) decodeInfo(b []byte) error {
	for len(b) > 0 {
		if len(b) < infoHeaderLen {
			return &MalformedError{Field: "info record", Value: uint64(len(b)), Have: len(b)}
		}
		n := int(binary.NativeEndian.Uint16(b[2:]))
		if n < infoHeaderLen || n > len(b) {
			return &MalformedError{Field: "info len", Value: uint64(n), Have: len(b)}
		}
		if b[0] == infoTypeRange {
			if err := ev.decodeRange(b[:n]); err != nil {
				return err
			}
		}
		b = b[n:]
	}
	return nil
}

// decodeRange reads struct fanotify_event_info_range: header, u32 pad, u64 offset, u64 count.
func (ev *Event) decodeRange(b []byte) error {
	if ev.HasRange {
		return &MalformedError{Field: "second range record", Value: uint64(b[0]), Have: len(b)}
	}
	if len(b) < infoRangeLen {
		return &MalformedError{Field: "range record len", Value: uint64(len(b)), Have: len(b)}
	}
	off := binary.NativeEndian.Uint64(b[8:])
	count := binary.NativeEndian.Uint64(b[16:])
	if off > math.MaxInt64 {
		return &MalformedError{Field: "offset", Value: off, Have: len(b)}
	}
	if count > math.MaxInt64-off {
		return &MalformedError{Field: "count", Value: count, Have: len(b)}
	}
	ev.HasRange, ev.Off, ev.Len = true, int64(off), int64(count)
	return nil
}
