package spare

import (
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	// size is how many numbers are held in reserve.
	size = 8
	// least is how many of them must be there for a read: one is for the kernel, the others for whatever else the process opens
	// between the moment at which they are set free and the read.
	least = 2
	// margin is how far beyond the lowest free number another must be free for numbers not to be scarce.
	margin = 16
	// fresh is for how long, and for how many reads that took one, numbers are not scarce once that was asked. A limit that is lowered, or
	// reached, is noticed that much later: as if the thread had lost its processor between question and read. Asking each time takes
	// 5 % of a miss of fanotify's, for each is two reads: one before there is an event, and one when it has come.
	fresh      = 25 * time.Microsecond
	freshReads = 4

	minPause = 5 * time.Millisecond
	maxPause = 50 * time.Millisecond
)

// A Reserve is what one reader has in reserve. One goroutine at a time uses it.
type Reserve struct {
	log    *zap.Logger
	source int   // what placeholders are copies of
	held   []int // placeholders
	lent   bool  // they were set free for a read
	lowest int   // what the kernel found to be the lowest free number a while ago

	began  time.Time
	asked  time.Duration // since began, when numbers were last found not to be scarce; negative: they were
	reads  int           // that took one since
	pause  time.Duration
	logged bool // that readers wait; until numbers are no longer scarce
}

// New makes a reserve.
func New(log *zap.Logger) (*Reserve, error) {
	fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("file descriptors in reserve: %w", err)
	}
	r := &Reserve{log: log, source: fd, began: time.Now(), asked: -1}
	r.fill()
	return r, nil
}

// Ready says, right before a read, whether it will find a number. Done must follow.
func (r *Reserve) Ready() bool {
	now := time.Since(r.began)
	if r.asked >= 0 && r.reads < freshReads && now-r.asked < fresh {
		return true
	}
	// A copy gets the lowest free number from the one asked for on, if that is below the limit (fs/file.c, f_dupfd).
	if n, ok := r.copy(r.lowest + margin); ok {
		release(n)
		r.asked, r.reads, r.pause, r.logged = now, 0, 0, false
		return true
	}
	r.asked = -1
	r.fill()
	if len(r.held) < least {
		return false
	}
	r.pause, r.lent = 0, true
	for _, n := range r.held {
		release(n)
	}
	r.held = r.held[:0]
	return true
}

// Done comes right after the read. It may have taken a number.
func (r *Reserve) Done(taken bool) {
	if taken {
		r.reads++
	}
	if r.lent {
		r.lent = false
		r.fill()
	}
}

// Lowest says that the kernel gave a read this number.
func (r *Reserve) Lowest(n int) { r.lowest = max(n, 0) }

// Pause is for how long to wait, after Ready said no, before it is asked again: twice as long each time. What this process closes need not be
// waited for so long.
func (r *Reserve) Pause() time.Duration {
	if !r.logged {
		r.logged = true
		r.log.Error("no file descriptor is left: readers wait until there is one (raise LimitNOFILE= of the service, and prlimit --nofile of the running daemon)")
	}
	r.pause = min(max(2*r.pause, minPause), maxPause)
	return r.pause
}

// fill takes what there is. A number beyond a limit that was lowered meanwhile is of no use: set free it would not be found.
func (r *Reserve) fill() {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err == nil {
		r.held = slices.DeleteFunc(r.held, func(n int) bool {
			if uint64(n) < limit.Cur {
				return false
			}
			release(n)
			return true
		})
	}
	for len(r.held) < size {
		n, ok := r.copy(0)
		if !ok {
			return
		}
		r.held = append(r.held, n)
	}
}

// copy makes a placeholder of the lowest free number that is not below from. Neither this nor release can wait, so the scheduler need
// not hear of them.
func (r *Reserve) copy(from int) (int, bool) {
	n, _, errno := unix.RawSyscall(unix.SYS_FCNTL, uintptr(r.source), unix.F_DUPFD_CLOEXEC, uintptr(from))
	return int(n), errno == 0
}

func release(n int) { _, _, _ = unix.RawSyscall(unix.SYS_CLOSE, uintptr(n), 0, 0) }

// Close gives all back. A nil reserve has nothing.
func (r *Reserve) Close() {
	if r == nil {
		return
	}
	for _, n := range r.held {
		release(n)
	}
	release(r.source)
}
