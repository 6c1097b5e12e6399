package daemon

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/zstd"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
	"holdfast/rafs"
	"holdfast/rafs/source"
)

// TestMain fails when a test leaves a goroutine behind. It is also the reader of the benchmarks, in the process they start.
func TestMain(m *testing.M) {
	if n, err := strconv.Atoi(os.Getenv(benchReads)); err == nil {
		if err := readPages(os.Getenv(benchFile), n); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	code := m.Run()
	if code == 0 {
		code = leaks()
	}
	os.Exit(code)
}

// leaks waits for goroutines with this package's code to end, which those of a closed connection take a moment for.
func leaks() int {
	var left []string
	for range 100 {
		buf := make([]byte, 1<<20)
		left = nil
		for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			if strings.Contains(g, "holdfast/") && !strings.Contains(g, "holdfast/daemon.TestMain") {
				left = append(left, g)
			}
		}
		if len(left) == 0 {
			return 0
		}
		time.Sleep(20 * time.Millisecond)
	}
	fmt.Fprintf(os.Stderr, "goroutines left:\n%s\n", strings.Join(left, "\n\n"))
	return 1
}

// An engine is a simulated kernel's, with faults and a record of what the daemon did.
type engine struct {
	*simkernel.Engine

	mountError error // what Mount fails with, instead
	busy       bool  // Remove fails with ErrBusy

	mu       sync.Mutex
	asked    map[uint64]time.Time // when Next returned a request, by token
	answers  []answer
	complete map[fscache.Key]int                            // calls of Complete
	synced   map[fscache.Key]int                            // calls of Sync before the first of Complete
	dropped  int                                            // calls of Drop
	dropping func()                                         // called by Drop first; may be nil
	culling  time.Duration                                  // that Cull takes
	flushed  int64                                          // bytes given to Flush
	write    func(k fscache.Key, p []byte, off int64) error // what WriteAt fails with, instead
	read     func() error                                   // what ReadAt fails with, instead
	share    func() error                                   // what Share fails with, instead
	present  func(k fscache.Key)                            // called by Present; may be nil
}

// An answer is what the daemon answered.
type answer struct {
	fscache.Request
	errno fscache.Errno
	took  time.Duration
}

func (e *engine) Next() (fscache.Request, error) {
	r, err := e.Engine.Next()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked[r.Token] = time.Now()
	return r, err
}

// Answer takes answers to requests with Token 0, which a test made up, for itself.
func (e *engine) Answer(r fscache.Request, n fscache.Errno) error {
	e.mu.Lock()
	e.answers = append(e.answers, answer{r, n, time.Since(e.asked[r.Token])})
	e.mu.Unlock()
	if r.Token == 0 {
		return nil
	}
	return e.Engine.Answer(r, n)
}

func (e *engine) Mount(ctx context.Context, m fscache.Mount) error {
	if e.mountError != nil {
		return e.mountError
	}
	return e.Engine.Mount(ctx, m)
}

func (e *engine) Remove(k fscache.Key) error {
	if e.busy {
		return fmt.Errorf("object %s: %w", k, fscache.ErrBusy)
	}
	return e.Engine.Remove(k)
}

func (e *engine) Flush(k fscache.Key, x fscache.Extent) error {
	e.mu.Lock()
	e.flushed += x.Len
	e.mu.Unlock()
	return e.Engine.Flush(k, x)
}

// reads returns the answers to reads of an object so far and forgets them.
func (e *engine) reads(k fscache.Key) (list []answer) {
	e.mu.Lock()
	defer e.mu.Unlock()
	var rest []answer
	for _, a := range e.answers {
		if a.Object == k && a.Op == fscache.OpRead {
			list = append(list, a)
		} else {
			rest = append(rest, a)
		}
	}
	e.answers = rest
	return list
}

func (e *engine) fail(write func(k fscache.Key, p []byte, off int64) error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.write = write
}

func (e *engine) WriteAt(k fscache.Key, p []byte, off int64) error {
	e.mu.Lock()
	write := e.write
	e.mu.Unlock()
	if write != nil {
		if err := write(k, p, off); err != nil {
			return err
		}
	}
	return e.Engine.WriteAt(k, p, off)
}

func (e *engine) ReadAt(k fscache.Key, p []byte, off int64) error {
	if e.read != nil {
		return e.read()
	}
	return e.Engine.ReadAt(k, p, off)
}

func (e *engine) Share(k fscache.Key, x fscache.Extent, with fscache.Key, at int64) (int64, error) {
	if e.share != nil {
		return 0, e.share()
	}
	return e.Engine.Share(k, x, with, at)
}

