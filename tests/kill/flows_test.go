package kill

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/daemon"
	"holdfast/tests/load"
)

// A flow is something that happens to a daemon while readers read. It goes on, for a while, until a crash point has killed, and
// leaves a daemon that serves.
type flow struct {
	name  string
	serve []string // more flags of serve
	// engine is the one whose matter the flow is; "": it is both's.
	engine string
	daemon []string // a command line that runs the daemon's
	// skip is how many kills are the flow's own.
	skip int
	// plans says how a case's plan is to be given to the daemon, and to the successor in an upgrade; nil: to the daemon as it is, and the
	// successor has the daemon's environment.
	plans func(plan string) (daemon, successor string)
	run   func(r *rig, f *flight) error
}

// A flight is a flow under way.
type flight struct {
	want int           // how many kills there are to be
	stay time.Duration // for how long to go on for them
	stop time.Time
}

// over says whether there is nothing more to wait for.
func (f *flight) over(r *rig) bool { return r.kills() >= f.want || time.Now().After(f.stop) }

// flows are all there are, cheap ones first: a point is killed at in the first that comes by it.
var flows = []flow{
	{name: "read", run: readFlow},
	{name: "slow", run: slowFlow},
	{name: "mounts", run: mountsFlow},
	{name: "remove", run: removeFlow},
	{name: "complete", serve: []string{"--read-ahead", "1MiB"}, run: completeFlow},
	{name: "stop", run: stopFlow},
	{name: "upgrade", run: upgradeFlow},
	{name: "recovery", skip: 1, plans: func(p string) (string, string) { return "," + p, "" }, run: recoveryFlow},
	{name: "refused", skip: 1, plans: func(p string) (string, string) { return p, "handover.take.before-taken:1" }, run: succeedFlow},
	{name: "widow", skip: 1, plans: func(p string) (string, string) { return "handover.give.after-go:1", p }, run: succeedFlow},
	{name: "lost", run: lostFlow},
	{name: "idle", serve: []string{"--idle-exit", "500ms"}, run: idleFlow},
	{name: "check", run: checkFlow},
	{name: "parts", engine: "fanotify", serve: []string{"--cull-mounted", "--domain-quota", "64KiB"}, run: partsFlow},
	{name: "opening", engine: "cachefiles", skip: 1, plans: func(p string) (string, string) { return "cachefiles.open.after-hold:1," + p, "" }, run: mountsFlow},
	{name: "unheld", engine: "cachefiles", skip: 1, plans: func(p string) (string, string) { return "cachefiles.open.before-hold:1," + p, "" }, run: mountsFlow},
	{name: "full", engine: "cachefiles", daemon: []string{"env", "FDSTORE=8"}, run: fullFlow},
}

// underway mounts the image and puts readers on it.
func underway(r *rig) (*load.Readers, error) {
	dir, err := r.mount("own", false)
	if err != nil {
		return nil, err
	}
	return r.read(dir, 4, 200*time.Microsecond), nil
}

// repeat does step until the flight is over, and once at least.
func repeat(r *rig, f *flight, step func() error) error {
	f.stop = time.Now().Add(f.stay)
	for {
		if err := step(); err != nil {
			return err
		}
		if f.over(r) {
			return r.settled()
		}
	}
}

func readFlow(r *rig, f *flight) error {
	l, err := underway(r)
	if err != nil {
		return err
	}
	return repeat(r, f, func() error {
		// Until all is read, by one daemon or by the next.
		return r.until("the readers read on", func() bool { return r.kills() >= f.want || l.Fresh() == 0 })
	})
}

// slowFlow has requests in flight for long enough to be recorded.
func slowFlow(r *rig, f *flight) error {
	r.image = r.slow
	l, err := underway(r)
	if err != nil {
		return err
	}
	return repeat(r, f, func() error {
		return r.until("the readers read on", func() bool { return r.kills() >= f.want || l.Reads() >= 60 })
	})
}

