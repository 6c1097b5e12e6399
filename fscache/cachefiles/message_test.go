package cachefiles

import (
	"embed"
	"encoding/binary"
	"errors"
	"io/fs"
	"math"
	"reflect"
	"strings"
	"testing"
)

var messages = map[string]Message{
	"open": {ID: 7, Opcode: CACHEFILES_OP_OPEN, ObjectID: 3, Open: OpenBody{FD: 11, Flags: 5, Volume: "erofs,d", Cookie: "blob"}},
	"open with a binary key": {
		Opcode: CACHEFILES_OP_OPEN, ObjectID: 1, Open: OpenBody{Volume: "nfs", Cookie: "\x00\xff\x00"}},
	"open with empty keys": {Opcode: CACHEFILES_OP_OPEN},
	"close":                {ID: math.MaxUint32, Opcode: CACHEFILES_OP_CLOSE, ObjectID: 9},
	"read":                 {ID: 1, Opcode: CACHEFILES_OP_READ, ObjectID: 2, Read: ReadBody{Off: 1 << 40, Len: 4096}},
	"read to the end":      {ID: 1, Opcode: CACHEFILES_OP_READ, ObjectID: 2, Read: ReadBody{Off: 1, Len: math.MaxInt64 - 1}},
}

func TestMessagesDecodeToWhatWasEncoded(t *testing.T) {
	for name, m := range messages {
		got, err := DecodeMessage(encode(m))
		if err != nil || !reflect.DeepEqual(got, m) {
			t.Errorf("%s: %+v, %v, want %+v", name, got, err, m)
		}
	}
}

func TestEveryShortMessageIsMalformed(t *testing.T) {
	for name, m := range messages {
		whole := encode(m)
		for n := range whole {
			got, err := DecodeMessage(whole[:n])
			var malformed *MalformedError
			if !errors.As(err, &malformed) {
				t.Errorf("%s cut to %d bytes: %v", name, n, err)
			}
			if n >= msgLen && (got.ID != m.ID || got.Opcode != m.Opcode || got.ObjectID != m.ObjectID) {
				t.Errorf("%s cut to %d bytes: the header is lost: %+v", name, n, got)
			}
		}
		if _, err := DecodeMessage(append(whole, 0)); err == nil {
			t.Errorf("%s with a byte too many decodes", name)
		}
	}
}

func TestLyingMessageIsMalformed(t *testing.T) {
	put := func(name string, at int, v uint32) []byte {
		b := encode(messages[name])
		binary.NativeEndian.PutUint32(b[at:], v)
		return b
	}
	for _, c := range []struct {
		name  string
		field string
		b     []byte
	}{
		{"len of zero", "len", put("read", 8, 0)},
		{"len of a header", "len", put("read", 8, msgLen)},
		{"len past the end", "len", put("read", 8, math.MaxUint32)},
		{"unknown opcode", "opcode", put("read", 4, 3)},
		{"volume key of no bytes", "volume_key_size", put("open", msgLen, 0)},
		{"volume key past the end", "volume_key_size", put("open", msgLen, 13)},
		{"volume key of 4 GiB", "volume_key_size", put("open", msgLen, math.MaxUint32)},
		{"keys whose sizes overflow to the right sum", "volume_key_size", put("open", msgLen, math.MaxUint32-3)},
		{"cookie key too short", "cookie_key_size", put("open", msgLen+4, 3)},
		{"cookie key past the end", "cookie_key_size", put("open", msgLen+4, math.MaxUint32)},
		{"volume key without NUL", "place of the NUL in the volume key", put("open", msgLen+openLen+4, 0x6464_6464)},
		{"volume key with an early NUL", "place of the NUL in the volume key", put("open", msgLen+openLen, 0)},
		{"negative fd", "fd", put("open", msgLen+8, math.MaxUint32)},
		{"negative offset", "off", put("read", msgLen+4, 1<<31)},
		{"empty range", "len of the range", put("read", msgLen+8, 0)},
		{"range past the largest file", "len of the range", put("read to the end", msgLen+8, math.MaxUint32)},
	} {
		_, err := DecodeMessage(c.b)
		var malformed *MalformedError
		if !errors.As(err, &malformed) || malformed.Field != c.field {
			t.Errorf("%s: %v, want one about %q", c.name, err, c.field)
		}
	}
}

//go:embed testdata/*.bin
var recorded embed.FS

// TestRecordedMessagesDecode checks what real kernels sent for the image of TestMessagesOfThisKernel.
func TestRecordedMessagesDecode(t *testing.T) {
	for _, op := range []string{"open", "read", "close"} {
		paths, err := fs.Glob(recorded, "testdata/"+op+"-*.bin")
		if err != nil || len(paths) == 0 {
			t.Fatalf("no recorded %s: %v", op, err)
		}
		for _, path := range paths {
			b, err := recorded.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			m, err := DecodeMessage(b)
			if err != nil {
				t.Errorf("%s: %v", path, err)
				continue
			}
			checkRecorded(t, op, m)
			if string(encode(m)) != string(b) {
				t.Errorf("%s: bytes that the decoder does not see: %x, it sees %x", path, b, encode(m))
			}
		}
	}
}

// checkRecorded checks a message about the blob "blob" of domain "golden", of which page 1 was read.
func checkRecorded(t *testing.T, op string, m Message) {
	t.Helper()
	want := Message{ID: m.ID, ObjectID: m.ObjectID}
	switch op {
	case "open":
		want.Opcode = CACHEFILES_OP_OPEN
		want.Open = OpenBody{FD: m.Open.FD, Volume: "erofs,golden", Cookie: "blob"}
	case "read":
		want.Opcode, want.Read = CACHEFILES_OP_READ, ReadBody{Off: 4096, Len: 4096}
	case "close":
		want.Opcode = CACHEFILES_OP_CLOSE
	}
	if m != want {
		t.Errorf("%s: %+v, want %+v", op, m, want)
	}
}

func FuzzDecodeMessage(f *testing.F) {
	for _, m := range messages {
		f.Add(encode(m))
	}
	f.Add([]byte(strings.Repeat("\xff", 64)))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := DecodeMessage(b)
		if err != nil {
			var malformed *MalformedError
			if !errors.As(err, &malformed) {
				t.Fatalf("%v is no MalformedError", err)
			}
			return
		}
		if again := encode(m); string(again) != string(b) {
			t.Fatalf("%x decodes to %+v, which is %x", b, m, again)
		}
	})
}
