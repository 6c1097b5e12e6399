package load

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// maxFailures is how many failures are told in full: one broken rule breaks for many pages.
const maxFailures = 8

// A Config says how an image on a directory is read.
type Config struct {
	Dir     string
	Image   Image
	Readers int
	Seed    uint64
	Pause   time.Duration // of each reader between reads; 0: none
	Bound   time.Duration // of O3
}

// Readers are goroutines that read pages at random, those nobody has read yet first. Each read goes past the page cache.
type Readers struct {
	Config
	files []File
	order []page // all pages, shuffled
	next  atomic.Int64

	stop    chan struct{}
	stopped sync.Once
	wg      sync.WaitGroup
	slots   []slot

	mu       sync.Mutex
	failures []string
	count    int
	failed   chan struct{} // closed at the first failure
	longest  time.Duration
	reads    atomic.Int64
}

// A page is one of a file's.
type page struct {
	file int
	off  int64
}

// A slot says what a reader is waiting for.
type slot struct {
	mu    sync.Mutex
	since time.Time // zero: nothing
	where string
	told  bool // that it waits too long
}

// Start starts readers. Stop must be called.
func Start(c Config) *Readers {
	r := &Readers{Config: c, files: c.Image.List(), stop: make(chan struct{}), failed: make(chan struct{}), slots: make([]slot, c.Readers)}
	for i, f := range r.files {
		for off := int64(0); off < f.Size; off += PageSize {
			r.order = append(r.order, page{i, off})
		}
	}
	random := rand.New(rand.NewPCG(c.Seed, 1))
	random.Shuffle(len(r.order), func(i, j int) { r.order[i], r.order[j] = r.order[j], r.order[i] })
	for i := range r.slots {
		r.wg.Go(func() { r.read(i) }) // ends at stop; Stop waits
	}
	r.wg.Go(r.watch) // likewise
	return r
}

func (r *Readers) read(reader int) {
	random := rand.New(rand.NewPCG(r.Seed, uint64(reader)+2))
	got, want := make([]byte, PageSize), make([]byte, PageSize)
	for {
		select {
		case <-r.stop:
			return
		case <-time.After(r.Pause):
		}
		n := r.next.Add(1) - 1
		if n >= int64(len(r.order)) {
			n = random.Int64N(int64(len(r.order)))
		}
		r.readPage(&r.slots[reader], r.order[n], got, want)
	}
}

func (r *Readers) readPage(s *slot, p page, got, want []byte) {
	f := r.files[p.file]
	size := min(PageSize, f.Size-p.off)
	where := fmt.Sprintf("%s at %d", filepath.Join(r.Dir, f.Path), p.off)
	s.begin(where)
	err := readCold(filepath.Join(r.Dir, f.Path), got[:size], p.off)
	took := s.end()
	r.reads.Add(1)
	r.took(took)
	if err != nil {
		r.fail("O2: read %s: %v after %v", where, err, took)
		return
	}
	f.Fill(want[:size], p.off)
	if !bytes.Equal(got[:size], want[:size]) {
		r.fail("O1: read %s: %s", where, describe(got[:size], want[:size]))
	}
	if took > r.Bound {
		r.fail("O3: read %s took %v, with a bound of %v", where, took, r.Bound)
	}
}

// readCold reads a page that is not in the page cache any more.
func readCold(path string, p []byte, off int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	// Random: no read-ahead, which would ask for pages of other readers.
	for _, advice := range []int{unix.FADV_RANDOM, unix.FADV_DONTNEED} {
		if err := unix.Fadvise(int(f.Fd()), off, PageSize, advice); err != nil {
			return fmt.Errorf("fadvise: %w", err)
		}
	}
	_, err = f.ReadAt(p, off)
	return err
}

// describe says in what way got is wrong.
func describe(got, want []byte) string {
	i := 0
	for got[i] == want[i] {
		i++
	}
	what := "wrong bytes"
	if len(bytes.Trim(got[i:], "\x00")) == 0 {
		what = "zeros"
	}
	return fmt.Sprintf("%s from byte %d of the page on", what, i)
}