func mountsFlow(r *rig, f *flight) error {
	if _, err := underway(r); err != nil {
		return err
	}
	n := 0
	return repeat(r, f, func() error {
		n++
		dir, err := r.mount(fmt.Sprintf("side%d", n), false)
		if err != nil {
			return err
		}
		if _, err := os.ReadFile(filepath.Join(dir, r.image.List()[0].Path)); err != nil {
			return fmt.Errorf("O2: %w", err)
		}
		return r.umount(dir)
	})
}

// fullFlow mounts more than the supervisor holds descriptors for: what would not outlive the daemon is refused.
func fullFlow(r *rig, f *flight) error {
	if _, err := underway(r); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(r.dir, "mnt-")
	if err != nil {
		return err
	}
	return repeat(r, f, func() error {
		kills := r.kills()
		prefetch := false
		_, err := r.client.Mount(context.Background(), daemon.MountRequest{Image: r.image.ref, Dir: dir, Domain: "full", Prefetch: &prefetch})
		if err == nil && r.spared(kills) {
			return errors.New("O4: mounted, though the supervisor has no room for all its objects")
		}
		return r.settled()
	})
}

// removeFlow removes an image that was mounted in two domains and is no longer, and a leftover, however often the daemon dies over it. In the
// end nothing is left to be removed.
func removeFlow(r *rig, f *flight) error {
	return repeat(r, f, func() error {
		for _, domain := range []string{"gone1", "gone2"} {
			dir, err := r.mount(domain, false)
			if err == nil {
				err = r.umount(dir)
			}
			if err != nil {
				return err
			}
		}
		images := filepath.Join(r.Dir, "root", "images")
		entries, err := os.ReadDir(images)
		if err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Join(images, entries[0].Name()+".new-1"), 0o700); err != nil {
			return err
		}
		var last error
		err = r.until("the image is removed", func() bool {
			_, last = r.client.RemoveImages(context.Background(), r.image.ref)
			var answered *daemon.Error
			return last == nil || errors.As(last, &answered) && answered.Code == daemon.CodeNotFound
		})
		if err != nil {
			return errors.Join(err, last)
		}
		var report daemon.GCReport
		err = r.until("nothing is left to be removed", func() bool {
			report, last = r.client.GC(context.Background(), false)
			return last == nil && !slices.ContainsFunc(report.Decisions, func(x daemon.Decision) bool { return x.Remove })
		})
		if err != nil {
			return errors.Join(err, last, fmt.Errorf("%+v", report))
		}
		return nil
	})
}

// partsFlow has an image prefetched in a domain that is to be small, so that what nobody has read of it is culled, under its readers.
func partsFlow(r *rig, f *flight) error {
	n := 0
	return repeat(r, f, func() error {
		n++
		dir, err := r.mount(fmt.Sprintf("small%d", n), true)
		if err != nil {
			return err
		}
		l := r.read(dir, 2, 20*time.Millisecond) // slow enough to leave something unread
		err = r.until("parts of it are culled", func() bool {
			s, err := r.status()
			return err == nil && s.Space.Parts > 0 || r.kills() >= f.want && f.want > 0
		})
		if err != nil {
			return err
		}
		if err := l.Stop(); err != nil {
			return err
		}
		r.forget(l)
		if err := r.compare(dir); err != nil {
			return err
		}
		return r.umount(dir)
	})
}

// completeFlow has everything fetched.
func completeFlow(r *rig, f *flight) error {
	return repeat(r, f, func() error {
		dir, err := r.mount("whole", true)
		if err != nil {
			return err
		}
		err = r.until(dir+" is complete", func() bool {
			list, err := r.client.Mounts(context.Background())
			return err == nil && len(list) == 1 && list[0].Complete
		})
		if err != nil {
			return err
		}
		if err := r.compare(dir); err != nil {
			return err
		}
		return r.umount(dir)
	})
}

// stopFlow stops the daemon while readers read, and starts it again.
func stopFlow(r *rig, f *flight) error {
	if _, err := underway(r); err != nil {
		return err
	}
	return repeat(r, f, func() error {
		if err := r.keeper.update(); err != nil {
			return err
		}
		starts := r.keeper.starts
		if err := r.signal(unix.SIGTERM); err != nil {
			return err
		}
		err := r.until("the daemon was stopped and started again", func() bool { return r.keeper.starts > starts && r.keeper.ready })
		return errors.Join(err, r.settled())
	})
}

