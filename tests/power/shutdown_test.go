package power

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"
)

func TestPowerIsCutFromAFileSystem(t *testing.T) {
	if inVM() {
		t.Skip("this is the test machine, where the device mapper is: see TestPowerIsCutFromADeviceThatLogs")
	}
	e := engine(t)
	for _, fs := range fileSystems() {
		t.Run(fs.name, func(t *testing.T) {
			read, kept := newSources(t)
			var sum figure
			for n := range rounds(t) {
				k, l, err := shutDown(fs, e, read, kept, n)
				if err != nil {
					t.Fatalf("cut %d, HOLDFAST_SEED=%d: %v", n, seed, err)
				}
				sum.add(read, k, l)
			}
			sum.print(t, read)
		})
	}
}

// A recorder takes marks until the power is cut.
type recorder struct {
	site *site
	at   int           // cut at this mark; 0: at markSynced
	cut  chan struct{} // closed at that

	mu   sync.Mutex
	n    int
	over bool
	known
}

var errCut = errors.New("the power was cut")

// mark takes note, or says that the power is gone.
func (r *recorder) mark(what string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.over {
		return errCut
	}
	r.Events = append(r.Events, what)
	if r.n++; r.n == r.at || r.at == 0 && what == markSynced {
		close(r.cut)
	}
	return nil
}

// stop cuts the power. What was marked by then is known.
func (r *recorder) stop() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.over = true
	r.Read = r.site.fetched()
	return cutPower(r.site.root())
}

// shutDown cuts the power once: at a random one of the marks, or a little later.
func shutDown(fs fileSystem, engine string, read, kept *source, n int) (k known, l loss, err error) {
	random := random(fmt.Sprint(fs.name, n))
	disk := ram(fs.name)
	if err := fs.newDisk(disk); err != nil {
		return k, l, err
	}
	defer os.Remove(disk)
	s, err := newSite(engine, read, kept)
	if err != nil {
		return k, l, err
	}
	device, err := loop(disk)
	if err != nil {
		return k, l, err
	}
	defer func() { err = errors.Join(err, detach(device)) }()
	if err := fs.mount(device, s.root()); err != nil {
		return k, l, err
	}
	r := &recorder{site: s, cut: make(chan struct{})}
	later := time.Duration(0)
	if n > 0 { // the first one comes at the moment from which on what is known must be there
		r.at, later = 1+random.IntN(ticks), time.Duration(random.Int64N(int64(span/ticks)))
	}
	if err := s.untilCut(r, later); err != nil {
		return k, l, errors.Join(err, unmount(s.root()))
	}
	if err := errors.Join(unmount(s.root()), fs.mount(device, s.root())); err != nil {
		return k, l, err
	}
	l, err = s.recover(r.known)
	return r.known, l, errors.Join(err, unmount(s.root()))
}

// untilCut lives up to the cut, which comes so long after the recorder says so.
func (s *site) untilCut(r *recorder, later time.Duration) (err error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	lived := make(chan error, 1)
	go func() { lived <- s.live(ctx, span, r.mark) }() // ends when a mark tells it to, or with the daemon; waited for below
	select {
	case <-r.cut:
	case err = <-lived:
		lived <- nil
		err = fmt.Errorf("the load ended before the cut: %w", err)
	}
	time.Sleep(later) // the random time itself
	if readers := s.readers.Load(); err == nil && readers != nil {
		err = readers.Err()
	}
	err = errors.Join(err, r.stop())
	if s.host == nil {
		return err
	}
	err = errors.Join(err, s.kill())
	cancel()
	<-lived // what a command says whose daemon was killed is of no interest
	return errors.Join(err, s.clear())
}
