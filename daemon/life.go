package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"

	"holdfast/state/crash"
)

// Run takes up the mounts on record, then serves the kernel and the API until ctx ends, the engine fails, a successor has taken over,
// or there is nothing to do and IdleExit says so. It then reads no more requests, answers those it has, and closes the engine and the
// state. Mounts stay mounted, and requests that were not answered within the stop timeout stay pending for the next process.
func (d *Daemon) Run(ctx context.Context) error {
	l := d.opt.Listener
	if l == nil {
		var err error
		if l, err = Listen(ctx, d.opt.Socket); err != nil {
			return errors.Join(err, d.close())
		}
	}
	d.tune()
	if err := d.restore(ctx); err != nil {
		l.Close()
		return errors.Join(err, d.close())
	}
	if d.opt.Session != nil {
		if err := keepRecord(d.recorder, d.opt.Session, d.opt.Boxes); err != nil {
			l.Close()
			return errors.Join(err, d.close())
		}
	}
	d.begin()
	d.remount(ctx)
	d.background.Go(func() { d.tidy(d.base) }) // ends with base
	return d.serveUntil(ctx, l)
}

// begin reads the kernel's requests from here on.
func (d *Daemon) begin() {
	crash.Point("daemon.begin.before-pump")
	d.pump.start()
	if d.opt.Session != nil {
		d.recorder.start()
	}
	crash.Point("daemon.begin.after-pump")
}

// serveUntil serves the API too, until something ends that, and then ends everything.
func (d *Daemon) serveUntil(ctx context.Context, l net.Listener) (err error) {
	d.shelf.clear()
	d.sweepLater()
	ticks, done := context.WithCancel(ctx)
	d.succession.quiet = done
	api := d.serveAPI(l)
	d.log.Info("serving", zap.String("engine", d.engine.Name()), zap.String("socket", d.opt.Socket), zap.Int("mounts", len(d.mounts.list())))
	if d.opt.Ready != nil {
		d.opt.Ready()
	}
	d.ticking.Go(func() { d.watchdog(ticks) })
	if d.opt.ScrubRate > 0 {
		d.ticking.Go(func() { d.scrub(ticks) })
	}
	d.ticking.Go(func() { d.keepRoom(ticks) })
	select {
	case <-ctx.Done():
		d.askForTime()
	case err = <-d.pump.failed:
		err = fmt.Errorf("daemon: read requests of the kernel: %w", err)
	case err = <-api.failed:
		err = fmt.Errorf("daemon: serve the API: %w", err)
	case <-d.idle(ticks):
		d.wentIdle = true
		d.log.Info("idle: ending until the kernel or a client asks for something", zap.Duration("after", d.opt.IdleExit))
	case <-d.succession.done:
		err = d.succession.err
	}
	done()
	d.ticking.Wait()
	d.succession.stop()
	api.shutdown()
	return errors.Join(err, d.close())
}

// Idle reports, after Run, that it ended because there was nothing to do, and that whoever asks next is heard without it.
func (d *Daemon) Idle() bool { return d.wentIdle }

// closeGrace is what ending may take besides the requests in flight: answers of the API, and whoever syncs a database.
const closeGrace = 20 * time.Second

// askForTime has the supervisor wait for an end that takes its time. What it grants who does not ask is how long it waits for the remains of a daemon
// that died, too, and that may be in vain: a process that makes a mount ends when the next daemon serves.
func (d *Daemon) askForTime() {
	if d.opt.Supervisor == nil {
		return
	}
	if err := d.opt.Supervisor.Notify(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", (d.opt.StopTimeout + closeGrace).Microseconds())); err != nil {
		d.log.Warn("ask the supervisor for time to end", zap.Error(err))
	}
}

// Unused reports, after Run, that for certain nothing is mounted that needs the engine's lifeline: state that was found damaged may
// have named more mounts than are known, and a successor may mount more.
func (d *Daemon) Unused() bool {
	return d.mounts.empty() && len(d.damaged) == 0 && !d.succession.over.Load()
}