// spared reports whether nobody was killed beyond the given number of kills. Who talks to a daemon may hear of its death before the one who killed it
// has counted that.
func (r *rig) spared(kills int) bool {
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if r.kills() != kills {
			return false
		}
	}
	return true
}

func upgradeFlow(r *rig, f *flight) error {
	if _, err := underway(r); err != nil {
		return err
	}
	return repeat(r, f, func() error {
		kills := r.kills()
		has, err := r.optional(r.bin, "upgrade")
		if !has {
			f.stay, f.stop = 0, time.Time{}
			return nil
		}
		if err != nil && r.spared(kills) {
			return fmt.Errorf("upgrade without a kill: %w", err)
		}
		return r.settled()
	})
}

// succeedFlow upgrades to a successor that has a plan of its own; one of the two dies.
func succeedFlow(r *rig, f *flight) error {
	r.image = r.slow
	if _, err := underway(r); err != nil {
		return err
	}
	script, err := r.successor()
	if err != nil {
		return err
	}
	if has, _ := r.optional(r.bin, "upgrade", "--binary", script); !has { // that it fails is the point
		return nil
	}
	return repeat(r, f, r.settled)
}

// lostFlow loses what must never be lost, the keeper and the daemon at once. Nobody reads meanwhile, for there are zeros to be read, until a
// daemon has seen to it that there are none.
func lostFlow(r *rig, f *flight) error {
	dir, err := r.mount("lost", false)
	if err != nil {
		return err
	}
	if err := r.keeper.update(); err != nil {
		return err
	}
	for _, pid := range []int{r.KeeperPID(), r.keeper.pid} {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			return err
		}
	}
	if err := r.until("the daemon is gone", func() bool { return unix.Kill(r.keeper.pid, 0) != nil }); err != nil {
		return err
	}
	if err := errors.Join(r.start(), r.settled()); err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(dir, r.image.List()[0].Path))
	if err == nil && bytes.Count(b, []byte{0}) > len(b)/2 {
		return errors.New("O1: a mount whose lifeline was lost is read as zeros")
	}
	return nil
}

// recoveryFlow kills the daemon itself, with requests in flight; the plan's points are for its successor.
func recoveryFlow(r *rig, f *flight) error {
	r.image = r.slow
	l, err := underway(r)
	if err != nil {
		return err
	}
	if err := r.until("readers wait", func() bool { return l.Reads() > 5 && l.Waiting(5*time.Millisecond) == 4 }); err != nil {
		return err
	}
	if _, err := r.seen(); err != nil {
		return err
	}
	if err := os.WriteFile(r.killMark(0), nil, 0o600); err != nil {
		return err
	}
	if err := r.kill(); err != nil {
		return err
	}
	return repeat(r, f, r.settled)
}

// kill kills the daemon and returns when the keeper has seen it.
func (r *rig) kill() error {
	if err := r.until("a daemon runs", func() bool { return r.keeper.running }); err != nil {
		return err
	}
	starts := r.keeper.starts
	if err := unix.Kill(r.keeper.pid, unix.SIGKILL); err != nil {
		return fmt.Errorf("kill the daemon: %w", err)
	}
	return r.until("the keeper starts another daemon", func() bool { return r.keeper.starts > starts })
}

// idleFlow leaves the daemon alone until it has left, and then misses something.
func idleFlow(r *rig, f *flight) error {
	n := 0
	return repeat(r, f, func() error {
		n++
		dir, err := r.mount(fmt.Sprintf("idle%d", n), false)
		if err != nil {
			return err
		}
		idles := r.keeper.idles
		err = r.until("the daemon leaves", func() bool { return r.keeper.idles > idles || r.kills() >= f.want && f.want > 0 })
		if err != nil {
			return err
		}
		if err := r.compare(dir); err != nil {
			return err
		}
		return r.umount(dir)
	})
}

func checkFlow(r *rig, f *flight) error {
	if _, err := underway(r); err != nil {
		return err
	}
	return r.settled()
}
