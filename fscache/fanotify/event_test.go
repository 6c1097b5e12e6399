package fanotify

import (
	"encoding/binary"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "record testdata from the running kernel")

// encodeEvent lays an event out as the kernel does.
func encodeEvent(ev Event, records ...[]byte) []byte {
	b := make([]byte, eventMetadataLen)
	if ev.HasRange {
		r := make([]byte, infoRangeLen)
		r[0] = infoTypeRange
		binary.NativeEndian.PutUint16(r[2:], infoRangeLen)
		binary.NativeEndian.PutUint64(r[8:], uint64(ev.Off))
		binary.NativeEndian.PutUint64(r[16:], uint64(ev.Len))
		records = append(records, r)
	}
	for _, r := range records {
		b = append(b, r...)
	}
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	b[4] = metadataVersion
	binary.NativeEndian.PutUint16(b[6:], eventMetadataLen)
	binary.NativeEndian.PutUint64(b[8:], ev.Mask)
	binary.NativeEndian.PutUint32(b[16:], uint32(ev.FD))
	binary.NativeEndian.PutUint32(b[20:], uint32(ev.PID))
	return b
}

func TestSizesAreTheKernels(t *testing.T) {
	if eventMetadataLen != unix.FAN_EVENT_METADATA_LEN || infoTypeRange != unix.FAN_EVENT_INFO_TYPE_RANGE || noFD != unix.FAN_NOFD {
		t.Error("constants differ from include/uapi/linux/fanotify.h as golang.org/x/sys has it")
	}
}

