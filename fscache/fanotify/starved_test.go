package fanotify

import (
	"errors"
	"os"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// A limit is that on this process's descriptors.
type limit struct {
	t   *testing.T
	old unix.Rlimit
}

// newLimit returns the limit, which is as before when the test ends.
func newLimit(t *testing.T) *limit {
	t.Helper()
	l := &limit{t: t}
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l.old); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.raise)
	return l
}

func (l *limit) set(n uint64) {
	l.t.Helper()
	if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: l.old.Max}, nil); err != nil {
		l.t.Fatal(err)
	}
}

func (l *limit) raise() { l.set(l.old.Cur) }

// lower leaves the process no number but those that an engine has in reserve.
func (l *limit) lower() {
	l.t.Helper()
	free, err := placeholder()
	if err != nil {
		l.t.Fatal(err)
	}
	l.set(uint64(free))
	if err := unix.Close(free); err != nil {
		l.t.Fatal(err)
	}
}

// starving is an engine, and readers of its one object that have all they need open, in a process whose limit of descriptors is
// lowered.
type starving struct {
	*limit
	t     *testing.T
	e     *Engine
	logs  *observer.ObservedLogs
	files []*os.File
	ended chan error // one for each reader
}

func starve(t *testing.T, readers int) *starving {
	t.Helper()
	core, logs := observer.New(zapcore.ErrorLevel)
	s := &starving{t: t, e: open(t, Config{Log: zap.New(core)}), logs: logs, ended: make(chan error, readers)}
	path := add(t, s.e, testObject)
	for range readers {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		s.files = append(s.files, f)
	}
	s.limit = newLimit(t)
	return s
}

// read has every reader read so many pages of its own.
func (s *starving) read(pages int64) {
	share := testObject.Size / int64(len(s.files))
	for i, f := range s.files {
		go func() { // ends when the kernel lets it go
			var err error
			for n := int64(0); err == nil && n < pages; n++ {
				_, err = f.ReadAt(make([]byte, page), int64(i)*share+n*page)
			}
			s.ended <- err
		}()
	}
}

// serve hands requests on until Next ends, and then with what.
func (s *starving) serve() (<-chan fscache.Request, <-chan error) {
	requests, end := make(chan fscache.Request), make(chan error, 1)
	go func() { // ends with Next, whose requests are all taken
		for {
			r, err := s.e.Next()
			if err != nil {
				end <- err
				return
			}
			requests <- r
		}
	}()
	return requests, end
}

// starved takes requests until the engine says that no descriptor is left for the next. Nobody may have been let go.
func (s *starving) starved(requests <-chan fscache.Request) (taken []fscache.Request) {
	s.t.Helper()
	timeout, tick := time.After(patience), time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for s.logs.FilterMessageSnippet("LimitNOFILE=").Len() == 0 {
		select {
		case r := <-requests:
			taken = append(taken, r)
		case err := <-s.ended:
			s.t.Fatalf("a reader whose event nobody answered got %v", err)
		case <-timeout:
			s.t.Fatalf("%d requests, and the engine does not say that no descriptor is left", len(taken))
		case <-tick.C:
		}
	}
	return taken
}

func (s *starving) answer(r fscache.Request) {
	if err := errors.Join(s.e.WriteAt(r.Object, make([]byte, r.Len), r.Off), s.e.Answer(r, fscache.OK)); err != nil {
		s.t.Error(err)
	}
}

// finish answers what comes until every reader has ended, without an error.
func (s *starving) finish(requests <-chan fscache.Request) {
	s.t.Helper()
	timeout := time.After(patience)
	for left := len(s.files); left > 0; {
		select {
		case r := <-requests:
			s.answer(r)
		case err := <-s.ended:
			if err != nil {
				s.t.Errorf("a reader got: %v", err)
			}
			left--
		case <-timeout:
			s.t.Fatalf("%d of %d readers wait for ever", left, len(s.files))
		}
	}
}

func TestReadersWaitWhileNoDescriptorIsLeft(t *testing.T) {
	s := starve(t, 16)
	s.lower()
	requests, _ := s.serve()
	s.read(1)
	taken := s.starved(requests)
	if len(taken) == 0 {
		t.Fatal("nothing was read, and there is a reserve")
	}
	// What an answer gives back is used at once.
	s.answer(taken[0])
	select {
	case r := <-requests:
		s.answer(r)
	case <-time.After(patience):
		t.Fatal("an answer gave its descriptor back, and no event was read")
	}
	s.raise()
	for _, r := range taken[1:] {
		s.answer(r)
	}
	s.finish(requests)
	if n := s.logs.FilterMessageSnippet("LimitNOFILE=").Len(); n != 1 {
		t.Errorf("it was said %d times, want once", n)
	}
}

func TestStarvedReadersAreServedOnceTheLimitIsRaised(t *testing.T) {
	s := starve(t, 16)
	s.set(1) // not even what is in reserve can be used
	requests, _ := s.serve()
	s.read(1)
	if taken := s.starved(requests); len(taken) != 0 {
		t.Fatalf("%d requests without a descriptor", len(taken))
	}
	s.raise()
	s.finish(requests)
}

func TestFreezeEndsAStarvedNext(t *testing.T) {
	s := starve(t, 4)
	s.set(1)
	requests, end := s.serve()
	s.read(1)
	s.starved(requests)
	if err := s.e.Freeze(); err != nil {
		t.Fatal(err)
	}
	if err := await(t, end); !errors.Is(err, fscache.ErrClosed) {
		t.Errorf("Next: %v, want ErrClosed", err)
	}
	s.raise()
	if err := s.e.Thaw(); err != nil {
		t.Fatal(err)
	}
	requests, _ = s.serve()
	s.finish(requests)
}

// TestWhatOthersOpenMeanwhileDeniesNoReader has another thread open and close something all the time: it may get the number that was
// set free for an event.
func TestWhatOthersOpenMeanwhileDeniesNoReader(t *testing.T) {
	s := starve(t, 16)
	s.lower()
	requests, _ := s.serve()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() { // ends with stop
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if fd, err := placeholder(); err == nil {
				_ = unix.Close(fd)
			}
		}
	}()
	s.read(testObject.Size / page / 16)
	s.finish(requests)
	close(stop)
	<-stopped
}

func TestObjectTakenOverWithoutADescriptorCanBeWrittenOnceThereIsOne(t *testing.T) {
	a := blobOf("a", 16)
	p := begin(t, a)
	left := p.end()
	closeHeld(left.Objects)
	left.Objects = nil // the holder lost it
	p.open(left, a)
	f, err := os.Open(p.path(a.Key))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l := newLimit(t)
	l.lower()
	done := make(chan error, 1)
	go func() { // ends when the kernel lets it go
		_, err := f.ReadAt(make([]byte, page), 0)
		done <- err
	}()
	r := p.next()
	if err := p.e.WriteAt(a.Key, pageOf(a.Key, r.Off), r.Off); !errors.Is(err, fscache.ErrNotOpen) {
		t.Fatalf("WriteAt without a descriptor: %v, want ErrNotOpen", err)
	}
	l.raise()
	p.fill(r)
	p.answer(r, fscache.OK)
	if err := await(t, done); err != nil {
		t.Error(err)
	}
}

func TestSweepWithoutADescriptorWaits(t *testing.T) {
	s := newSweep(nil, 1, nil)
	newLimit(t).set(0)
	if err := s.ahead(); !errors.Is(err, errStarved) {
		t.Errorf("got %v, want errStarved", err)
	}
}
