package fanotify

import (
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestReadersOfAKilledProcessGetTheirDataFromTheNext kills a process that has k events.
func TestReadersOfAKilledProcessGetTheirDataFromTheNext(t *testing.T) {
	for _, k := range []int{1, 100, 5000} {
		t.Run(fmt.Sprint(k), func(t *testing.T) {
			l := newLife(t)
			d := l.start(k)
			d.expect("ready")
			done := l.crowd(k)
			d.expect("holding")
			d.kill()
			select {
			case err := <-done:
				t.Fatalf("the readers did not wait: %v", err)
			default:
			}
			d = l.start(0)
			d.expect("ready")
			t.Logf("%d events: first answer%s", k, d.expect("answered"))
			if err := await(t, done); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestTwoProcessesDieWithTheSameEvents: the second has only records of what the first had read.
func TestTwoProcessesDieWithTheSameEvents(t *testing.T) {
	l := newLife(t)
	const k = 200
	d := l.start(k)
	d.expect("ready")
	done := l.crowd(k)
	for range 3 {
		d.expect("holding")
		d.kill()
		d = l.start(k)
		d.expect("ready")
	}
	d.expect("holding")
	d.kill()
	d = l.start(0)
	d.expect("ready")
	if err := await(t, done); err != nil {
		t.Error(err)
	}
}

// readers read pages that are holes, in turn, until stop; none may see an error or a wrong byte.
func (l *life) readers(n int, stop *atomic.Bool) (reads *atomic.Int64, wait func()) {
	l.t.Helper()
	f, err := os.Open(l.path())
	if err != nil {
		l.t.Fatal(err)
	}
	reads = new(atomic.Int64)
	var wg sync.WaitGroup
	pages := victimObject.Size / page
	for i := range int64(n) {
		wg.Go(func() { // ends with stop, once somebody answers
			for at := i; !stop.Load(); at += int64(n) {
				off := at % pages * page
				err := control(l.quiet(), func(fd int) error {
					return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, page)
				})
				if err == nil {
					err = readPage(f, off)
				}
				if err != nil {
					l.t.Error(err)
					return
				}
				reads.Add(1)
			}
		})
	}
	return reads, func() { wg.Wait(); f.Close() }
}

// TestProcessesKilledAtAnyMomentAreNotNoticed kills one after the other under load.
func TestProcessesKilledAtAnyMomentAreNotNoticed(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	l := newLife(t)
	var stop atomic.Bool
	reads, wait := l.readers(8, &stop)
	const lives = 25
	for range lives {
		d := l.start(0)
		d.expect("ready")
		time.Sleep(time.Duration(random.IntN(20_000)) * time.Microsecond) // a moment is what is tested
		d.kill()
	}
	d := l.start(0)
	d.expect("ready")
	stop.Store(true)
	wait()
	t.Logf("%d reads over %d lives", reads.Load(), lives)
	if reads.Load() < lives {
		t.Error("hardly anything was read")
	}
}
