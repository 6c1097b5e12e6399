package state

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// An inbox file, in the byte order of the host, which it never leaves:
//
//	0    8   "HFINBOX" and a newline
//	8    4   layout version
//	12   4   CRC-32 (IEEE) of the page with this field zero
//	16   64  boot id, NUL padded
//	80   64  release, NUL padded
//	144  64  engine, NUL padded
//	208  4   pid
//	212  4   slots
//	216  4   bytes of a message
//	220  ..  zero, up to 4096
//
// and then the slots, 64-byte aligned, each:
//
//	0    4   state: 0 free, 1 lent
//	4    60  zero
//	64   ..  message, with zeros to a multiple of 64
//
// The fields up to 144 are the same in every layout.
const (
	inboxMagic   = "HFINBOX\n"
	inboxVersion = 1
	inboxPage    = 4096

	stateLine = 64 // bytes of a slot before its message
	zeroed    = 64 // bytes of a message that Take zeroes; no engine's message is zero there

	// What bounds a reader's time and memory, whatever a file claims.
	maxInboxSlots   = 1 << 16
	maxInboxMessage = 1 << 16
	maxInboxBytes   = 1 << 28
)

// unfinishedPrefix begins the name of an inbox that is being made: no slot of it was ever lent.
const unfinishedPrefix = "new-"

// An InboxHeader says whose an inbox is.
type InboxHeader struct {
	Engine  string // whose messages
	Boot    string // boot id
	Release string // of the program that made it
	PID     int
}

// An inboxShape is where things lie in the file.
type inboxShape struct {
	slots, size int
	stride      int // from one slot to the next
}

func newShape(slots, size int) (inboxShape, error) {
	if slots < 1 || slots > maxInboxSlots || size < 1 || size > maxInboxMessage {
		return inboxShape{}, fmt.Errorf("%d slots of %d bytes", slots, size)
	}
	s := inboxShape{slots: slots, size: size, stride: stateLine + (size+63)&^63}
	if s.fileSize() > maxInboxBytes {
		return inboxShape{}, fmt.Errorf("%d slots of %d bytes are more than %d", slots, size, maxInboxBytes)
	}
	return s, nil
}

func (s inboxShape) offset(slot int) int { return inboxPage + slot*s.stride }
func (s inboxShape) fileSize() int64     { return int64(s.offset(s.slots)) }

func (h InboxHeader) encode(slots, size int) ([]byte, inboxShape, error) {
	shape, err := newShape(slots, size)
	if err != nil {
		return nil, shape, err
	}
	p := make([]byte, inboxPage)
	copy(p, inboxMagic)
	binary.NativeEndian.PutUint32(p[8:], inboxVersion)
	for at, v := range map[int]string{16: h.Boot, 80: h.Release, 144: h.Engine} {
		if len(v) > 64 || strings.ContainsRune(v, 0) {
			return nil, shape, fmt.Errorf("header field %q", v)
		}
		copy(p[at:], v)
	}
	for at, v := range map[int]int{208: h.PID, 212: slots, 216: size} {
		binary.NativeEndian.PutUint32(p[at:], uint32(v))
	}
	binary.NativeEndian.PutUint32(p[12:], inboxSum(p))
	return p, shape, nil
}

// inboxSum is the checksum of a header's page.
func inboxSum(p []byte) uint32 {
	sum := crc32.ChecksumIEEE(p[:12])
	sum = crc32.Update(sum, crc32.IEEETable, make([]byte, 4))
	return crc32.Update(sum, crc32.IEEETable, p[16:])
}

var errOtherBoot = errors.New("inbox of another boot")

// decodeInbox decodes a header's page. Errors are errOtherBoot, which any layout can be; one that wraps ErrNewer; and damage.
func decodeInbox(p []byte, boot string) (h InboxHeader, s inboxShape, err error) {
	if len(p) < inboxPage {
		return h, s, fmt.Errorf("%d bytes", len(p))
	}
	if !bytes.HasPrefix(p, []byte(inboxMagic)) {
		return h, s, errors.New("no inbox")
	}
	if got, want := binary.NativeEndian.Uint32(p[12:]), inboxSum(p); got != want {
		return h, s, fmt.Errorf("checksum %08x of a header with %08x", got, want)
	}
	text := func(at int) string { return string(bytes.TrimRight(p[at:at+64], "\x00")) }
	number := func(at int) int { return int(binary.NativeEndian.Uint32(p[at:])) }
	h = InboxHeader{Boot: text(16), Release: text(80)}
	if h.Boot != boot {
		return h, s, errOtherBoot
	}
	switch v := number(8); {
	case v > inboxVersion:
		return h, s, fmt.Errorf("it has layout %d and this release knows up to %d: run holdfast %s or later: %w", v, inboxVersion, printable([]byte(h.Release)), ErrNewer)
	case v == 0:
		return h, s, errors.New("layout 0")
	}
	h.Engine, h.PID = text(144), number(208)
	s, err = newShape(number(212), number(216))
	return h, s, err
}

