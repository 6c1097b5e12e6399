package drill

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"holdfast/rafs"
)

// ordinary makes a target of files in an ordinary directory, which are compared as those of an image are.
func ordinary(t *testing.T, digests bool) *target {
	t.Helper()
	tg := &target{dir: t.TempDir()}
	files, err := generate(tg.dir, 3, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	for path, g := range files {
		f := file{path: path, size: g.size, content: &g}
		if digests {
			f.content = nil
			for off := int64(0); off < g.size; off += madeChunk {
				p := make([]byte, min(madeChunk, g.size-off))
				g.fill(p, off)
				f.pieces = append(f.pieces, piece{off: off, size: len(p), digest: rafs.SHA256.Sum(p), algo: rafs.SHA256})
			}
		}
		tg.add(f)
	}
	return tg
}

// look has a reader visit a target often enough to have seen all of it.
func look(t *testing.T, tg *target) *collector {
	t.Helper()
	c := &collector{began: time.Now(), bound: time.Minute}
	r := newReader(c, []*target{tg}, 1)
	for range 400 {
		r.visit(tg)
	}
	if c.reads.Load() < 400 || r.latency.n != c.reads.Load() {
		t.Fatalf("%d reads, %d in the histogram", c.reads.Load(), r.latency.n)
	}
	return c
}

// This is the test that fails when the comparison is broken.
func TestOneFlippedByteIsFound(t *testing.T) {
	for _, digests := range []bool{false, true} {
		t.Run(fmt.Sprintf("digests=%v", digests), func(t *testing.T) {
			tg := ordinary(t, digests)
			if c := look(t, tg); c.violated.Load() != 0 {
				t.Fatalf("with nothing wrong: %+v", c.list)
			}
			f := &tg.files[0]
			for i := range tg.files {
				if tg.files[i].size > f.size {
					f = &tg.files[i]
				}
			}
			path, at := filepath.Join(tg.dir, f.path), f.size/2
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			b[at] ^= 1
			if err := os.WriteFile(path, b, 0o644); err != nil {
				t.Fatal(err)
			}
			c := look(t, tg)
			if c.quiet.Wrong == 0 || c.quiet.Sum() != c.quiet.Wrong {
				t.Fatalf("violations %+v, want wrong bytes", c.quiet)
			}
			for _, v := range c.list {
				if v.Path != path || v.Off > at || v.Off+int64(v.Len) <= at || v.Invariant != "I1" {
					t.Errorf("found %+v, want byte %d of %s", v, at, path)
				}
			}
		})
	}
}

func TestHolesZerosInPlaceOfBytesAreFound(t *testing.T) {
	tg := ordinary(t, false)
	f := tg.files[0]
	if err := os.WriteFile(filepath.Join(tg.dir, f.path), make([]byte, f.size), 0o644); err != nil {
		t.Fatal(err)
	}
	if c := look(t, tg); c.quiet.Wrong == 0 {
		t.Errorf("violations %+v, want wrong bytes", c.quiet)
	}
}

func TestFileThatEndsEarlyIsWrongAndOneThatIsNotThereAnError(t *testing.T) {
	tg := ordinary(t, false)
	for i := range tg.files {
		if err := os.Truncate(filepath.Join(tg.dir, tg.files[i].path), 0); err != nil {
			t.Fatal(err)
		}
	}
	if c := look(t, tg); c.quiet.Wrong != c.reads.Load() {
		t.Errorf("%d reads, violations %+v, want each to be wrong", c.reads.Load(), c.quiet)
	}
	if err := os.RemoveAll(tg.dir); err != nil {
		t.Fatal(err)
	}
	c := &collector{began: time.Now(), bound: time.Minute}
	newReader(c, []*target{tg}, 1).sweep(context.Background(), tg)
	if c.quiet.Errors != int64(len(tg.files)) || c.list[0].What != "ENOENT" {
		t.Errorf("%d files, violations %+v, %+v", len(tg.files), c.quiet, c.list)
	}
}

func TestLastLookReadsEveryByteOnce(t *testing.T) {
	tg := ordinary(t, false)
	c := &collector{began: time.Now(), bound: time.Minute}
	newReader(c, []*target{tg}, 1).sweep(context.Background(), tg)
	if c.bytes.Load() != tg.bytes() || c.violated.Load() != 0 {
		t.Errorf("%d bytes of %d read, violations %+v", c.bytes.Load(), tg.bytes(), c.list)
	}
}

func TestGeneratedContentIsTheSameWhateverRangeIsAskedFor(t *testing.T) {
	g := generated{seed: 5, file: 2, size: 40_000}
	whole := make([]byte, g.size)
	g.fill(whole, 0)
	for off := int64(0); off < g.size; off += 1237 {
		part := make([]byte, min(9001, g.size-off))
		g.fill(part, off)
		if string(part) != string(whole[off:off+int64(len(part))]) {
			t.Fatalf("the range at %d differs", off)
		}
	}
	other := generated{seed: 5, file: 3, size: g.size}
	b := make([]byte, g.size)
	other.fill(b, 0)
	if string(b[:4096]) == string(whole[:4096]) || string(whole[:4096]) == string(whole[4096:8192]) {
		t.Error("two blocks are the same")
	}
}