// close ends everything, in this order: what lingers and need not, no new requests, the requests in flight (those still there at the stop
// timeout are left to the next process), what runs for no reader, the records, the engine, the state.
func (d *Daemon) close() error {
	if d.state != nil && !d.succession.over.Load() {
		d.sweep()
	}
	err := d.pump.stop(d.opt.StopTimeout, func() {
		d.log.Warn("requests in flight at the stop timeout are left to the next process", zap.Duration("timeout", d.opt.StopTimeout))
		d.stop(errStopping)
	})
	d.stop(errStopping)
	err = errors.Join(err, d.mounts.close())
	d.background.Wait()
	err = errors.Join(err, d.closeState(), d.engine.Close())
	if d.opt.Inbox != nil {
		err = errors.Join(err, d.opt.Inbox.Close()) // stays, if a request is left
	}
	return err
}

// closeState ends the recording and closes the databases. It may come twice: a successor needs them before this process ends.
func (d *Daemon) closeState() (err error) {
	d.closing.Do(func() {
		d.recorder.stop()
		if d.opt.Session != nil {
			err = d.opt.Session.Close()
		}
		if d.state != nil {
			err = errors.Join(err, d.state.Close())
		}
	})
	return err
}

// used notes that the kernel or a client asked for something.
func (d *Daemon) used(t *turn) {
	if t != nil {
		d.lastUsed.Store(int64(t.since.Sub(d.began)))
	}
	d.recorder.kick()
}

// idle returns a channel that is closed when the daemon has nothing to do and whoever asks next will be heard without it. Reading is
// frozen then. Its goroutine ends with ctx.
func (d *Daemon) idle(ctx context.Context) <-chan struct{} {
	if d.opt.IdleExit <= 0 {
		return nil
	}
	done := make(chan struct{})
	d.ticking.Go(func() {
		tick := time.NewTicker(max(d.opt.IdleExit/4, time.Millisecond))
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
			if !d.needless() {
				continue
			}
			crash.Point("daemon.idle.before-freeze")
			if d.quiesce() {
				close(done)
				return
			}
		}
	})
	return done
}

// quiesce stops reading, unless something came at the last moment.
func (d *Daemon) quiesce() bool {
	if d.exclude() != nil {
		return false
	}
	err := d.pump.freeze()
	if err == nil && len(d.engine.Pending()) == 0 && d.calls.Load() == 0 {
		return true
	}
	if err = errors.Join(err, d.pump.thaw()); err != nil {
		d.log.Error("end for idleness", zap.Error(err))
	}
	d.succession.under.Store(false)
	return false
}

// needless reports whether nothing is being done, nothing was asked for within IdleExit, and what is asked for next needs no daemon
// (every object is complete and left to the kernel) or brings one (the supervisor watches what it holds).
func (d *Daemon) needless() bool {
	if time.Since(d.began)-time.Duration(d.lastUsed.Load()) < d.opt.IdleExit || d.succession.under.Load() {
		return false
	}
	if n, _ := d.pump.pending(); n > 0 || d.calls.Load() > 0 {
		return false
	}
	for _, m := range d.mounts.list() {
		if m.prefetch.running.Load() > 0 {
			return false
		}
	}
	name, _ := d.engine.Lifeline()
	wakes := d.opt.Supervisor != nil && d.opt.Supervisor.Wakes(name)
	for _, o := range d.objects.all() {
		if o.busyOrAsked(wakes) {
			return false
		}
	}
	return true
}

// watchdog tells the supervisor that the daemon lives, as often as it wants to hear it, until ctx ends.
func (d *Daemon) watchdog(ctx context.Context) {
	if d.opt.Watchdog <= 0 || d.opt.Supervisor == nil {
		return
	}
	tick := time.NewTicker(d.opt.Watchdog)
	defer tick.Stop()
	for {
		if err := d.opt.Supervisor.Notify("WATCHDOG=1"); err != nil {
			d.log.Warn("tell the supervisor that the daemon lives", zap.Error(err))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// Listen makes the API's socket, which only its owner may use.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("daemon: make the socket's directory: %w", err)
	}
	if c, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("daemon: another daemon answers on %s: stop it, or use another --run or --socket", path)
	}
	// Nobody answers: what is there, if it is a socket, is a dead daemon's.
	if fi, err := os.Lstat(path); err == nil {
		if fi.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("daemon: %s exists and is no socket: move it away, or use another --socket", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("daemon: remove the stale socket: %w", err)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("daemon: listen: %w", err)
	}
	// Between bind and chmod the directory's mode guards it, where the daemon made the directory; a peer that got in
	// before is in the backlog only if the umask let it.
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("daemon: restrict the socket: %w", err)
	}
	return l, nil
}