// A ReadBox is what a dead process's inbox holds.
type ReadBox struct {
	Path     string
	Header   InboxHeader
	Messages [][]byte // of slots that were lent, each the whole area: the engine's decoder finds its end
}

// Remove removes the file. ORDER: after what is in it is on record elsewhere.
func (b ReadBox) Remove() error {
	if err := os.Remove(b.Path); err != nil {
		return fmt.Errorf("state: remove inbox: %w", err)
	}
	return nil
}

// ReadInboxes reads the inboxes in dir that dead processes of this boot left and that have an engine's messages. Those of other
// engines stay; those of other boots are removed: the requests in them went with the kernel that waited for them. What cannot be
// read is set aside and described in damaged. If a file is of a newer layout, the error wraps [ErrNewer] and nothing was changed.
func ReadInboxes(dir, boot, engine string) (boxes []ReadBox, damaged []string, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, nil, fmt.Errorf("state: read inboxes: %w", err)
	}
	bad := map[string]error{} // what is wrong with it, by path
	var gone []string
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if !e.Type().IsRegular() || strings.Contains(e.Name(), asideMark) {
			continue
		}
		box, odd, err := readInbox(path, boot)
		switch {
		case errors.Is(err, errLive), errors.Is(err, os.ErrNotExist):
		case errors.Is(err, ErrNewer), errors.As(err, new(*os.PathError)):
			return nil, nil, fmt.Errorf("state: inbox %s: %w", path, err)
		case errors.Is(err, errOtherBoot), strings.HasPrefix(e.Name(), unfinishedPrefix):
			gone = append(gone, path)
		case err != nil:
			bad[path] = err
		case box.Header.Engine == engine:
			boxes, damaged = append(boxes, box), append(damaged, odd...)
		}
	}
	for _, path := range gone {
		if err := os.Remove(path); err != nil {
			return nil, nil, fmt.Errorf("state: remove inbox: %w", err)
		}
	}
	for path, why := range bad {
		aside, err := setAside(path)
		if err != nil {
			return nil, nil, fmt.Errorf("state: inbox %s is damaged (%w) and cannot be set aside: %w", path, why, err)
		}
		damaged = append(damaged, fmt.Sprintf("inbox %s was damaged (%v) and is kept as %s; requests in it are known from the record only", path, why, aside))
	}
	return boxes, damaged, nil
}

var errLive = errors.New("inbox of a live process")

// readInbox reads one file. It is not mapped: one that is cut short meanwhile would be a SIGBUS.
func readInbox(path, boot string) (b ReadBox, odd []string, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return b, nil, err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return b, nil, errLive
	} else if err != nil {
		return b, nil, os.NewSyscallError("flock", err)
	}
	page := make([]byte, inboxPage)
	n, err := io.ReadFull(f, page)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return b, nil, err
	}
	h, shape, err := decodeInbox(page[:n], boot)
	if err != nil {
		return b, nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		return b, nil, err
	}
	if fi.Size() != shape.fileSize() {
		return b, nil, fmt.Errorf("%d bytes, not %d", fi.Size(), shape.fileSize())
	}
	b = ReadBox{Path: path, Header: h}
	odd, err = b.read(bufio.NewReaderSize(f, 1<<18), shape)
	return b, odd, err
}

// read copies the messages.
func (b *ReadBox) read(r io.Reader, shape inboxShape) (odd []string, err error) {
	p := make([]byte, shape.stride)
	for slot := range shape.slots {
		if _, err := io.ReadFull(r, p); err != nil {
			return odd, fmt.Errorf("slot %d: %w", slot, err)
		}
		state, message := binary.NativeEndian.Uint32(p), p[stateLine:]
		if state == slotFree || len(bytes.TrimLeft(message[:zeroed], "\x00")) == 0 {
			continue
		}
		if state != slotLent {
			// Answering what was answered the kernel refuses; what is not answered nobody else would answer.
			odd = append(odd, fmt.Sprintf("%s: slot %d has state %d, and is taken for one in use", b.Path, slot, state))
		}
		b.Messages = append(b.Messages, bytes.Clone(message[:shape.size]))
	}
	return odd, nil
}
