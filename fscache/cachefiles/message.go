package cachefiles

import (
	"encoding/binary"
	"fmt"
	"math"
	"strings"
)

// Constants of include/uapi/linux/cachefiles.h, in the kernel's spelling (Linux 5.19; removed in 7.2).
const (
	CACHEFILES_MSG_MAX_SIZE = 1024

	CACHEFILES_OP_OPEN  = 0
	CACHEFILES_OP_CLOSE = 1
	CACHEFILES_OP_READ  = 2

	CACHEFILES_IOC_READ_COMPLETE = 0x40049801 // _IOW(0x98, 1, int)
)

// Sizes in bytes of struct cachefiles_msg, cachefiles_open (without its keys) and cachefiles_read.
const (
	msgLen  = 16
	openLen = 16
	readLen = 16
)

// A Message is one request of the kernel's, as read from the device.
type Message struct {
	ID       uint32 // among pending requests only
	Opcode   uint32
	ObjectID uint32 // new at each open

	Open OpenBody // CACHEFILES_OP_OPEN
	Read ReadBody // CACHEFILES_OP_READ
}

// OpenBody asks for the size of an object.
type OpenBody struct {
	FD     int32  // of the object, in the process that read the message; without close-on-exec
	Flags  uint32 // none defined
	Volume string // volume key, without its NUL
	Cookie string // cookie key: bytes of any value
}

// ReadBody asks for the bytes of a hole.
type ReadBody struct{ Off, Len int64 }

// A MalformedError says which field of a message does not make sense.
type MalformedError struct {
	Field string
	Value uint64
	Have  int // bytes there were
}

func (e *MalformedError) Error() string {
	return fmt.Sprintf("malformed cachefiles message: %s is %d in %d bytes", e.Field, e.Value, e.Have)
}

// DecodeMessage decodes what one read(2) of the device returned. Errors are *MalformedError; the Message then holds what
// the header says if there is a whole header (16 bytes), so that the request can be refused.
//
// Layout: include/uapi/linux/cachefiles.h, struct cachefiles_msg and what follows it by opcode, in host byte order.
func DecodeMessage(b []byte) (Message, error) {
	if len(b) < msgLen {
		return Message{}, &MalformedError{Field: "buffer length", Value: uint64(len(b)), Have: len(b)}
	}
	m := Message{
		ID:       binary.NativeEndian.Uint32(b),
		Opcode:   binary.NativeEndian.Uint32(b[4:]),
		ObjectID: binary.NativeEndian.Uint32(b[12:]),
	}
	if n := messageLength(b); uint64(n) != uint64(len(b)) {
		return m, &MalformedError{Field: "len", Value: uint64(n), Have: len(b)}
	}
	body := b[msgLen:]
	var err error
	switch m.Opcode {
	case CACHEFILES_OP_OPEN:
		m.Open, err = decodeOpen(body)
	case CACHEFILES_OP_READ:
		m.Read, err = decodeRead(body)
	case CACHEFILES_OP_CLOSE:
		if len(body) != 0 {
			err = &MalformedError{Field: "close length", Value: uint64(len(body)), Have: len(body)}
		}
	default:
		err = &MalformedError{Field: "opcode", Value: uint64(m.Opcode), Have: len(b)}
	}
	return m, err
}

// messageLength is what a message says of its own length. b has a header.
func messageLength(b []byte) uint32 { return binary.NativeEndian.Uint32(b[8:]) }

// decodeOpen reads struct cachefiles_open: u32 volume_key_size (with the NUL), cookie_key_size, fd, flags, the two keys.
func decodeOpen(b []byte) (OpenBody, error) {
	if len(b) < openLen {
		return OpenBody{}, &MalformedError{Field: "open length", Value: uint64(len(b)), Have: len(b)}
	}
	volume := uint64(binary.NativeEndian.Uint32(b))
	cookie := uint64(binary.NativeEndian.Uint32(b[4:]))
	fd := binary.NativeEndian.Uint32(b[8:])
	keys := b[openLen:]
	switch {
	case volume == 0 || volume > uint64(len(keys)):
		return OpenBody{}, &MalformedError{Field: "volume_key_size", Value: volume, Have: len(b)}
	case cookie != uint64(len(keys))-volume:
		return OpenBody{}, &MalformedError{Field: "cookie_key_size", Value: cookie, Have: len(b)}
	case fd > math.MaxInt32:
		return OpenBody{}, &MalformedError{Field: "fd", Value: uint64(fd), Have: len(b)}
	}
	name := string(keys[:volume])
	if nul := strings.IndexByte(name, 0); nul != len(name)-1 {
		return OpenBody{}, &MalformedError{Field: "place of the NUL in the volume key", Value: uint64(nul), Have: len(b)}
	}
	return OpenBody{
		FD:     int32(fd),
		Flags:  binary.NativeEndian.Uint32(b[12:]),
		Volume: name[:len(name)-1],
		Cookie: string(keys[volume:]),
	}, nil
}

// decodeRead reads struct cachefiles_read: u64 off, len.
func decodeRead(b []byte) (ReadBody, error) {
	if len(b) != readLen {
		return ReadBody{}, &MalformedError{Field: "read length", Value: uint64(len(b)), Have: len(b)}
	}
	off := binary.NativeEndian.Uint64(b)
	n := binary.NativeEndian.Uint64(b[8:])
	if off > math.MaxInt64 {
		return ReadBody{}, &MalformedError{Field: "off", Value: off, Have: len(b)}
	}
	if n == 0 || n > math.MaxInt64-off {
		return ReadBody{}, &MalformedError{Field: "len of the range", Value: n, Have: len(b)}
	}
	return ReadBody{Off: int64(off), Len: int64(n)}, nil
}

// encode lays a message out as the kernel does, for a successor that has only a record of it.
func encode(m Message) []byte {
	var body []byte
	ne := binary.NativeEndian
	switch m.Opcode {
	case CACHEFILES_OP_OPEN:
		body = ne.AppendUint32(body, uint32(len(m.Open.Volume)+1))
		body = ne.AppendUint32(body, uint32(len(m.Open.Cookie)))
		body = ne.AppendUint32(body, uint32(m.Open.FD))
		body = ne.AppendUint32(body, m.Open.Flags)
		body = append(body, m.Open.Volume+"\x00"+m.Open.Cookie...)
	case CACHEFILES_OP_READ:
		body = ne.AppendUint64(body, uint64(m.Read.Off))
		body = ne.AppendUint64(body, uint64(m.Read.Len))
	}
	b := ne.AppendUint32(nil, m.ID)
	b = ne.AppendUint32(b, m.Opcode)
	b = ne.AppendUint32(b, uint32(msgLen+len(body)))
	b = ne.AppendUint32(b, m.ObjectID)
	return append(b, body...)
}