// TestDecodesWhatKernelsSent reads messages recorded from real kernels: 16 bytes read at 8197 of a marked file.
func TestDecodesWhatKernelsSent(t *testing.T) {
	if *update {
		recordEvent(t)
	}
	files, err := filepath.Glob("testdata/pre_access-*.bin")
	if err != nil || len(files) == 0 {
		t.Fatal("no recorded messages", err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		ev, rest, err := DecodeEvent(b)
		if err != nil || len(rest) != 0 {
			t.Fatalf("%s: %v, %d bytes left", name, err, len(rest))
		}
		if ev.Mask != unix.FAN_PRE_ACCESS || ev.FD < 3 || ev.PID == 0 || !ev.HasRange || ev.Off != 8192 || ev.Len != 4096 {
			t.Errorf("%s: %+v", name, ev)
		}
	}
}

func recordEvent(t *testing.T) {
	t.Helper()
	group, err := newGroup()
	if err != nil {
		t.Fatal(err)
	}
	defer group.Close()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, make([]byte, 16384), 0o600); err != nil {
		t.Fatal(err)
	}
	err = control(group, func(fd int) error {
		return unix.FanotifyMark(fd, unix.FAN_MARK_ADD, unix.FAN_PRE_ACCESS, unix.AT_FDCWD, path)
	})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { // ends when the event is answered
		f, err := os.Open(path)
		if err == nil {
			_, err = f.ReadAt(make([]byte, 16), 8197)
		}
		done <- err
	}()
	buf := make([]byte, 4096)
	n, err := group.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	ev, _, err := DecodeEvent(buf[:n])
	if err != nil {
		t.Fatal(err)
	}
	answer := encodeResponse(ev.FD, unix.FAN_ALLOW)
	if _, err := group.Write(answer[:]); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join("testdata", "pre_access-"+unix.ByteSliceToString(u.Release[:])+".bin")
	if err := os.WriteFile(name, buf[:n], 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestDecodeRefusesWhatMakesNoSense(t *testing.T) {
	good := Event{Mask: unix.FAN_PRE_ACCESS, FD: 7, PID: 9, HasRange: true, Off: 4096, Len: 8192}
	change := func(at int, v ...byte) []byte {
		b := encodeEvent(good)
		copy(b[at:], v)
		return b
	}
	for _, c := range []struct {
		name  string
		b     []byte
		field string
		fd    int32 // that can still be answered
	}{
		{"empty", nil, "buffer length", noFD},
		{"half a header", encodeEvent(good)[:23], "buffer length", noFD},
		{"version 2", change(4, 2), "vers", noFD},
		{"event_len 0", change(0, 0, 0, 0, 0), "event_len", 7},
		{"event_len past the buffer", change(0, 49, 0, 0, 0), "event_len", 7},
		{"event_len huge", change(0, 255, 255, 255, 255), "event_len", 7},
		{"truncated", encodeEvent(good)[:47], "event_len", 7},
		{"metadata_len short", change(6, 23, 0), "metadata_len", 7},
		{"metadata_len past event_len", change(6, 49, 0), "metadata_len", 7},
		{"info record of 2 bytes", encodeEvent(Event{FD: 7}, []byte{6, 0}), "info record", 7},
		{"info len 0", change(26, 0, 0), "info len", 7},
		{"info len past the event", change(26, 25, 0), "info len", 7},
		{"short range record", encodeEvent(Event{FD: 7}, []byte{6, 0, 8, 0, 0, 0, 0, 0}), "range record len", 7},
		{"two range records", encodeEvent(good, encodeEvent(good)[24:]), "second range record", 7},
		{"offset negative", change(32, 0, 0, 0, 0, 0, 0, 0, 0x80), "offset", 7},
		{"offset+count overflows", change(40, 255, 255, 255, 255, 255, 255, 255, 0x7f), "count", 7},
	} {
		ev, rest, err := DecodeEvent(c.b)
		var malformed *MalformedError
		if !errors.As(err, &malformed) || malformed.Field != c.field || rest != nil || ev.FD != c.fd {
			t.Errorf("%s: %v (fd %d, rest %v), want field %q and fd %d", c.name, err, ev.FD, rest, c.field, c.fd)
		}
	}
}

func TestDecodeSkipsUnknownRecordsAndKeepsTheRest(t *testing.T) {
	first := Event{Mask: unix.FAN_PRE_ACCESS, FD: 7, HasRange: true, Off: 0, Len: 4096}
	second := Event{Mask: unix.FAN_PRE_ACCESS, FD: 8}
	b := append(encodeEvent(first, []byte{200, 0, 4, 0}), encodeEvent(second)...)
	got, rest, err := DecodeEvent(b)
	if err != nil || got != first {
		t.Fatalf("first: %+v, %v", got, err)
	}
	got, rest, err = DecodeEvent(rest)
	if err != nil || got != second || len(rest) != 0 {
		t.Fatalf("second: %+v, %v, %d bytes left", got, err, len(rest))
	}
}

func FuzzDecodeEvent(f *testing.F) {
	f.Add(encodeEvent(Event{Mask: unix.FAN_PRE_ACCESS, FD: 7, PID: 1, HasRange: true, Off: 1 << 40, Len: 4096}))
	f.Add(encodeEvent(Event{FD: noFD, Mask: 0x4000}, []byte{1, 0, 4, 0}))
	f.Fuzz(func(t *testing.T, b []byte) {
		for rest := b; ; {
			before := len(rest)
			ev, next, err := DecodeEvent(rest)
			if err != nil {
				var malformed *MalformedError
				if !errors.As(err, &malformed) || next != nil {
					t.Fatalf("%v, rest %v", err, next)
				}
				return
			}
			if len(next) > before-eventMetadataLen || ev.FD < noFD || ev.Off < 0 || ev.Len < 0 || ev.Off+ev.Len < 0 {
				t.Fatalf("%+v, %d of %d bytes left", ev, len(next), before)
			}
			again, _, err := DecodeEvent(encodeEvent(ev))
			if err != nil || again != ev {
				t.Fatalf("%+v became %+v, %v", ev, again, err)
			}
			if rest = next; len(rest) == 0 {
				return
			}
		}
	})
}
