package blob

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"

	"pgregory.net/rapid"

	"holdfast/rafs"
	"holdfast/rafs/source"
	"holdfast/rafs/tree"
)

// A memory is a blob in memory that counts the requests made to it.
type memory struct {
	b        []byte
	requests int
}

func (m *memory) ReadRange(_ context.Context, off, n int64) (io.ReadCloser, error) {
	if err := source.CheckRange(m.String(), off, n, m.Size()); err != nil {
		return nil, err
	}
	m.requests++
	return io.NopCloser(bytes.NewReader(m.b[off : off+n])), nil
}
func (m *memory) Size() int64    { return int64(len(m.b)) }
func (m *memory) String() string { return "memory blob" }
func (m *memory) Close() error   { return nil }

func fixture(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../../../shared/fixtures/nydus", name))
	if os.IsNotExist(err) {
		t.Skipf("the fixture %s is not there: %v", name, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// open opens a fixture as the daemon would.
func open(t testing.TB, name string) source.Source {
	t.Helper()
	fixture(t, name)
	src, err := source.OpenFile(filepath.Join("../../../shared/fixtures/nydus", name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { src.Close() })
	return src
}

// content makes chunks of every kind: compressible, random, zero, equal to earlier ones.
func content(rng *rand.Rand, n, maxSize int) [][]byte {
	chunks := make([][]byte, n)
	for i := range chunks {
		p := make([]byte, 1+rng.IntN(maxSize))
		switch kind := rng.IntN(5); {
		case kind == 0:
		case kind == 1 && i > 0:
			p = chunks[rng.IntN(i)]
		case kind == 2:
			fill(rng, p, ^uint64(0))
		default:
			fill(rng, p, 0x0303030303030303) // four of 256 byte values
		}
		chunks[i] = p
	}
	return chunks
}

func fill(rng *rand.Rand, p []byte, mask uint64) {
	for len(p) > 0 {
		var v [8]byte
		binary.NativeEndian.PutUint64(v[:], rng.Uint64()&mask)
		p = p[copy(p, v[:]):]
	}
}

// write makes a blob of chunks, with a bootstrap if boot is not empty.
func write(t rapid.TB, chunks [][]byte, boot []byte, o Options) ([]byte, []tree.ChunkRef, Result) {
	t.Helper()
	var out bytes.Buffer
	w, err := NewWriter(&out, o)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	refs := make([]tree.ChunkRef, len(chunks))
	for i, c := range chunks {
		buf := w.Buffer(len(c) + i%3)
		if err := w.Add(buf[:copy(buf, c)], &refs[i]); err != nil {
			t.Fatal(err)
		}
	}
	res, err := w.Finish(boot)
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes(), refs, res
}

// object decodes every row of the table and returns the object's bytes.
func object(table *rafs.Table, blob []byte) ([]byte, error) {
	d, err := NewDecoder()
	if err != nil {
		return nil, err
	}
	out := make([]byte, table.Size())
	for i := range table.Len() {
		c := table.At(i)
		if err := d.Decode(c, table.Algo(), blob[c.BlobOffset:][:c.Stored], out[c.Offset:]); err != nil {
			return nil, fmt.Errorf("row %d: %w", i, err)
		}
	}
	return out, nil
}

// checkBlob reads the blob back and compares every chunk with what was added.
func checkBlob(blob []byte, info rafs.BlobInfo, chunks [][]byte, refs []tree.ChunkRef) error {
	m, err := ReadMeta(context.Background(), &memory{b: blob}, info)
	if err != nil {
		return err
	}
	table, err := m.Table(nil)
	if err != nil {
		return err
	}
	obj, err := object(table, blob)
	if err != nil {
		return err
	}
	for i, c := range chunks {
		ref := refs[i]
		if ref == tree.Hole {
			return fmt.Errorf("chunk %d is a hole", i)
		}
		if got := obj[ref.Offset:][:len(c)]; !bytes.Equal(got, c) {
			return fmt.Errorf("chunk %d at object offset %d does not read back", i, ref.Offset)
		}
		if row := m.rows[ref.Index]; row.Offset != ref.Offset || int(row.Size) != len(c) {
			return fmt.Errorf("chunk %d: its reference %+v leads to row %+v", i, ref, row)
		}
	}
	return nil
}

var small = Options{Blob: 1, ChunkSize: 64 << 10, Codec: rafs.CodecZstd, Workers: 2}

func TestBlobIDIsSHA256OfFile(t *testing.T) {
	chunks := content(rand.New(rand.NewPCG(1, 1)), 50, 64<<10)
	blob, refs, res := write(t, chunks, []byte("bootstrap"), small)
	sum := sha256.Sum256(blob)
	if want := hex.EncodeToString(sum[:]); res.Info.ID != want || res.Size != int64(len(blob)) || res.Info.StoredSize != uint64(len(blob)) {
		t.Errorf("result %+v, want id %s and %d bytes", res, want, len(blob))
	}
	if err := checkBlob(blob, res.Info, chunks, refs); err != nil {
		t.Error(err)
	}
}

func TestMetaOfSmallBlobTakesOneRequest(t *testing.T) {
	blob, _, res := write(t, content(rand.New(rand.NewPCG(1, 2)), 20, 64<<10), []byte("bootstrap"), small)
	src := &memory{b: blob}
	if _, err := ReadMeta(context.Background(), src, res.Info); err != nil {
		t.Fatal(err)
	}
	if src.requests != 1 {
		t.Errorf("%d requests", src.requests)
	}
}

func TestFindMetaNeedsNoBlobTable(t *testing.T) {
	for _, boot := range []string{"", "bootstrap"} {
		chunks := content(rand.New(rand.NewPCG(2, 1)), 50, 64<<10)
		blob, _, res := write(t, chunks, []byte(boot), small)
		known := rafs.BlobInfo{ID: res.Info.ID, ChunkSize: res.Info.ChunkSize, Codec: res.Info.Codec, Digest: res.Info.Digest}
		m, err := FindMeta(context.Background(), &memory{b: blob}, known)
		if err != nil {
			t.Fatal(err)
		}
		got := m.Info()
		got.TOCDigest = res.Info.TOCDigest // nothing in the blob says it
		if got != res.Info {
			t.Errorf("found %+v\nwant  %+v", got, res.Info)
		}
		if _, err := m.Table(nil); err != nil {
			t.Error(err)
		}
	}
}

func TestInlinedBootstrapReadsBack(t *testing.T) {
	boot := bytes.Repeat([]byte("bootstrap"), 1000)
	blob, _, res := write(t, content(rand.New(rand.NewPCG(3, 1)), 5, 64<<10), boot, small)
	toc, err := parseTOC(blob[len(blob)-int(res.Info.TOCSize):], uint64(len(blob)))
	if err != nil {
		t.Fatal(err)
	}
	e := toc.find(tocBoot)
	d, err := NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, e.size)
	if err := d.expand(e.codec, blob[e.offset:][:e.stored], got); err != nil || !bytes.Equal(got, boot) {
		t.Errorf("bootstrap of %d bytes does not read back: %v", len(got), err)
	}
	if rafs.Digest(sha256.Sum256(boot)) != e.digest {
		t.Error("the TOC's digest is not that of the bootstrap")
	}
	if n, err := parseTarHeader(blob[e.offset+e.stored:][:rafs.TarHeaderSize], tocBoot); err != nil || n != e.stored {
		t.Errorf("tar header after the bootstrap: %d, %v", n, err)
	}
}

func TestBlobWithoutChunks(t *testing.T) {
	blob, _, res := write(t, nil, []byte("bootstrap"), small)
	m, err := ReadMeta(context.Background(), &memory{b: blob}, res.Info)
	if err != nil {
		t.Fatal(err)
	}
	found, err := FindMeta(context.Background(), &memory{b: blob}, rafs.BlobInfo{})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []*Meta{m, found} {
		if table, err := m.Table(nil); err != nil || table.Len() != 0 || table.Size() != 0 {
			t.Errorf("table %+v, %v", table, err)
		}
	}
}

// EROFS over fscache reads data behind a hole as zeros: see tree.Hole.
func TestZerosAreStoredOncePerSizeAndNeverAHole(t *testing.T) {
	zeros := make([]byte, small.ChunkSize)
	_, refs, res := write(t, [][]byte{zeros, zeros, zeros[:5000], zeros, zeros[:5000]}, nil, small)
	want := []tree.ChunkRef{{Blob: 1}, {Blob: 1}, {Blob: 1, Index: 1, Offset: uint64(small.ChunkSize)}, {Blob: 1}, {Blob: 1, Index: 1, Offset: uint64(small.ChunkSize)}}
	for i := range want {
		if refs[i] != want[i] {
			t.Errorf("chunk %d is %+v, want %+v", i, refs[i], want[i])
		}
	}
	if s := res.Stats; s.Chunks != 2 || s.Deduplicated != 3 {
		t.Errorf("%+v", s)
	}
}

func TestChunkEqualToOneOfEarlierLayerIsNotStored(t *testing.T) {
	o := small
	o.Dedup = NewDedup(nil, 0)
	a, b := bytes.Repeat([]byte("a"), 5000), bytes.Repeat([]byte("b"), 5000)
	_, first, _ := write(t, [][]byte{a, a}, nil, o)
	o.Blob = 2
	blob, second, res := write(t, [][]byte{a, b, b, a[:4999]}, nil, o)
	want := []tree.ChunkRef{first[0], {Blob: 2}, {Blob: 2}, {Blob: 2, Index: 1, Offset: 8192}}
	for i := range want {
		if second[i] != want[i] {
			t.Errorf("chunk %d is %+v, want %+v", i, second[i], want[i])
		}
	}
	if s := res.Stats; s.Chunks != 2 || s.Deduplicated != 2 || s.Bytes != 19999 {
		t.Errorf("stats %+v", s)
	}
	if err := checkBlob(blob, res.Info, [][]byte{b}, second[1:2]); err != nil {
		t.Error(err)
	}
}

func TestChunkThatDoesNotShrinkIsStoredRaw(t *testing.T) {
	random := make([]byte, 5000)
	rng := rand.New(rand.NewPCG(4, 4))
	fill(rng, random, ^uint64(0))
	for _, codec := range []rafs.Codec{rafs.CodecNone, rafs.CodecLZ4, rafs.CodecZstd} {
		o := small
		o.Codec = codec
		blob, _, _ := write(t, [][]byte{random, []byte("x")}, nil, o)
		if !bytes.Equal(blob[:5001], append(random[:5000:5000], 'x')) {
			t.Errorf("%s: the chunks are not stored as they are", codec)
		}
	}
}

func TestWriterReportsErrorOfOutput(t *testing.T) {
	w, err := NewWriter(failing{}, small)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	var ref tree.ChunkRef
	rng := rand.New(rand.NewPCG(5, 5))
	for range 200 { // more than the buffers take
		buf := w.Buffer(64 << 10)
		fill(rng, buf, ^uint64(0))
		if err = w.Add(buf, &ref); err != nil {
			break
		}
	}
	if _, ferr := w.Finish(nil); ferr == nil || err == nil {
		t.Errorf("Add: %v, Finish: %v", err, ferr)
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

func TestAddTakesOnlyWhatBufferReturned(t *testing.T) {
	w, err := NewWriter(io.Discard, small)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	var ref tree.ChunkRef
	if err := w.Add([]byte("x"), &ref); err == nil {
		t.Error("a foreign slice was taken")
	}
	buf := w.Buffer(10)
	if err := w.Add(buf[1:], &ref); err == nil {
		t.Error("a slice inside the buffer was taken")
	}
	if err := w.Add(buf[:0], &ref); err == nil {
		t.Error("an empty slice was taken")
	}
	if err := w.Add(buf, &ref); err != nil {
		t.Error(err)
	}
	if err := w.Add(buf, &ref); err == nil {
		t.Error("the same slice was taken twice")
	}
}

func TestInfoSealsBlob(t *testing.T) {
	w, err := NewWriter(io.Discard, small)
	if err != nil {
		t.Fatal(err)
	}
	var ref tree.ChunkRef
	if err := w.Add(append(w.Buffer(5)[:0], "hello"...), &ref); err != nil {
		t.Fatal(err)
	}
	info, err := w.Info()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Add(w.Buffer(5), &ref); err == nil {
		t.Error("a chunk was added after Info")
	}
	res, err := w.Finish([]byte("boot"))
	if err != nil {
		t.Fatal(err)
	}
	if info.ID != rafs.PlaceholderID || len(info.ID) != 64 {
		t.Errorf("id %q", info.ID)
	}
	info.ID, info.StoredSize, info.TOCSize, info.TOCDigest = res.Info.ID, res.Info.StoredSize, res.Info.TOCSize, res.Info.TOCDigest
	if info != res.Info {
		t.Errorf("Info said %+v\nFinish  %+v", info, res.Info)
	}
	if _, err := w.Finish(nil); err != ErrClosed {
		t.Errorf("second Finish: %v", err)
	}
}

// The bubble fails the test if a goroutine is left when the function returns.
func TestFinishAndCloseEndGoroutines(t *testing.T) {
	for name, end := range map[string]func(*Writer) error{
		"Finish": func(w *Writer) error { _, err := w.Finish(nil); return err },
		"Close":  (*Writer).Close,
		"both":   func(w *Writer) error { _, err := w.Finish(nil); return errors.Join(err, w.Close()) },
	} {
		synctest.Test(t, func(t *testing.T) {
			w, err := NewWriter(io.Discard, small)
			if err != nil {
				t.Fatal(err)
			}
			var ref tree.ChunkRef
			if err := w.Add(w.Buffer(5), &ref); err != nil {
				t.Fatal(err)
			}
			if err := end(w); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
}

func TestWriterRefusesOptionsThatCannotBe(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"chunk size no power of two": func(o *Options) { o.ChunkSize = 5000 },
		"chunk size too small":       func(o *Options) { o.ChunkSize = 2048 },
		"chunk size too large":       func(o *Options) { o.ChunkSize = 32 << 20 },
		"codec not written":          func(o *Options) { o.Codec = rafs.CodecGzip },
		"digest":                     func(o *Options) { o.Digest = 9 },
		"blob number zero":           func(o *Options) { o.Blob = 0 },
		"blob number too large":      func(o *Options) { o.Blob = 255 },
	} {
		o := small
		change(&o)
		if w, err := NewWriter(io.Discard, o); err == nil {
			w.Close()
			t.Errorf("%s: no error", name)
		}
	}
}
