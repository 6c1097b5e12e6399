package power

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/tests/host"
	"holdfast/tests/load"
)

// A site is a host whose root directory is on the disk that loses power, with the images it mounts.
type site struct {
	dir    string // root is the mount point of the disk, run is memory
	engine string
	read   *source
	kept   *source
	boots  bool // the kernel is booted in earnest
	host   *host.Host
	pid    int // the daemon's

	readers atomic.Pointer[load.Readers]
	base    atomic.Int64 // what the registry had served of the image to read when it was mounted
}

// boots is how many boots this process has simulated.
var boots int

func newSite(engine string, read, kept *source) (*site, error) {
	dir, err := os.MkdirTemp(scratch, "site-")
	if err != nil {
		return nil, err
	}
	s := &site{dir: dir, engine: engine, read: read, kept: kept}
	return s, s.prepare()
}

// prepare makes the directories.
func (s *site) prepare() (err error) {
	for _, sub := range []string{s.root(), s.mnt(s.read), s.mnt(s.kept)} {
		err = errors.Join(err, os.MkdirAll(sub, 0o700))
	}
	return err
}

func (s *site) root() string          { return filepath.Join(s.dir, "root") }
func (s *site) mnt(of *source) string { return filepath.Join(s.dir, "mnt-"+of.Name) }

// boot starts a keeper and a daemon in another boot than the ones before.
func (s *site) boot() error {
	bin, err := holdfast()
	if err != nil {
		return err
	}
	if !s.boots {
		boots++
		err = newBoot(boots)
	}
	if err := errors.Join(err, os.RemoveAll(filepath.Join(s.dir, "run"))); err != nil {
		return err
	}
	if s.host, err = host.Start(bin, s.dir, "--engine", s.engine, "--read-ahead", "16KiB", "--prefetch", "off"); err != nil {
		return err
	}
	status, err := s.host.Status()
	s.pid = status.PID
	return err
}

func (s *site) mount(ctx context.Context, of *source) error {
	return s.command(ctx, "mount", "--prefetch=off", of.ref, s.mnt(of))
}

