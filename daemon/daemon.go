package daemon

import (
	"context"
	"errors"
	"fmt"

	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/rafs/blob"
	"holdfast/rafs/source"
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
	objects  *objects
	sources  *sourceTable
	mounts   *mounts
	shelf    shelf
	scrubber scrubber
	pump     *pump
	recorder *recorder
	culling  sync.Mutex  // held while an object is culled
	begun    atomic.Bool // a culling was begun and is not over
	cramped  atomic.Bool // there is little room, and that was logged
	saving   sync.Mutex  // over what is done to the directories of saved images, until that is on record

	succession succession
	lastUsed   atomic.Int64                   // when the kernel or a client last asked for something, in nanoseconds since began
	lost       []string                       // what of the mounts on record could not be kept, for the status
	ticking    sync.WaitGroup                 // what is done from time to time while the API is served
	calls      atomic.Int64                   // requests of the API under way
	wentIdle   bool                           // Run ended for idleness
	closing    sync.Once                      // of the databases
	sweeping   atomic.Bool                    // somebody sweeps what lingers
	changing   sync.RWMutex                   // held for reading while something is mounted or unmounted
	earlier    []state.Mount                  // on record of an earlier boot, between restore and remount
	given      map[fscache.Key]presenceRecord // what a predecessor says is present; nil: settle finds out

	// What tests replace.
	mountPoints func() (map[string]string, error)                    // what is mounted
	start       func(context.Context, UpgradeRequest) (start, error) // a successor
	source      func(*mount, source.Source) source.Source            // what a mount's source is used through

	base context.Context // parent of all work for the kernel; ends with errStopping
	stop context.CancelCauseFunc
}

// New opens the state and makes a daemon of it. Nothing of the engine is used before Run. After an error the caller
// still owns the engine.
func New(o Options) (*Daemon, error) {
	d, err := newDaemon(o)
	if err != nil {
		return nil, err
	}
	if err := d.openState(); err != nil {
		return nil, err
	}
	return d, nil
}

// newDaemon makes a daemon that has no state yet.
func newDaemon(o Options) (*Daemon, error) {
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
	d := &Daemon{
		opt: o, log: o.Log, engine: o.Engine, boot: boot, started: time.Now(), damaged: o.Damaged,
		filler: &filler{
			engine: o.Engine, decoder: decoder, log: o.Log, index: newIndex(),
			ahead: uint64(o.ReadAhead), deadline: o.ReadDeadline, began: time.Now(),
			room: newRoom(o.Engine, o.Limits, o.DomainQuota, o.Log), spaceDeadline: o.SpaceDeadline, cullsParts: o.CullMounted,
		},
		mountPoints: mountPoints, source: func(_ *mount, s source.Source) source.Source { return s },
		objects: newObjects(), sources: &sourceTable{byName: map[string]*sourceStats{}}, mounts: newMounts(),
		shelf: shelf{load: map[string]func() (loaded, error){}},
	}
	d.begun.Store(true) // as far as anybody knows: another process may have
	d.base, d.stop = context.WithCancelCause(context.Background())
	d.pump = newPump(o.Engine, d.serve)
	d.succession.done, d.succession.going = make(chan struct{}), make(chan struct{}, 1)
	d.succession.ending, d.succession.end = context.WithCancel(context.Background())
	d.start = d.startSuccessor
	d.recorder = newRecorder(o.Engine, o.Log)
	if o.made != nil {
		o.made(d)
	}
	return d, nil
}

// openState opens state.db.
func (d *Daemon) openState() error {
	db, damaged, err := state.Open(filepath.Join(d.opt.Root, "state.db"), d.opt.Release)
	if err != nil {
		return err
	}
	for _, what := range damaged {
		d.log.Error("state was damaged", zap.String("what", what))
	}
	host, err := state.MachineID()
	if err == nil && host != "" {
		err = db.Claim(host)
	}
	if err != nil {
		return errors.Join(err, db.Close())
	}
	d.state, d.damaged = db, append(d.damaged, damaged...)
	return nil
}

// serve answers one request of the kernel.
func (d *Daemon) serve(r fscache.Request, t *turn) {
	d.used(t)
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
	if errors.Is(err, errStopping) {
		return // the request stays pending in the kernel and in the inbox: who comes next answers it
	}
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
	defer o.find()() // before the answer: a mount may be made by it, and what prefetches it looks for this
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
	err := d.engine.Answer(r, e)
	d.succession.report(r)
	switch {
	case err == nil:
	case errors.Is(err, fscache.ErrGone):
		d.log.Debug("reader is gone", zap.Stringer("object", r.Object), zap.Uint64("request", r.ID))
	default:
		d.log.Error("answer the kernel", zap.Stringer("op", r.Op), zap.Stringer("object", r.Object), zap.Uint64("request", r.ID), zap.Error(err))
	}
}

// Garbage is collected early, and earlier still near memoryFloor: a daemon that holds little between requests should
// not look large because of what they left. Chunk tables and the index of chunks come on top, for no collection makes them smaller.
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
	tables += d.index.size.Load() * 32
	debug.SetMemoryLimit(memoryFloor + tables*5/4)
}
