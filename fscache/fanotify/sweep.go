package fanotify

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/state/crash"
)

// sweepAhead is how many numbers beyond the lowest free one are swept before the first event is read.
const sweepAhead = 1024

// A sweep denies, with EIO, every event a dead process read from the group and did not answer, but for those that are known. The others'
// numbers are not, so every number they can have is tried; one that no event has is ENOENT and does nothing.
//
// It takes as long as there are numbers times unanswered events (the kernel walks their list for each), so it runs beside what is done
// meanwhile. But for a number that was not swept no event of ours is handed out: it could be an older one's, which the kernel would answer first.
type sweep struct {
	group   *os.File
	numbers int32          // to try
	except  map[int32]bool // known

	mu    sync.Mutex
	moved sync.Cond // next or over changed
	next  int32     // guarded by mu: all below were tried
	err   error     // guarded by mu: it ended before its end
	over  atomic.Bool
	stop  atomic.Bool
}

func newSweep(group *os.File, numbers int, orphans map[int32]*orphan) *sweep {
	s := &sweep{group: group, numbers: int32(numbers), except: make(map[int32]bool, len(orphans))}
	s.moved.L = &s.mu
	for n := range maps.Keys(orphans) {
		s.except[n] = true
	}
	return s
}

// run is the sweep; it returns how many readers were let go.
func (s *sweep) run() (denied int) {
	const step = 64
	for n := int32(0); n < s.numbers && !s.stop.Load(); {
		for end := min(n+step, s.numbers); n < end; n++ {
			if s.except[n] {
				continue
			}
			more, err := s.deny(n)
			denied += more
			if err != nil {
				s.reach(n, err)
				return denied
			}
		}
		s.reach(n, nil)
	}
	if s.stop.Load() {
		s.reach(0, fscache.ErrClosed)
		return denied
	}
	s.reach(s.numbers, nil)
	return denied
}

// deny denies all events of one number.
func (s *sweep) deny(n int32) (denied int, err error) {
	b := encodeResponse(n, response(fscache.EIO))
	for {
		switch _, err := s.group.Write(b[:]); {
		case err == nil:
			denied++
		case errors.Is(err, unix.ENOENT):
			return denied, nil
		default:
			return denied, fmt.Errorf("denying leftover event %d: %w", n, err)
		}
	}
}

func (s *sweep) reach(n int32, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next, s.err = n, err
	if err == nil && n == s.numbers {
		s.over.Store(true)
	}
	s.moved.Broadcast()
}

// pass waits until number n was tried.
func (s *sweep) pass(n int32) error {
	if s == nil || s.over.Load() {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.next <= n && s.next < s.numbers && s.err == nil {
		s.moved.Wait()
	}
	return s.err
}

// end waits until it is over, or stops it.
func (s *sweep) end(stop bool) error {
	if s == nil {
		return nil
	}
	if stop {
		s.stop.Store(true)
	}
	return s.pass(s.numbers - 1)
}

// ahead waits until the next events will get numbers that were tried.
func (s *sweep) ahead() error {
	if s == nil || s.over.Load() {
		return nil
	}
	fd, err := placeholder()
	if errors.Is(err, unix.EMFILE) {
		return errStarved
	}
	if err != nil {
		return err
	}
	return errors.Join(unix.Close(fd), s.pass(int32(min(fd+sweepAhead, int(s.numbers)-1))))
}

// clean starts the sweep of what nobody can identify.
func (e *Engine) clean(numbers int) {
	e.sweep = newSweep(e.group, numbers, e.orphans)
	marks, replayed, start := len(e.watched), len(e.orphans), time.Now()
	// Ends by itself or with Close, which waits for it.
	e.background.Go(func() {
		crash.Point("fanotify.open.before-sweep")
		denied := e.sweep.run()
		crash.Point("fanotify.open.after-sweep")
		e.log.Info("took a group over", zap.Int("marks", marks), zap.Int("replayed", replayed), zap.Int("denied", denied),
			zap.Duration("took", time.Since(start)))
	})
}