// command runs a holdfast command, which ends with ctx: by itself it may wait for the daemon to come back.
func (s *site) command(ctx context.Context, args ...string) error {
	bin, err := holdfast()
	if err != nil {
		return err
	}
	args = append([]string{"--root", s.root(), "--run", filepath.Join(s.dir, "run")}, args...)
	if out, err := exec.CommandContext(ctx, bin, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("holdfast %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// ticks is how many marks there are of nothing but the time, after markSynced.
const ticks = 20

// What a mark says.
const (
	markStarted = "started" // a daemon serves
	markKept    = "mounted-kept"
	markRead    = "mounted-read"
	markSynced  = "synced" // prefetch --wait has returned
	markTick    = "tick"
	markEnd     = "end"
)

// live is what happens up to the cut, and as long after the mounts as span. Before anything that follows a step is begun, mark is told of the step.
func (s *site) live(ctx context.Context, span time.Duration, mark func(what string) error) error {
	if err := s.boot(); err != nil {
		return err
	}
	if err := mark(markStarted); err != nil {
		return err
	}
	for _, step := range []struct {
		of   *source
		mark string
	}{{s.kept, markKept}, {s.read, markRead}} {
		if err := s.mount(ctx, step.of); err != nil {
			return err
		}
		s.base.Store(s.read.served.Load())
		if err := mark(step.mark); err != nil {
			return err
		}
	}
	s.readers.Store(load.Start(load.Config{Dir: s.mnt(s.read), Image: s.read.Image, Readers: 2, Seed: seed, Pause: span / 256, Bound: patience}))
	if err := s.command(ctx, "prefetch", "--wait", s.mnt(s.kept)); err != nil {
		return err
	}
	if err := mark(markSynced); err != nil {
		return err
	}
	for n := range ticks {
		time.Sleep(span / ticks) // the load itself
		if n == ticks/3 {        // as somebody's sync(1) does, or memory getting short
			if err := s.sync(); err != nil {
				return err
			}
		}
		if err := mark(markTick); err != nil {
			return err
		}
	}
	return mark(markEnd)
}

// sync writes back what is in memory of the disk.
func (s *site) sync() error {
	f, err := os.Open(s.root())
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

// kill kills keeper and daemon.
func (s *site) kill() error {
	err := s.host.KillKeeper()
	if e := unix.Kill(s.pid, unix.SIGKILL); e != nil && !errors.Is(e, unix.ESRCH) {
		err = errors.Join(err, e)
	}
	return errors.Join(err, until("the daemon is gone", func() error {
		if unix.Kill(s.pid, 0) == nil {
			return fmt.Errorf("process %d is there", s.pid)
		}
		return nil
	}))
}

// clear takes the mounts away. What readers saw with nobody there any more is nobody's fault.
func (s *site) clear() (err error) {
	if readers := s.readers.Load(); readers != nil {
		_ = readers.Stop()
	}
	for _, m := range s.host.Mounts() {
		err = errors.Join(err, unix.Unmount(m, unix.MNT_DETACH))
	}
	return err
}

// fetched is how many bytes of the image to read the registry has served since it was mounted.
func (s *site) fetched() int64 { return s.read.served.Load() - s.base.Load() }

// known is what had happened when the power was cut.
type known struct {
	Events []string
	Read   int64 // bytes of the image to read that had been fetched
}

func (k known) has(event string) bool { return slices.Contains(k.Events, event) }

// marked is what a mark stands for where it is written down: the event, and what had been fetched.
func (s *site) marked(what string) string { return fmt.Sprintf("%s=%d", what, s.fetched()) }

// add takes note of what marked returned.
func (k *known) add(mark string) error {
	what, bytes, _ := strings.Cut(mark, "=")
	read, err := strconv.ParseInt(bytes, 10, 64)
	if err != nil {
		return fmt.Errorf("mark %q: %w", mark, err)
	}
	k.Events, k.Read = append(k.Events, what), read
	return nil
}

// A loss is what a cut cost.
type loss struct {
	Before, Again int64 // bytes of the image that is read: fetched by the cut, and of the whole fetched afterwards
}

// recover starts a daemon on what the power left, and holds it to the rules.
func (s *site) recover(k known) (l loss, err error) {
	read, kept := s.read.served.Load(), s.kept.served.Load()
	if err := s.boot(); err != nil {
		return l, fmt.Errorf("P3: %w", err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w\nthe daemon's log:\n%s", err, s.host.Log())
		}
		err = errors.Join(err, s.host.Stop())
	}()
	mounts := s.host.Mounts()
	for event, of := range map[string]*source{markKept: s.kept, markRead: s.read} {
		switch {
		case slices.Contains(mounts, s.mnt(of)):
		case k.has(event):
			return l, fmt.Errorf("P3: %s was mounted before the cut, and is not mounted again", of.Name)
		default:
			if err := s.mount(context.Background(), of); err != nil {
				return l, err
			}
			if of == s.read {
				read = s.read.served.Load() // its metadata was fetched now
			}
		}
	}
	for _, of := range []*source{s.read, s.kept} {
		if err := of.Compare(s.mnt(of)); err != nil {
			return l, fmt.Errorf("P1: %w", err)
		}
	}
	if damaged, err := filepath.Glob(filepath.Join(s.root(), "*damaged*")); err != nil || len(damaged) > 0 {
		return l, fmt.Errorf("P3: %s was set aside: %w", strings.Join(damaged, ", "), err)
	}
	l = loss{Before: k.Read, Again: s.read.served.Load() - read}
	if again := s.kept.served.Load() - kept; k.has(markSynced) && again > 0 {
		return l, fmt.Errorf("P2: of %d bytes that had been prefetched before the cut, %d were fetched again", s.kept.size(), again)
	}
	return l, nil
}