func (e *engine) Present(k fscache.Key) ([]fscache.Extent, error) {
	if e.present != nil {
		e.present(k)
	}
	return e.Engine.Present(k)
}

func (e *engine) Drop(k fscache.Key, x fscache.Extent) error {
	e.mu.Lock()
	e.dropped++
	e.mu.Unlock()
	if e.dropping != nil {
		e.dropping()
	}
	return e.Engine.Drop(k, x)
}

func (e *engine) Cull(ctx context.Context, k fscache.Key) error {
	time.Sleep(e.culling)
	return e.Engine.Cull(ctx, k)
}

func (e *engine) Sync(k fscache.Key) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.complete[k] == 0 {
		e.synced[k]++
	}
	return e.Engine.Sync(k)
}

func (e *engine) Complete(k fscache.Key) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.complete[k]++
	return e.Engine.Complete(k)
}

// A rig is a daemon over a simulated kernel, without its API.
type rig struct {
	t      testing.TB
	d      *Daemon
	e      *engine
	kernel *simkernel.Kernel
	dirs   map[fscache.Key]string // where an object is mounted
}

// eachMode runs a test in a synctest bubble over both of the kernel's interfaces.
func eachMode(t *testing.T, f func(t *testing.T, mode simkernel.Mode)) {
	for name, mode := range map[string]simkernel.Mode{"cachefiles": simkernel.Cachefiles, "fanotify": simkernel.Fanotify} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { f(t, mode) })
		})
	}
}

func newRig(t testing.TB, mode simkernel.Mode, change func(*Options)) *rig {
	t.Helper()
	return rigOver(t, simkernel.New(mode), t.TempDir(), change)
}

// rigOver starts a daemon over a kernel and a root that may have been used before.
func rigOver(t testing.TB, k *simkernel.Kernel, root string, change func(*Options)) *rig {
	t.Helper()
	d, e := newTestDaemon(t, k, root, change)
	d.pump.start()
	return &rig{t: t, d: d, e: e, kernel: k, dirs: map[fscache.Key]string{}}
}

func newTestDaemon(t testing.TB, k *simkernel.Kernel, root string, change func(*Options)) (*Daemon, *engine) {
	t.Helper()
	se, err := k.Open()
	if err != nil {
		t.Fatal(err)
	}
	e := &engine{Engine: se, asked: map[uint64]time.Time{}, complete: map[fscache.Key]int{}, synced: map[fscache.Key]int{}}
	o := Options{Engine: e, Log: zap.NewNop(), Release: "test", Root: root, Socket: filepath.Join(root, "s")}
	if testing.Verbose() {
		o.Log = zaptest.NewLogger(t)
	}
	if change != nil {
		change(&o)
	}
	d, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return d, e
}

func (r *rig) close() {
	r.t.Helper()
	if err := r.d.close(); err != nil {
		r.t.Error(err)
	}
}

// A testBlob is a blob and what its object must hold.
type testBlob struct {
	key    fscache.Key
	want   []byte // the object
	table  *rafs.Table
	stored []byte

	mu     sync.Mutex
	ranges [][2]int64 // asked for: offset, length
	// before is called with each range before it is answered, and may fail or replace it; nil: nothing.
	before func(ctx context.Context, off, n int64, r io.Reader) (io.Reader, error)
}

// newBlob makes a blob of chunks with the given sizes in bytes; 0 stands for a zero row of two blocks.
func newBlob(id string, seed uint64, codec rafs.Codec, sizes ...int) *testBlob {
	rng := rand.New(rand.NewPCG(seed, 1))
	b := &testBlob{key: fscache.Key{Domain: LocalDomain, ID: id}}
	var rows []rafs.Chunk
	for _, n := range sizes {
		if n == 0 {
			b.want = append(b.want, make([]byte, 2*fscache.BlockSize)...)
			continue
		}
		p := make([]byte, n)
		for i := 0; i < n; i += 8 {
			var word [8]byte
			binary.LittleEndian.PutUint64(word[:], rng.Uint64()&0x0707070707070707)
			copy(p[i:], word[:])
		}
		c := rafs.Chunk{Offset: uint64(len(b.want)), BlobOffset: uint64(len(b.stored)), Size: uint32(n), Codec: codec, Digest: rafs.Blake3.Sum(p)}
		stored := p
		if codec == rafs.CodecZstd {
			stored = compress(p)
		}
		c.Stored = uint32(len(stored))
		rows = append(rows, c)
		b.stored = append(b.stored, stored...)
		b.want = append(b.want, p...)
		b.want = append(b.want, make([]byte, int(rafs.AlignUp(uint64(len(b.want))))-len(b.want))...)
	}
	var err error
	if b.table, err = rafs.NewTable(rows, uint64(len(b.want)), uint64(len(b.stored)), rafs.Blake3); err != nil {
		panic(err)
	}
	return b
}

