package fanotify

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// placeholder opens what is put onto numbers that no event of ours may get.
func placeholder() (int, error) {
	fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("opening a placeholder: %w", err)
	}
	return fd, nil
}

// occupy puts a placeholder onto each of the numbers that is free, and returns which those were. What is in use now is left alone;
// see orphan.behind. F_DUPFD takes the lowest free number from the one asked for on: it never replaces anything.
func occupy(numbers []int32) (map[int32]bool, error) {
	if len(numbers) == 0 {
		return nil, nil
	}
	null, err := placeholder()
	if err != nil {
		return nil, err
	}
	placed := make(map[int32]bool, len(numbers))
	if slices.Contains(numbers, int32(null)) {
		placed[int32(null)] = true
	} else {
		defer unix.Close(null)
	}
	for _, n := range numbers {
		if n == int32(null) {
			continue
		}
		got, err := unix.FcntlInt(uintptr(null), unix.F_DUPFD_CLOEXEC, int(n))
		switch {
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EMFILE):
			// Beyond RLIMIT_NOFILE, or everything from n up to it is in use: no event can get it.
		case err != nil:
			vacate(placed)
			return nil, fmt.Errorf("occupying number %d: %w", n, err)
		case got != int(n):
			_ = unix.Close(got)
		default:
			placed[n] = true
		}
	}
	return placed, nil
}

// vacate gives numbers back that have placeholders, a run of them with each call: there may be thousands.
func vacate(placed map[int32]bool) {
	numbers := slices.Sorted(maps.Keys(placed))
	for len(numbers) > 0 {
		n := 1
		for n < len(numbers) && numbers[n] == numbers[0]+int32(n) {
			n++
		}
		_ = unix.CloseRange(uint(numbers[0]), uint(numbers[n-1]), 0) // fails for no descriptor that is open
		numbers = numbers[n:]
	}
}

// A Reservation keeps a process clear of low descriptor numbers until its engine knows which of them its predecessor has events under.
type Reservation struct {
	mu    sync.Mutex
	taken map[int32]bool // placeholders that are ours
}

// Reserve puts placeholders onto all free numbers below the given one: whatever is opened from here on gets a higher number. The
// process must be allowed some descriptors more than that (RLIMIT_NOFILE).
func Reserve(below int) (*Reservation, error) {
	null, err := placeholder()
	if err != nil {
		return nil, err
	}
	r := &Reservation{taken: make(map[int32]bool)}
	if null >= below {
		return r, unix.Close(null)
	}
	r.taken[int32(null)] = true
	for {
		fd, err := unix.FcntlInt(uintptr(null), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			r.Release()
			return nil, fmt.Errorf("reserving descriptors below %d: %w (raise RLIMIT_NOFILE)", below, err)
		}
		if fd >= below {
			return r, unix.Close(fd)
		}
		r.taken[int32(fd)] = true
	}
}

// keeps says whether the number is reserved.
func (r *Reservation) keeps(n int32) bool {
	if r == nil {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.taken[n]
}

// give hands a number's placeholder to the caller, if the number is reserved.
func (r *Reservation) give(n int32) bool {
	if r == nil {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	kept := r.taken[n]
	delete(r.taken, n)
	return kept
}

// Release gives back what is still reserved. Idempotent.
func (r *Reservation) Release() {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	vacate(r.taken)
	clear(r.taken)
}

// inUse says whether the process has a descriptor of that number.
func inUse(n int32) bool {
	_, err := unix.FcntlInt(uintptr(n), unix.F_GETFD, 0)
	return err == nil
}
