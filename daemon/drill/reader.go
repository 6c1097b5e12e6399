package drill

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/daemon/drill/inject"
)

const (
	maxRead  = 256 << 10            // of a generated file, at once
	pieceLen = 128 << 10            // what is compared as a whole is read in parts of up to this
	memory   = 64                   // ranges that a reader remembers, to read them again when they are in the cache
	thinking = 2 * time.Millisecond // between two reads, on the average
)

// A reader reads at random, compares, and takes the time, until its context ends. A read that the kernel does not answer keeps it for ever: nothing
// but the end of the process wakes it then.
type reader struct {
	c       *collector
	targets []*target
	rand    *rand.Rand

	mu      sync.Mutex
	latency histogram
	felt    *timeline

	since atomic.Int64 // when the read under way began, plus one; 0: none is under way
	path  atomic.Pointer[string]
	seen  []seenRange
	want  []byte // what p must hold
	p     []byte
}

type seenRange struct {
	t     *target
	round int64
	f     *file
	off   int64
	n     int
}

func newReader(c *collector, targets []*target, seed uint64) *reader {
	return &reader{
		c: c, targets: targets, rand: rand.New(rand.NewPCG(seed, 2)), felt: newTimeline(),
		want: make([]byte, maxRead), p: make([]byte, maxRead),
	}
}

// waiting returns for how long the read under way has waited.
func (r *reader) waiting(now time.Duration) time.Duration {
	if s := r.since.Load(); s != 0 {
		return now - time.Duration(s-1)
	}
	return 0
}

func (r *reader) run(ctx context.Context) {
	for ctx.Err() == nil {
		t := r.targets[r.rand.IntN(len(r.targets))]
		if !t.renewing.Load() && t.lock.TryRLock() {
			if !t.broken {
				r.visit(t)
			}
			t.lock.RUnlock()
		}
		time.Sleep(rand.N(2 * thinking))
	}
}

// visit reads something of a target: half of the time what was read before, so that what is in the cache is looked at as well.
func (r *reader) visit(t *target) {
	round := t.rounds.Load()
	s := seenRange{t: t, round: round}
	if len(r.seen) > 0 && r.rand.IntN(2) == 0 {
		s = r.seen[r.rand.IntN(len(r.seen))]
	}
	if s.t != t || s.round != round || s.f == nil {
		s = seenRange{t: t, round: round, f: t.pick(r.rand)}
		if s.f.content != nil {
			s.off = r.rand.Int64N(s.f.size)
			s.n = 1 + r.rand.IntN(int(min(maxRead, s.f.size-s.off)))
		} else {
			p := s.f.pieces[r.rand.IntN(len(s.f.pieces))]
			s.off, s.n = p.off, p.size
		}
		if len(r.seen) < memory {
			r.seen = append(r.seen, s)
		} else {
			r.seen[r.rand.IntN(memory)] = s
		}
	}
	path := filepath.Join(t.dir, s.f.path)
	fd := r.open(path)
	if fd == nil {
		return
	}
	defer fd.Close()
	if r.rand.IntN(4) > 0 {
		_ = inject.DropCache(fd, s.off, int64(s.n)) // as well as it can: what is still cached is read from the cache
	}
	if s.f.content != nil {
		r.compare(fd, s)
	} else {
		r.digest(fd, s)
	}
}

// open opens a file: a wait for that is a stall as well, and a failure an error. It returns nil after one.
func (r *reader) open(path string) *os.File {
	var fd *os.File
	o := r.timed(path, 0, 0, func(o *outcome) {
		var err error
		if fd, err = os.Open(path); err != nil {
			o.errno = inject.Errno(err)
		}
	})
	r.mu.Lock()
	r.felt.wait(o.start, o.end)
	r.mu.Unlock()
	return fd
}

// compare reads a range of a generated file at once.
func (r *reader) compare(fd *os.File, s seenRange) {
	s.f.content.fill(r.want[:s.n], s.off)
	r.read(fd, r.p[:s.n], s.off, r.want[:s.n])
}

// digest reads a piece in parts and compares its digest.
func (r *reader) digest(fd *os.File, s seenRange) {
	if len(r.p) < s.n {
		r.p = make([]byte, s.n)
	}
	start := r.c.now()
	for at := 0; at < s.n; {
		n := min(1+r.rand.IntN(pieceLen), s.n-at)
		if !r.read(fd, r.p[at:at+n], s.off+int64(at), nil) {
			return
		}
		at += n
	}
	for _, p := range s.f.pieces {
		if p.off == s.off && !p.right(r.p[:s.n]) {
			now := r.c.now()
			r.c.note(outcome{start: start, end: now, wrong: true, several: true}, fd.Name(), s.off, s.n)
		}
	}
}

// read is one read, with what it must give if that is known. It returns whether all of it was read.
func (r *reader) read(fd *os.File, p []byte, off int64, want []byte) bool {
	var n int
	o := r.timed(fd.Name(), off, len(p), func(o *outcome) {
		var err error
		n, err = fd.ReadAt(p, off)
		switch {
		case errors.Is(err, io.EOF): // nothing is read past a file's end here
			o.wrong = n < len(p)
		case err != nil:
			o.errno = inject.Errno(err)
		}
		if want != nil && !bytes.Equal(p[:n], want[:n]) {
			o.wrong = true
		}
	})
	r.mu.Lock()
	r.latency.add(o.end - o.start)
	r.felt.add(o.start, o.end)
	r.mu.Unlock()
	r.c.reads.Add(1)
	r.c.bytes.Add(int64(n))
	return n == len(p)
}

// timed does what the kernel may keep waiting, and has it judged.
func (r *reader) timed(path string, off int64, n int, do func(*outcome)) outcome {
	r.path.Store(&path)
	o := outcome{start: r.c.now()}
	r.since.Store(int64(o.start) + 1)
	do(&o)
	o.end = r.c.now()
	r.since.Store(0)
	r.c.note(o, path, off, n)
	return o
}

// sweep reads all of a target once more, and none of it from the page cache.
func (r *reader) sweep(ctx context.Context, t *target) {
	t.lock.RLock()
	defer t.lock.RUnlock()
	if t.broken {
		return
	}
	for i := range t.files {
		f := &t.files[i]
		fd := r.open(filepath.Join(t.dir, f.path))
		if fd == nil {
			continue
		}
		_ = inject.DropCache(fd, 0, 0) // 0: to the end
		for off := int64(0); off < f.size && ctx.Err() == nil; off += maxRead {
			r.compare(fd, seenRange{f: f, off: off, n: int(min(maxRead, f.size-off))})
		}
		fd.Close()
	}
}