// compress makes a zstd frame of p. Its encoder is its own: one made outside a synctest bubble cannot be used in it.
func compress(p []byte) []byte {
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		panic(err)
	}
	defer z.Close()
	return z.EncodeAll(p, nil)
}

// many returns n sizes.
func many(n, size int) []int {
	s := make([]int, n)
	for i := range s {
		s[i] = size
	}
	return s
}

func (b *testBlob) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	b.mu.Lock()
	b.ranges = append(b.ranges, [2]int64{off, n})
	before := b.before
	b.mu.Unlock()
	if err := source.CheckRange("blob", off, n, b.Size()); err != nil {
		return nil, err
	}
	var r io.Reader = bytes.NewReader(b.stored[off : off+n])
	if before != nil {
		var err error
		if r, err = before(ctx, off, n, r); err != nil {
			return nil, err
		}
	}
	return io.NopCloser(r), nil
}

func (b *testBlob) Size() int64    { return int64(len(b.stored)) }
func (b *testBlob) String() string { return "test:" + b.key.ID }
func (b *testBlob) Close() error   { return nil }

// asked returns the ranges asked for so far and forgets them.
func (b *testBlob) asked() [][2]int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	r := b.ranges
	b.ranges = nil
	return r
}

func (b *testBlob) setBefore(f func(ctx context.Context, off, n int64, r io.Reader) (io.Reader, error)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.before = f
}

// mount mounts an image of the blobs until the returned function is called. g may be nil.
func (r *rig) mount(g *gate, blobs ...*testBlob) (unmount func()) {
	r.t.Helper()
	if g == nil {
		g = &gate{}
	}
	dir := r.t.TempDir()
	m := fscache.Mount{Dir: dir}
	var holds []*hold
	for i, b := range append([]*testBlob{newBlob("boot"+filepath.Base(dir), 99, rafs.CodecNone, fscache.BlockSize)}, blobs...) {
		h, err := r.d.hold(context.Background(), b.key, b.table, b, g)
		if err != nil {
			r.t.Fatal(err)
		}
		holds = append(holds, h)
		o := fscache.Object{Key: b.key, Size: h.o.size()}
		if i == 0 {
			m.Bootstrap = o
		} else {
			m.Blobs = append(m.Blobs, o)
			r.dirs[b.key] = dir
		}
	}
	if err := r.e.Mount(context.Background(), m); err != nil {
		r.t.Fatal(err)
	}
	return func() {
		r.t.Helper()
		err := r.e.Unmount(context.Background(), dir)
		for _, h := range holds {
			err = errors.Join(err, r.d.release(h))
		}
		if err != nil {
			r.t.Error(err)
		}
	}
}

// read reads like a process does and checks the bytes.
func (r *rig) read(b *testBlob, off, n int64) error {
	r.t.Helper()
	got := make([]byte, n)
	err := r.kernel.Read(context.Background(), r.dirs[b.key], b.key, got, off)
	if err == nil && !bytes.Equal(got, b.want[off:off+n]) {
		r.t.Errorf("read of %s, %d bytes at %d: wrong bytes", b.key, n, off)
	}
	return err
}

// wantOK is a read that must succeed, wantError one that must not.
func (r *rig) wantOK(b *testBlob, off, n int64) {
	r.t.Helper()
	if err := r.read(b, off, n); err != nil {
		r.t.Errorf("read of %s, %d bytes at %d: %v", b.key, n, off, err)
	}
}

func (r *rig) wantError(b *testBlob, off, n int64) {
	r.t.Helper()
	if err := r.read(b, off, n); err == nil {
		r.t.Errorf("read of %s, %d bytes at %d succeeded", b.key, n, off)
	}
}

// ask serves a made-up request and returns its answer.
func (r *rig) ask(q fscache.Request) fscache.Errno {
	r.t.Helper()
	r.d.serve(q, &turn{pump: r.d.pump})
	r.e.mu.Lock()
	defer r.e.mu.Unlock()
	if len(r.e.answers) == 0 {
		r.t.Fatal("no answer")
	}
	a := r.e.answers[len(r.e.answers)-1]
	r.e.answers = r.e.answers[:len(r.e.answers)-1]
	if a.Request != q {
		r.t.Fatalf("the last answer is to %v, not to %v", a.Request, q)
	}
	return a.errno
}

// object returns the daemon's object of a blob.
func (r *rig) object(b *testBlob) *object { return r.d.objects.get(b.key) }
