package enginetest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/fnv"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"holdfast/fscache"
)

// patience bounds every wait for something that must happen; an emulated machine may take long. shortly is how long a
// rule watches for something that must not happen.
const (
	patience = time.Minute
	shortly  = 30 * time.Millisecond
)

const blobSize = 1 << 20 // bytes, of most blobs here

// A rig is an engine with something that answers what rules are not about: opens, closes and the bootstrap. Requests for
// blobs go to reads, or are filled at once when serving is on.
type rig struct {
	t     testing.TB
	h     Harness
	e     fscache.Engine
	inbox *Inbox
	store *Store
	reads chan fscache.Request

	mu         sync.Mutex
	bootstraps map[fscache.Key][]byte
	sizes      map[fscache.Key]int64
	serving    bool
	mounts     []string

	loops sync.WaitGroup // of next, which end when the engine is closed
}

// newRig opens an engine. Cleanup answers what is pending, unmounts and closes.
func newRig(t testing.TB, h Harness) *rig {
	t.Helper()
	t.TempDir() // the directories of all mounts are in one that is removed in the place of the first, so after they are unmounted
	store := NewStore()
	t.Cleanup(store.Close)
	return takeOver(t, h, store, fscache.Inherited{})
}

// takeOver is newRig of an engine that may have a predecessor.
func takeOver(t testing.TB, h Harness, store *Store, left fscache.Inherited) *rig {
	t.Helper()
	inbox := NewInbox(256, 1024)
	r := &rig{
		t: t, h: h, e: h.Open(t, left, inbox, store), inbox: inbox, store: store,
		reads:      make(chan fscache.Request, 1024),
		bootstraps: make(map[fscache.Key][]byte),
		sizes:      make(map[fscache.Key]int64),
	}
	t.Cleanup(r.tearDown)
	return r
}

// start makes n goroutines call Next until the engine is closed.
func (r *rig) start(n int) {
	for range n {
		r.loops.Go(r.next)
	}
}

// next hands out requests until Next fails.
func (r *rig) next() {
	for {
		req, err := r.e.Next()
		if err != nil {
			if !errors.Is(err, fscache.ErrClosed) {
				r.t.Errorf("Next: %v, want ErrClosed", err)
			}
			return
		}
		r.dispatch(req)
	}
}

func (r *rig) dispatch(req fscache.Request) {
	r.mu.Lock()
	boot, isBoot := r.bootstraps[req.Object]
	serving := r.serving
	r.mu.Unlock()
	switch {
	case req.Op != fscache.OpRead:
		r.answer(req, fscache.OK)
	case isBoot:
		p := fscache.AlignedBuffer(len(boot))
		copy(p, boot)
		if err := r.e.WriteAt(req.Object, p, 0); err != nil {
			r.t.Errorf("writing the bootstrap: %v", err)
		}
		r.answer(req, fscache.OK)
	case serving:
		r.fill(req)
	default:
		r.reads <- req
	}
}

// answer answers and reports what is no ErrGone.
func (r *rig) answer(req fscache.Request, a fscache.Errno) {
	r.t.Helper()
	if err := r.e.Answer(req, a); err != nil && !errors.Is(err, fscache.ErrGone) && !errors.Is(err, fscache.ErrClosed) {
		r.t.Errorf("Answer(%v, %d): %v", req, a, err)
	}
}

// fill writes the blocks a request asks for and answers it.
func (r *rig) fill(req fscache.Request) {
	r.t.Helper()
	r.mu.Lock()
	size := r.sizes[req.Object]
	r.mu.Unlock()
	from := req.Off &^ (fscache.BlockSize - 1)
	to := min((req.Off+req.Len+fscache.BlockSize-1)&^(fscache.BlockSize-1), size)
	if from < to {
		r.write(req.Object, from, to-from)
	}
	r.answer(req, fscache.OK)
}

