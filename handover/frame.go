package handover

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// The upgrade protocol (PROTOCOL.md) is spoken in frames, one a packet.
const (
	frameHeader = 16
	maxBody     = 64 << 10
	// maxFrameFiles is below what the kernel lets one message carry (maxPassed), which other systems' forks of it have lowered.
	maxFrameFiles = 250

	eternalVersion = 1 // in the header of every hello and abort, for all time
	minVersion     = 1 // the versions this release speaks
	maxVersion     = 1
)

var frameMagic = [4]byte{'H', 'F', 'H', 'O'}

// A frameType says what a frame means.
type frameType uint16

const (
	frameHello frameType = 1 + iota
	frameRecord
	framePrepared
	frameReady
	frameCommit
	frameTaken
	frameGo
	frameDrained
	frameAbort
	frameTypes // one more than the last
)

var frameNames = [frameTypes]string{"", "hello", "record", "prepared", "ready", "commit", "taken", "go", "drained", "abort"}

func (t frameType) String() string {
	if t == 0 || t >= frameTypes {
		return fmt.Sprintf("frame of unknown type %d", uint16(t))
	}
	return frameNames[t]
}

// Errors of decoding.
var (
	errFrameShort    = errors.New("shorter than a frame's header")
	errFrameMagic    = errors.New("not a frame of this protocol")
	errFrameLength   = errors.New("the length does not fit the packet")
	errFrameChecksum = errors.New("the checksum does not match")
	errFrameVersion  = errors.New("of another version of the protocol than agreed on")
	errFrameType     = errors.New("of an unknown type")
	errFrameBody     = errors.New("malformed body")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// appendFrame appends a whole frame to b. The body has at most maxBody bytes.
func appendFrame(b []byte, version uint16, t frameType, body []byte) []byte {
	start := len(b)
	b = append(b, frameMagic[:]...)
	b = binary.LittleEndian.AppendUint16(b, version)
	b = binary.LittleEndian.AppendUint16(b, uint16(t))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(body)))
	b = binary.LittleEndian.AppendUint32(b, checksum(b[start:], body))
	return append(b, body...)
}

func checksum(head, body []byte) uint32 {
	return crc32.Update(crc32.Checksum(head, castagnoli), castagnoli, body)
}

// decodeFrame parses a packet. The body is part of b. The error is one of those above.
func decodeFrame(b []byte) (version uint16, t frameType, body []byte, err error) {
	if len(b) < frameHeader {
		return 0, 0, nil, errFrameShort
	}
	if [4]byte(b) != frameMagic {
		return 0, 0, nil, errFrameMagic
	}
	body = b[frameHeader:]
	if n := binary.LittleEndian.Uint32(b[8:]); len(body) > maxBody || uint64(n) != uint64(len(body)) {
		return 0, 0, nil, errFrameLength
	}
	if binary.LittleEndian.Uint32(b[12:]) != checksum(b[:12], body) {
		return 0, 0, nil, errFrameChecksum
	}
	version, t = binary.LittleEndian.Uint16(b[4:]), frameType(binary.LittleEndian.Uint16(b[6:]))
	if t == 0 || t >= frameTypes {
		return 0, 0, nil, errFrameType
	}
	return version, t, body, nil
}

// appendCount is the body of prepared, commit and drained.
func appendCount(b []byte, n uint32) []byte { return binary.LittleEndian.AppendUint32(b, n) }

func decodeCount(body []byte) (uint32, error) {
	if len(body) != 4 {
		return 0, fmt.Errorf("%w: a count of %d bytes", errFrameBody, len(body))
	}
	return binary.LittleEndian.Uint32(body), nil
}

// maxAbort is the longest text of an abort.
const maxAbort = 1024

// abortBody is the body of an abort.
func abortBody(why error) []byte {
	text := why.Error()
	return []byte(text[:min(len(text), maxAbort)])
}

func decodeAbort(body []byte) (string, error) {
	if len(body) > maxAbort {
		return "", fmt.Errorf("%w: a text of %d bytes", errFrameBody, len(body))
	}
	return string(body), nil
}

// A reader takes values off a body. After the first that is not there all are zero, and bad is set.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) []byte {
	if r.bad || n > len(r.b) {
		r.bad = true
		return nil
	}
	v := r.b[:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) u8() int {
	if v := r.take(1); v != nil {
		return int(v[0])
	}
	return 0
}

func (r *reader) u16() uint16 {
	if v := r.take(2); v != nil {
		return binary.LittleEndian.Uint16(v)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if v := r.take(4); v != nil {
		return binary.LittleEndian.Uint32(v)
	}
	return 0
}

func (r *reader) text() string { return string(r.take(r.u8())) }

// list reads strings; each takes at least a byte, so that a count cannot ask for more memory than the body has.
func (r *reader) list() []string {
	n := int(r.u16())
	if n > len(r.b) {
		r.bad = true
		return nil
	}
	list := make([]string, 0, n)
	for range n {
		list = append(list, r.text())
	}
	return list
}

// appendText appends a string of at most 255 bytes.
func appendText(b []byte, s string) []byte { return append(append(b, byte(len(s))), s...) }

func appendList(b []byte, list []string) []byte {
	b = binary.LittleEndian.AppendUint16(b, uint16(len(list)))
	for _, s := range list {
		b = appendText(b, s)
	}
	return b
}
