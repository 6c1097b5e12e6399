package wire

import (
	"bytes"
	"encoding/binary"
	"io"
	"testing"
)

func TestFramesComeBackAsTheyWere(t *testing.T) {
	var b bytes.Buffer
	sent := []struct {
		kind    Kind
		payload []byte
	}{{Hello, nil}, {Stdout, []byte("a\x00b\r\n")}, {Stderr, bytes.Repeat([]byte{0xff}, 100_000)}, {Bye, nil}}
	for _, s := range sent {
		if err := Write(&b, s.kind, s.payload); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range sent {
		k, p, err := Read(&b)
		if err != nil || k != s.kind || !bytes.Equal(p, s.payload) {
			t.Fatalf("read kind %d, %d bytes, error %v; want kind %d, %d bytes", k, len(p), err, s.kind, len(s.payload))
		}
	}
	if _, _, err := Read(&b); err != io.EOF {
		t.Fatalf("after the last frame: error %v, want io.EOF", err)
	}
}

func TestOversizedPayloadIsRefusedOnBothEnds(t *testing.T) {
	if err := Write(io.Discard, Stdout, make([]byte, MaxPayload+1)); err == nil {
		t.Error("Write took a payload over the limit")
	}
	h := binary.LittleEndian.AppendUint32([]byte{byte(Stdout)}, MaxPayload+1)
	if _, _, err := Read(bytes.NewReader(h)); err == nil || err == io.EOF || err == io.ErrUnexpectedEOF {
		t.Errorf("Read of a header over the limit: error %v", err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{byte(Hello), 0, 0, 0, 0})
	f.Add([]byte{byte(Stdout), 3, 0, 0, 0, 'a', 'b', 'c'})
	f.Add([]byte{byte(Stdout), 3, 0, 0, 0, 'a'})
	f.Add([]byte{byte(Stdout), 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, in []byte) {
		k, p, err := Read(bytes.NewReader(in))
		if err != nil {
			return
		}
		var out bytes.Buffer
		if err := Write(&out, k, p); err != nil || !bytes.HasPrefix(in, out.Bytes()) {
			t.Fatalf("frame %d of %d bytes does not encode to what it was read from (error %v)", k, len(p), err)
		}
	})
}