// write writes content of an object into its cache file.
func (r *rig) write(k fscache.Key, off, n int64) {
	r.t.Helper()
	if err := r.e.WriteAt(k, content(k, off, n), off); err != nil && !errors.Is(err, fscache.ErrClosed) {
		r.t.Errorf("WriteAt %s %d+%d: %v", k, off, n, err)
	}
}

// serve answers all requests for blobs from here on, and those that wait.
func (r *rig) serve() {
	r.mu.Lock()
	r.serving = true
	r.mu.Unlock()
	for {
		select {
		case req := <-r.reads:
			r.fill(req)
		default:
			return
		}
	}
}

// request waits for a request for a blob.
func (r *rig) request() fscache.Request {
	r.t.Helper()
	select {
	case req := <-r.reads:
		return req
	case <-time.After(patience):
		r.t.Fatal("no request came")
		return fscache.Request{}
	}
}

// noRequest checks that none is there.
func (r *rig) noRequest() {
	r.t.Helper()
	select {
	case req := <-r.reads:
		r.t.Errorf("the kernel asked for %v", req)
	default:
	}
}

// add adds objects.
func (r *rig) add(objects ...fscache.Object) {
	r.t.Helper()
	for _, o := range objects {
		if err := r.e.Add(context.Background(), o); err != nil {
			r.t.Fatalf("Add(%v): %v", o, err)
		}
		r.mu.Lock()
		r.sizes[o.Key] = o.Size
		r.mu.Unlock()
	}
}

// mount mounts an image of blobs, which are added first, and returns where.
func (r *rig) mount(name string, blobs ...fscache.Object) string {
	r.t.Helper()
	r.add(blobs...)
	m := r.image(name, blobs...)
	if err := r.e.Mount(context.Background(), m); err != nil {
		r.t.Fatalf("Mount: %v", err)
	}
	r.mu.Lock()
	r.mounts = append(r.mounts, m.Dir)
	r.mu.Unlock()
	return m.Dir
}

// image makes the bootstrap of an image, adds it, and returns what Mount wants, with a fresh directory.
func (r *rig) image(name string, blobs ...fscache.Object) fscache.Mount {
	r.t.Helper()
	boot, err := Bootstrap(blobs)
	if err != nil {
		r.t.Fatal(err)
	}
	path := filepath.Join(r.t.TempDir(), "bootstrap")
	if err := os.WriteFile(path, boot, 0o600); err != nil {
		r.t.Fatal(err)
	}
	domain := "d"
	if len(blobs) > 0 {
		domain = blobs[0].Key.Domain
	}
	o := fscache.Object{Key: fscache.Key{Domain: domain, ID: name}, Size: int64(len(boot))}
	r.mu.Lock()
	r.bootstraps[o.Key] = boot
	r.mu.Unlock()
	if r.e.AsksForBootstrap() {
		r.add(o)
	}
	return fscache.Mount{Dir: r.t.TempDir(), Bootstrap: o, BootstrapPath: path, Blobs: blobs}
}

