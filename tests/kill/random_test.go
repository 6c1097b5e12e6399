package kill

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"holdfast/daemon"
	"holdfast/tests/load"
)

// large is the image of the random drill: several seconds of pages nobody has read.
var large = func() load.Image {
	if inVM() {
		return load.Image{Layers: 4, Files: 8, Size: 128 << 10}
	}
	return load.Image{Layers: 4, Files: 32, Size: 256 << 10}
}()

// chapter is how many kills one host goes through.
const chapter = 100

// A storm is a host whose daemon is killed at any time, under readers of an image in a layout and of one behind a slow link, while
// other mounts come and go.
type storm struct {
	*rig
	random   *rand.Rand
	remote   source // the image behind the link
	n        int    // domains there were
	fast     pair
	slow     pair
	side     chan error
	stopSide context.CancelFunc
	total    *tally
}

// A pair is a mount and its readers.
type pair struct {
	dir   string
	image source
	pause time.Duration
	*load.Readers
}

// A tally is what all chapters of a drill have together.
type tally struct {
	kills, remounts int
	reads           int64
	longest         time.Duration
}

func (t *tally) add(l *load.Readers) {
	t.reads += l.Reads()
	t.longest = max(t.longest, l.Longest())
}

func TestRandomKills(t *testing.T) {
	bin := plainBinary(t)
	o := options{bin: bin, engine: engine(t, bin), image: layout(t, large)}
	remote := slow(t, large, 5*time.Millisecond)
	kills, start, total := number(t, "HOLDFAST_KILLS", 60), time.Now(), &tally{}
	for n := 0; total.kills < kills; n++ {
		if err := stormy(o, remote, min(chapter, kills-total.kills), random(fmt.Sprint("chapter", n)), total); err != nil {
			t.Errorf("chapter %d: %v\nagain, by chance: %s", n, err, replay(t, ""))
			break
		}
	}
	took := time.Since(start)
	t.Logf("seed %d: %d kills in %v, %.0f a minute; %d reads, all compared, the longest took %v; %d remounts", seed, total.kills, took.Round(time.Second),
		float64(total.kills)/took.Minutes(), total.reads, total.longest.Round(time.Millisecond), total.remounts)
}

// stormy is one chapter.
func stormy(o options, remote source, kills int, random *rand.Rand, total *tally) error {
	r, err := newRig(o)
	if err != nil {
		return err
	}
	s := &storm{rig: r, random: random, remote: remote, total: total, side: make(chan error, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s.stopSide = cancel
	go func() { s.side <- s.sideMounts(ctx, o.image.ref) }() // ends when it is told to; rage waits
	return r.end(s.rage(kills))
}

// rage kills so many times.
func (s *storm) rage(kills int) (err error) {
	defer func() {
		s.stopSide()
		select {
		case sideErr := <-s.side:
			err = errors.Join(err, sideErr)
		case <-time.After(2 * patience()):
			err = errors.Join(err, fmt.Errorf("O3: other mounts hang for %v", 2*patience()))
		}
		for _, l := range s.loads {
			s.total.add(l)
		}
		if err == nil {
			err = s.verify()
		}
	}()
	s.fast = pair{image: s.rig.image, pause: time.Millisecond}
	s.slow = pair{image: s.remote, pause: time.Millisecond}
	for range kills {
		if err := errors.Join(s.fresh(&s.fast), s.fresh(&s.slow)); err != nil {
			return err
		}
		if err := s.aim(); err != nil {
			return err
		}
		if err := s.kill(); err != nil {
			return err
		}
		s.total.kills++
		select {
		case err := <-s.side:
			s.side <- nil
			return fmt.Errorf("other mounts: %w", err)
		default:
		}
	}
	return s.settled()
}

// aim waits for a random time: half of the kills are for daemons that serve, half for those that start.
func (s *storm) aim() error {
	span := 150 * time.Millisecond
	ready := s.random.IntN(2) == 0
	if !ready {
		span = 50 * time.Millisecond
	}
	if inVM() {
		span *= 8
	}
	if err := s.until("a daemon is there to be killed", func() bool { return s.keeper.running && (s.keeper.ready || !ready) }); err != nil {
		return err
	}
	time.Sleep(time.Duration(s.random.Int64N(int64(span)))) // the random time itself
	return s.help()
}

// fresh sees to it that a pair has pages that nobody has read: in a domain of its own the same image is all absent again.
func (s *storm) fresh(p *pair) error {
	if p.Readers != nil && p.Fresh() > 200 {
		return nil
	}
	old := *p
	s.n++
	s.rig.image = p.image
	dir, err := s.mount(fmt.Sprintf("d%d", s.n), false)
	if err != nil {
		return err
	}
	p.dir, p.Readers = dir, s.read(dir, 6, p.pause)
	if old.Readers == nil {
		return nil
	}
	s.total.remounts++
	s.total.add(old.Readers)
	err = old.Stop()
	s.forget(old.Readers)
	if err == nil {
		err = s.compare(old.dir)
	}
	return errors.Join(err, s.umount(old.dir))
}

// sideMounts mounts, reads and unmounts, until it is told to end. An attempt may fail, with the daemon killed over it, and is then
// made again.
func (s *storm) sideMounts(ctx context.Context, ref string) error {
	c := s.Client()
	defer c.Close()
	dir := filepath.Join(s.dir, "side")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	f := large.List()[0]
	want := make([]byte, f.Size)
	f.Fill(want, 0)
	for n := 0; ctx.Err() == nil; n++ {
		r := daemon.MountRequest{Image: ref, Dir: dir, Domain: fmt.Sprintf("side%d", n)}
		if err := s.within(func(ctx context.Context) error { _, err := c.Mount(ctx, r); return err }); err != nil {
			_ = s.within(func(ctx context.Context) error { return c.Umount(ctx, dir) }) // it may be mounted all the same
			time.Sleep(5 * time.Millisecond)                                            // until there may be a daemon again
			continue
		}
		got, err := os.ReadFile(filepath.Join(dir, f.Path))
		if err != nil {
			return fmt.Errorf("O2: %w", err)
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("O1: wrong bytes in %s", dir)
		}
		if err := s.unmountSide(c, dir); err != nil {
			return err
		}
	}
	return nil
}

// within bounds a call of the daemon.
func (s *storm) within(call func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience())
	defer cancel()
	return call(ctx)
}

// unmountSide unmounts, whatever it takes: the mount is there, and must go away.
func (s *storm) unmountSide(c *daemon.Client, dir string) error {
	for deadline := time.Now().Add(patience()); ; time.Sleep(5 * time.Millisecond) {
		err := s.within(func(ctx context.Context) error { return c.Umount(ctx, dir) })
		var known *daemon.Error
		if err == nil || errors.As(err, &known) && known.Status == 404 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
	}
}