func (s *slot) begin(where string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.since, s.where, s.told = time.Now(), where, false
}

func (s *slot) end() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	took := time.Since(s.since)
	s.since = time.Time{}
	return took
}

// watch finds readers that do not come back at all.
func (r *Readers) watch() {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-r.stop:
			return
		case <-tick.C:
			for i := range r.slots {
				if where := r.slots[i].overdue(r.Bound); where != "" {
					r.fail("O3: read %s has not come back within %v", where, r.Bound)
				}
			}
		}
	}
}

func (s *slot) overdue(bound time.Duration) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.since.IsZero() || s.told || time.Since(s.since) < bound {
		return ""
	}
	s.told = true
	return s.where
}

func (r *Readers) took(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.longest = max(r.longest, d)
}

func (r *Readers) fail(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.count == 0 {
		close(r.failed)
	}
	if r.count++; r.count <= maxFailures {
		r.failures = append(r.failures, fmt.Sprintf(format, args...))
	}
}

// Failed is closed when a rule was broken.
func (r *Readers) Failed() <-chan struct{} { return r.failed }

// Fresh is how many pages nobody has asked for yet.
func (r *Readers) Fresh() int64 { return max(int64(len(r.order))-r.next.Load(), 0) }

// Reads is how many reads came back, and Longest what the longest of them took.
func (r *Readers) Reads() int64 { return r.reads.Load() }

// Longest is how long the slowest read took.
func (r *Readers) Longest() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.longest
}

// Waiting is how many readers have been waiting for longer than d.
func (r *Readers) Waiting(d time.Duration) (n int) {
	for i := range r.slots {
		s := &r.slots[i]
		s.mu.Lock()
		if !s.since.IsZero() && time.Since(s.since) > d {
			n++
		}
		s.mu.Unlock()
	}
	return n
}

// Stop ends the readers and returns what rules were broken. A reader that does not come back within the bound is one of them, and
// is left behind.
func (r *Readers) Stop() error {
	r.stopped.Do(func() { close(r.stop) })
	done := make(chan struct{})
	go func() { defer close(done); r.wg.Wait() }() // ends with the readers
	select {
	case <-done:
	case <-time.After(r.Bound):
		for i := range r.slots {
			if where := r.slots[i].overdue(0); where != "" {
				r.fail("O3: read %s does not come back", where)
			}
		}
	}
	return r.Err()
}

// Err returns what rules were broken so far.
func (r *Readers) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var errs []error
	for _, f := range r.failures {
		errs = append(errs, errors.New(f))
	}
	if more := r.count - len(r.failures); more > 0 {
		errs = append(errs, fmt.Errorf("and %d more", more))
	}
	return errors.Join(errs...)
}

// Compare reads all of the image on dir past the page cache, and says what of it is wrong.
func (i Image) Compare(dir string) error {
	var all errgroup.Group
	all.SetLimit(8)
	var mu sync.Mutex
	var errs []error
	for _, f := range i.List() {
		all.Go(func() error {
			if err := f.compare(filepath.Join(dir, f.Path)); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, err)
			}
			return nil
		})
	}
	_ = all.Wait() // what is wrong is in errs
	if len(errs) > maxFailures {
		errs = append(errs[:maxFailures], fmt.Errorf("and %d files more", len(errs)-maxFailures))
	}
	return errors.Join(errs...)
}

func (f File) compare(path string) error {
	in, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("O2: %w", err)
	}
	defer in.Close()
	if err := unix.Fadvise(int(in.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return fmt.Errorf("fadvise: %w", err)
	}
	got, err := io.ReadAll(in)
	if err != nil {
		return fmt.Errorf("O2: %w", err)
	}
	want := make([]byte, f.Size)
	f.Fill(want, 0)
	if len(got) != len(want) {
		return fmt.Errorf("O1: %s has %d bytes, want %d", path, len(got), len(want))
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("O1: %s: %s", path, describe(got, want))
	}
	return nil
}
