package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/rafs/blob"
	"holdfast/state"
)

// A Daemon serves one engine. Make it with New, then call Run once.
type Daemon struct {
	opt     Options
	log     *zap.Logger
	engine  fscache.Engine
	state   *state.DB
	boot    string // id of this boot
	started time.Time
	damaged []string // what state.Open set aside, and what restore had to drop

	*filler
	objects *objects
	sources *sourceTable
	mounts  *mounts
	pump    *pump
	saving  sync.Mutex // one image is saved at a time: two may be the same

	mountPoints func() (map[string]string, error) // what is mounted; replaced where a test's engine mounts nothing

	base context.Context // parent of all work for the kernel; ends with errStopping
	stop context.CancelCauseFunc
}

// New opens the state and makes a daemon of it. Nothing of the engine is used before Run. After an error the caller
// still owns the engine.
func New(o Options) (*Daemon, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	boot, err := state.BootID()
	if err != nil {
		return nil, fmt.Errorf("daemon: %w", err)
	}
	decoder, err := blob.NewDecoder()
	if err != nil {
		return nil, fmt.Errorf("daemon: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(o.Root, imagesDir), 0o700); err != nil {
		return nil, fmt.Errorf("daemon: make root: %w", err)
	}
	db, damaged, err := state.Open(filepath.Join(o.Root, "state.db"), o.Release)
	if err != nil {
		return nil, err
	}
	for _, what := range damaged {
		o.Log.Error("state was damaged", zap.String("what", what))
	}
	d := &Daemon{
		opt: o, log: o.Log, engine: o.Engine, state: db, boot: boot, started: time.Now(), damaged: damaged,
		filler: &filler{
			engine: o.Engine, decoder: decoder, log: o.Log,
			ahead: uint64(o.ReadAhead), deadline: o.ReadDeadline, began: time.Now(),
		},
		mountPoints: mountPoints,
		objects:     newObjects(), sources: &sourceTable{byName: map[string]*sourceStats{}}, mounts: newMounts(),
	}
	d.base, d.stop = context.WithCancelCause(context.Background())
	d.pump = newPump(o.Engine, d.serve)
	return d, nil
}

// Run takes up the mounts on record, then serves the kernel and the API until ctx ends or the engine fails. It then reads
// no more requests, answers those it has (with EIO after the stop timeout) and closes the engine and the state. Mounts
// stay mounted.
func (d *Daemon) Run(ctx context.Context) error {
	l, err := listen(ctx, d.opt.Socket)
	if err != nil {
		return errors.Join(err, d.close())
	}
	d.tune()
	if err := d.restore(ctx); err != nil {
		l.Close()
		return errors.Join(err, d.close())
	}
	d.pump.start()
	api := d.serveAPI(l)
	d.log.Info("serving", zap.String("engine", d.engine.Name()), zap.String("socket", d.opt.Socket), zap.Int("mounts", len(d.mounts.list())))
	if d.opt.Ready != nil {
		d.opt.Ready()
	}
	select {
	case <-ctx.Done():
	case err = <-d.pump.failed:
		err = fmt.Errorf("daemon: read requests of the kernel: %w", err)
	case err = <-api.failed:
		err = fmt.Errorf("daemon: serve the API: %w", err)
	}
	api.shutdown()
	return errors.Join(err, d.close())
}

// Unused reports, after Run, that for certain nothing is mounted that needs the engine's lifeline: state that was found damaged may
// have named more mounts than are known.
func (d *Daemon) Unused() bool { return d.mounts.empty() && len(d.damaged) == 0 }

// close ends everything, in this order: what lingers and need not, no new requests, the requests in flight (EIO for those still there at the stop
// timeout), what runs for no reader, the engine, the state.
func (d *Daemon) close() error {
	d.sweep()
	err := d.pump.stop(d.opt.StopTimeout, func() {
		d.log.Warn("requests in flight at the stop timeout get EIO", zap.Duration("timeout", d.opt.StopTimeout))
		d.stop(errStopping)
	})
	d.stop(errStopping)
	err = errors.Join(err, d.mounts.close())
	d.background.Wait()
	return errors.Join(err, d.engine.Close(), d.state.Close())
}

// serve answers one request of the kernel.
func (d *Daemon) serve(r fscache.Request, t *turn) {
	o := d.objects.get(r.Object)
	switch {
	case o == nil && r.Op != fscache.OpClose:
		d.log.Error("request for an object of no mounted image", zap.Stringer("op", r.Op), zap.Stringer("object", r.Object), zap.Uint64("request", r.ID))
		d.answer(r, fscache.EIO)
	case r.Op == fscache.OpRead:
		o.once.Do(func() { close(o.asked) })
		d.read(o, r, t)
	case r.Op == fscache.OpOpen:
		d.opened(o, r)
	case r.Op == fscache.OpClose:
		d.answer(r, fscache.OK)
	default:
		d.log.Error("unknown request", zap.Stringer("op", r.Op), zap.Stringer("object", r.Object), zap.Uint64("request", r.ID))
		d.answer(r, fscache.EIO)
	}
}

// read answers a request for missing bytes. One for nothing inside the object is OK as it is: no reader gets a byte of it.
func (d *Daemon) read(o *object, r fscache.Request, t *turn) {
	if r.Off < 0 || r.Len < 0 {
		d.answer(r, fscache.EIO)
		return
	}
	want := o.span(r.Off, r.Len)
	if e, ok := o.denials.again(r, time.Now()); ok && !o.has(want) {
		d.answer(r, e)
		return
	}
	err := d.fill(d.base, o, want, reader{turn: t, ready: func() {
		d.answer(r, fscache.OK)
		n := max(0, min(r.Len, o.size()-r.Off))
		o.served.Add(n)
		d.count.served.Add(n)
	}})
	if err != nil {
		d.count.refused.Add(1)
		o.denials.note(r, errno(err), time.Now())
		d.answer(r, errno(err))
		d.log.Error("reader gets an error", zap.Stringer("object", r.Object), zap.Int64("offset", r.Off), zap.Int64("length", r.Len),
			zap.Uint64("request", r.ID), zap.Error(err))
	}
}

// opened answers that an object exists. The kernel may have put another file behind it (it was culled, or lost with the
// power), so what was present is asked for again, once the file is there to ask about.
func (d *Daemon) opened(o *object, r fscache.Request) {
	epoch := o.reset()
	d.answer(r, fscache.OK)
	extents, err := d.engine.Present(o.key)
	if err != nil {
		d.log.Debug("presence is not known after an open", zap.Stringer("object", o.key), zap.Error(err))
		return // nothing present is always safe: it is fetched again
	}
	d.adopt(o, epoch, o.covered(extents))
}

// answer ends a request.
func (d *Daemon) answer(r fscache.Request, e fscache.Errno) {
	switch err := d.engine.Answer(r, e); {
	case err == nil:
	case errors.Is(err, fscache.ErrGone):
		d.log.Debug("reader is gone", zap.Stringer("object", r.Object), zap.Uint64("request", r.ID))
	default:
		d.log.Error("answer the kernel", zap.Stringer("op", r.Op), zap.Stringer("object", r.Object), zap.Uint64("request", r.ID), zap.Error(err))
	}
}

// Garbage is collected early, and earlier still near memoryFloor: a daemon that holds little between requests should
// not look large because of what they left. Chunk tables come on top, for no collection makes them smaller.
const (
	gcPercent   = 50
	memoryFloor = 72 << 20
)

var tuneOnce sync.Once

// tune bounds the process's memory, unless its environment does (GOMEMLIMIT).
func (d *Daemon) tune() {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	tuneOnce.Do(func() { debug.SetGCPercent(gcPercent) })
	tables := int64(0)
	for _, o := range d.objects.all() {
		tables += int64(o.table.Len()) * 64
	}
	debug.SetMemoryLimit(memoryFloor + tables*5/4)
}

// listen makes the API's socket, which only its owner may use.
func listen(ctx context.Context, path string) (net.Listener, error) {
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
