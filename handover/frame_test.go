package handover

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

var update = flag.Bool("update", false, "write the golden frames that are missing")

// golden are the frames of version 1, as every later release must be able to read them.
var golden = []struct {
	file string
	t    frameType
	body []byte
}{
	{"hello", frameHello, must(spoken{Hello{"1.0.0", []string{"objects", "pending"}, []string{"pending"}}, 1, 1}.body())},
	{"hello-empty", frameHello, must(spoken{low: 1, high: 1}.body())},
	{"record", frameRecord, piece{index: 3, kind: "objects", names: []string{"fanotify", "o1a"}, chunk: []byte("body")}.append(nil)},
	{"record-more", frameRecord, piece{more: true, kind: "images", chunk: []byte{0, 1, 2}}.append(nil)},
	{"prepared", framePrepared, appendCount(nil, 4)},
	{"ready", frameReady, nil},
	{"commit", frameCommit, appendCount(nil, 0)},
	{"taken", frameTaken, nil},
	{"go", frameGo, nil},
	{"drained", frameDrained, appendCount(nil, 1<<16)},
	{"abort", frameAbort, []byte("disk full")},
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

func TestFramesOfVersion1AreReadAndWrittenAsEver(t *testing.T) {
	for _, g := range golden {
		t.Run(g.file, func(t *testing.T) {
			path := filepath.Join("testdata", "frames", "v1", g.file)
			written := appendFrame(nil, 1, g.t, g.body)
			if *update {
				if _, err := os.Stat(path); err != nil {
					if err := os.WriteFile(path, written, 0o644); err != nil {
						t.Fatal(err)
					}
				}
			}
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			version, kind, body, err := decodeFrame(b)
			if err != nil || version != 1 || kind != g.t || !bytes.Equal(body, g.body) {
				t.Fatalf("read version %d, %v, %q, %v", version, kind, body, err)
			}
			if !bytes.Equal(written, b) {
				t.Fatalf("written %q, was %q", written, b)
			}
		})
	}
}

func TestHelloOfALaterReleaseIsRead(t *testing.T) {
	want := spoken{Hello{"9.9", []string{"a"}, []string{"b", "c"}}, 1, 7}
	body := append(must(want.body()), "whatever comes later"...)
	got, err := decodeHello(body)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("got %+v, %v", got, err)
	}
}

func TestWhatCannotBeSaidInAHelloIsRefused(t *testing.T) {
	many := make([]string, maxKinds+1)
	for i := range many {
		many[i] = "x"
	}
	for _, s := range []spoken{
		{low: 2, high: 1},
		{Hello: Hello{Release: string(make([]byte, 256))}},
		{Hello: Hello{Understands: many}},
		{Hello: Hello{Needs: []string{""}}},
		{Hello: Hello{Needs: []string{"a b"}}},
		{Hello: Hello{Needs: []string{string(bytes.Repeat([]byte("k"), maxKind+1))}}},
	} {
		if _, err := s.body(); err == nil {
			t.Errorf("%+v was encoded", s)
		}
	}
}

func FuzzDecodeFrame(f *testing.F) {
	for _, g := range golden {
		f.Add(appendFrame(nil, 1, g.t, g.body))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		version, kind, body, err := decodeFrame(b)
		if err != nil {
			return
		}
		if again := appendFrame(nil, version, kind, body); !bytes.Equal(again, b) {
			t.Fatalf("%q became %q", b, again)
		}
	})
}

// FuzzDecodeBodies takes bodies as a peer whose checksums are right could send them.
func FuzzDecodeBodies(f *testing.F) {
	for _, g := range golden {
		f.Add(g.body)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := decodeHello(b); err == nil {
			again, err := decodeHello(must(s.body()))
			if err != nil || !reflect.DeepEqual(again, s) {
				t.Fatalf("%+v became %+v, %v", s, again, err)
			}
		}
		if p, err := decodePiece(b); err == nil {
			if again := p.append(nil); !bytes.Equal(again, b) {
				t.Fatalf("%q became %q", b, again)
			}
		}
		if n, err := decodeCount(b); err == nil && !bytes.Equal(appendCount(nil, n), b) {
			t.Fatalf("%q became %d", b, n)
		}
	})
}

// FuzzCollector sends pieces of two kinds in any order, without descriptors.
func FuzzCollector(f *testing.F) {
	f.Add([]byte{0, 0, 1, 2, 4})
	f.Fuzz(func(t *testing.T, script []byte) {
		c := collector{understood: []string{"a", "b"}}
		total := 0
		for _, op := range script {
			p := piece{index: uint32(op >> 3), more: op&1 != 0, kind: []string{"a", "b", "c"}[op>>1%3], chunk: []byte{op}}
			if err := c.add(p, nil); err != nil {
				return
			}
			total++
		}
		if c.open {
			return
		}
		n := len(c.records)
		records, err := c.take(uint32(n))
		bytes := 0
		for _, r := range records {
			bytes += len(r.Body)
		}
		if err != nil || bytes != total {
			t.Fatalf("%d records with %d bytes of %d, %v", len(records), bytes, total, err)
		}
	})
}