// unmount unmounts and fails the rule if that does not work.
func (r *rig) unmount(dir string) {
	r.t.Helper()
	if err := r.e.Unmount(context.Background(), dir); err != nil {
		r.t.Fatalf("Unmount: %v", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, m := range r.mounts {
		if m == dir {
			r.mounts = append(r.mounts[:i], r.mounts[i+1:]...)
			return
		}
	}
}

// handOver closes the engine without unmounting, and returns what a supervisor, the inbox and the records then have.
func (r *rig) handOver() (left fscache.Inherited, mounts []string) {
	r.t.Helper()
	if _, f := r.e.Lifeline(); f != nil { // a simulated kernel has none
		var err error
		if left.Lifeline, err = Dup(f); err != nil {
			r.t.Fatal(err)
		}
	}
	if s, ok := r.e.(fscache.Successor); ok {
		if err := r.e.Freeze(); err != nil {
			r.t.Fatal(err)
		}
		left.Pending = s.Pending()
	}
	r.mu.Lock()
	mounts, r.mounts = r.mounts, nil
	r.mu.Unlock()
	r.close()
	left.Messages = r.inbox.Messages()
	var err error
	if left.Objects, err = r.store.Held(); err != nil {
		r.t.Fatal(err)
	}
	return left, mounts
}

func (r *rig) close() {
	if err := r.e.Close(); err != nil {
		r.t.Errorf("Close: %v", err)
	}
	r.loops.Wait()
}

func (r *rig) tearDown() {
	r.serve()
	r.mu.Lock()
	mounts := r.mounts
	r.mu.Unlock()
	for _, dir := range mounts {
		err := r.e.Unmount(context.Background(), dir)
		if err != nil && !r.t.Failed() {
			r.t.Errorf("Unmount at the end: %v", err)
		}
		if err != nil && r.h.AfterMounts != nil {
			r.h.AfterMounts(dir)
		}
	}
	r.close()
}

// A result is how a read ended.
type result struct {
	p   []byte
	err error
}

// read starts a read of a blob through a mount; the result comes when the kernel lets the reader go.
func (r *rig) read(dir string, k fscache.Key, off, n int64) <-chan result {
	done := make(chan result, 1)
	go func() { // ends with the read: when its request is answered, at the latest in tearDown
		p := make([]byte, n)
		err := r.h.Readers.Read(dir, k, p, off)
		done <- result{p, err}
	}()
	return done
}

// check reads n bytes and checks them; unlike get it may be called from any goroutine.
func (r *rig) check(dir string, k fscache.Key, off, n int64) {
	p := make([]byte, n)
	if err := r.h.Readers.Read(dir, k, p, off); err != nil {
		r.t.Errorf("read of %s at %d: %v", k, off, err)
		return
	}
	if !bytes.Equal(p, content(k, off, n)) {
		r.t.Errorf("read of %s at %d: wrong bytes", k, off)
	}
}

// get waits for a read and checks its bytes.
func (r *rig) get(done <-chan result, k fscache.Key, off int64) {
	r.t.Helper()
	res := r.end(done)
	if res.err != nil {
		r.t.Errorf("read of %s at %d: %v", k, off, res.err)
		return
	}
	if !bytes.Equal(res.p, content(k, off, int64(len(res.p)))) {
		r.t.Errorf("read of %s at %d: wrong bytes (zeros: %v)", k, off, bytes.Count(res.p, []byte{0}) == len(res.p))
	}
}

// end waits for a read.
func (r *rig) end(done <-chan result) result {
	r.t.Helper()
	select {
	case res := <-done:
		return res
	case <-time.After(patience):
		r.t.Fatal("the reader was not let go")
		return result{}
	}
}

// deny answers every request with errno until the read ends. One read(2) can ask twice: when its read-ahead fails, the
// kernel tries the page it needs once more (mm/filemap.c, filemap_get_pages then filemap_update_page).
func (r *rig) deny(done <-chan result, errno fscache.Errno) result {
	r.t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case req := <-r.reads:
			r.answer(req, errno)
		case res := <-done:
			return res
		case <-timeout:
			r.t.Fatal("the reader was not let go")
		}
	}
}

// asleep checks that a read has not ended.
func (r *rig) asleep(done <-chan result) {
	r.t.Helper()
	select {
	case res := <-done:
		r.t.Fatalf("the reader was let go without an answer: %v", res.err)
	case <-time.After(shortly):
	}
}

// blob names an object of the usual size.
func blob(domain, id string) fscache.Object {
	return fscache.Object{Key: fscache.Key{Domain: domain, ID: id}, Size: blobSize}
}

// content returns bytes of an object, in aligned memory: each 8 tell whose they are and from where. None is zero.
func content(k fscache.Key, off, n int64) []byte {
	h := fnv.New32a()
	h.Write([]byte(k.String()))
	p := fscache.AlignedBuffer(int(n))
	for i := int64(0); i+8 <= n; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], uint64(h.Sum32()|1)<<32|uint64(off+i)>>3|1)
	}
	return p
}
