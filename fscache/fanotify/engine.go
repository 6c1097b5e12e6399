package fanotify

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"syscall"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/internal/keyed"
	"holdfast/fscache/internal/spare"
	"holdfast/state/crash"
)

// Name is the engine's name.
const Name = "fanotify"

// A Config says where the cache is and what the process inherited.
type Config struct {
	Dir string // cache directory, absolute; made where absent

	// Inherited is what another process left, or lends. Objects under its marks must all be added before the first Next: an event
	// of a file not known is denied. What the other process had read is handed out by Next again, under the numbers it had,
	// which Open occupies first of all: it must be called while the process has nothing open that it will close. What nobody
	// can identify is denied with EIO, and its reader asks again.
	Inherited fscache.Inherited
	// Reserved is what Reserve gave, for Inherited.Alive. Open takes it over whatever it returns.
	Reserved *Reservation

	Inbox  fscache.Inbox  // slots of SlotLen bytes or more; nil: events are only in this process's memory
	Holder fscache.Holder // nil: nothing is held beyond the process

	// AllowUnsafeKernel lets Open run on kernels whose file-backed EROFS is known to hand out wrong bytes.
	AllowUnsafeKernel bool

	Log *zap.Logger // nil: silent
}

// An Engine is the fanotify engine. Make one with Open.
type Engine struct {
	log    *zap.Logger
	dir    string
	root   *os.Root
	group  *os.File        // in Go's poller
	raw    syscall.RawConn // of group
	inbox  fscache.Inbox
	holder fscache.Holder

	// reading is held by the one Next that reads, until the file of its event is written down: there is never more than one event
	// whose file is not. Taken before all others.
	reading sync.Mutex
	private [SlotLen]byte         // guarded by reading: the slot of an engine without an inbox
	spare   *spare.Reserve        // guarded by reading
	in      reception             // guarded by reading
	attempt func(fd uintptr) bool // try

	naming keyed.Mutex // by who makes the file of an object and makes it known, and who deletes it. Taken before all others

	mu        sync.Mutex // guards what follows; never held over a system call that can wait
	objects   map[fscache.Key]*object
	byInode   map[inode]*object
	watched   map[uint64]bool          // inode numbers under a mark of another process's
	adoptable map[fscache.Key]*os.File // quiet descriptors that were inherited, until their object is added
	pending   map[int32]pendingEvent   // by event descriptor
	inFlight  int                      // events read whose slot or number is taken
	limit     int                      // how many of those are let in
	room      sync.Cond                // inFlight shrank, or frozen, or something is queued
	token     uint64                   // the last one given
	orphans   map[int32]*orphan        // events of other processes
	queue     []fscache.Request        // what Next hands out of them
	abandoned map[inode]bool           // files whose readers are denied
	unsettled bool                     // there are orphans that were not queued
	alive     bool                     // the predecessor reads
	reserved  *Reservation
	frozen    bool // Next is over
	closed    bool // everything is; implies frozen

	sweep      *sweep         // nil: there is nothing to sweep
	background sync.WaitGroup // the sweep, and Expect's releasing
}

// A pendingEvent is one we own the descriptor of and have not answered.
type pendingEvent struct {
	token    uint64 // 0: the answer waits, in orphan.behind
	slot     int
	object   *object
	off, len int64
	taken    bool // it is being answered: its descriptor is who answers it to close
}

var (
	_ fscache.Engine    = (*Engine)(nil)
	_ fscache.Successor = (*Engine)(nil)
)

// Open makes an engine. Errors say what the kernel or the directory lacks; use Available to ask without side effects.
func Open(c Config) (*Engine, error) {
	e := &Engine{
		log: c.Log, dir: c.Dir, inbox: c.Inbox, holder: c.Holder,
		objects:   make(map[fscache.Key]*object),
		byInode:   make(map[inode]*object),
		watched:   make(map[uint64]bool),
		adoptable: make(map[fscache.Key]*os.File),
		abandoned: make(map[inode]bool),
		pending:   make(map[int32]pendingEvent),
		alive:     c.Inherited.Alive && c.Inherited.Lifeline != nil,
		reserved:  c.Reserved,
	}
	e.room.L = &e.mu
	if e.log == nil {
		e.log = zap.NewNop()
	}
	err := e.open(c)
	if err != nil {
		err = errors.Join(fmt.Errorf("fanotify engine in %s: %w", c.Dir, err), e.closeFiles())
		return nil, err
	}
	return e, nil
}

func (e *Engine) open(c Config) error {
	// Before anything is opened here, which would get one of the numbers.
	if err := e.inherit(c.Inherited); err != nil {
		return err
	}
	if err := checkInbox(c.Inbox); err != nil {
		return err
	}
	if !c.AllowUnsafeKernel {
		if err := CheckKernel(); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return err
	}
	if err := checkHolesIn(c.Dir); err != nil {
		return err
	}
	var err error
	if e.root, err = os.OpenRoot(c.Dir); err != nil {
		return err
	}
	numbers, err := descriptorLimit()
	if err != nil {
		return err
	}
	e.limit = numbers / 2
	if c.Inbox != nil {
		e.limit = min(e.limit, c.Inbox.Slots()-1) // one is for the read that waits
	}
	e.limit = max(e.limit, 1)
	inherited := e.group != nil
	if !inherited {
		if e.group, err = newGroup(); err != nil {
			return err
		}
	}
	if e.raw, err = e.group.SyscallConn(); err != nil {
		return err
	}
	if e.spare, err = spare.New(e.log); err != nil {
		return err
	}
	e.attempt = e.try
	if inherited && !e.alive {
		e.clean(numbers)
	}
	return nil
}

// inherit takes over what another process left.
func (e *Engine) inherit(in fscache.Inherited) error {
	for _, h := range in.Objects {
		if old := e.adoptable[h.Object.Key]; old != nil {
			_ = old.Close()
		}
		e.adoptable[h.Object.Key] = h.File
	}
	if in.Lifeline == nil {
		return nil
	}
	if !in.Alive {
		orphans := e.gather(in)
		placed, err := occupy(slices.Collect(maps.Keys(orphans)))
		if err != nil {
			return errors.Join(err, in.Lifeline.Close())
		}
		for n, o := range orphans {
			o.placed = placed[n]
		}
		e.orphans, e.unsettled = orphans, len(orphans) > 0
		e.endLeases(in.Objects)
		crash.Point("fanotify.open.after-occupy")
	}
	var err error
	e.group, e.watched, err = adoptGroup(in.Lifeline)
	return err
}

// Name implements fscache.Engine.
func (e *Engine) Name() string { return Name }

// Lifeline implements fscache.Engine: the group's descriptor.
func (e *Engine) Lifeline() (string, *os.File) { return Name, e.group }

// object finds what was added, or says ErrUnknown or ErrClosed.
func (e *Engine) object(k fscache.Key) (*object, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, fscache.ErrClosed
	}
	if o := e.objects[k]; o != nil {
		return o, nil
	}
	return nil, fmt.Errorf("object %s: %w", k, fscache.ErrUnknown)
}

// WriteAt implements fscache.Engine. ErrNotOpen: the object was taken over and nothing has read it since, or the process has no
// descriptor left.
func (e *Engine) WriteAt(k fscache.Key, p []byte, off int64) error {
	o, err := e.object(k)
	if err != nil {
		return err
	}
	if o.quiet.Load() == nil {
		e.adoptAgain(o)
	}
	return o.writeAt(p, off)
}

// ReadAt implements fscache.Engine.
func (e *Engine) ReadAt(k fscache.Key, p []byte, off int64) error {
	o, err := e.object(k)
	if err != nil {
		return err
	}
	return o.readAt(p, off)
}

// Present implements fscache.Engine.
func (e *Engine) Present(k fscache.Key) ([]fscache.Extent, error) {
	o, err := e.object(k)
	if err != nil {
		return nil, err
	}
	return o.present()
}

// Drop implements fscache.Engine.
func (e *Engine) Drop(k fscache.Key, x fscache.Extent) error {
	o, err := e.object(k)
	if err != nil {
		return err
	}
	return o.drop(x)
}

// Sync implements fscache.Engine.
func (e *Engine) Sync(k fscache.Key) error {
	o, err := e.object(k)
	if err != nil {
		return err
	}
	return o.sync()
}

// Flush implements fscache.Engine.
func (e *Engine) Flush(k fscache.Key, x fscache.Extent) error {
	o, err := e.object(k)
	if err != nil {
		return err
	}
	return o.flush(x)
}

// Freeze implements fscache.Engine. An event that a Next has read when Freeze comes is still returned by it. It waits until what nobody could
// identify after a takeover is swept: nobody who takes over from a running process does that.
func (e *Engine) Freeze() error {
	err := e.sweep.end(false)
	if err != nil && !errors.Is(err, fscache.ErrClosed) {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.frozen {
		return nil
	}
	e.frozen = true
	return e.wake()
}

// Close implements fscache.Engine. If nobody else holds the group, the kernel now lets every waiting reader on, and
// all that follow, onto whatever is in the files: see I4. Slots of events that were not answered stay lent.
func (e *Engine) Close() error {
	_ = e.sweep.end(true)
	err := e.Freeze()
	e.reading.Lock() // whoever reads has given back what it was lent
	e.mu.Lock()
	e.reading.Unlock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	e.mu.Unlock()
	return errors.Join(err, e.closeFiles())
}

// closeFiles closes all there is, the group last.
func (e *Engine) closeFiles() error {
	_ = e.sweep.end(true)
	e.background.Wait()
	e.reserved.Release()
	e.spare.Close()
	e.mu.Lock()
	objects, events, orphans, adoptable := e.objects, e.pending, e.orphans, e.adoptable
	e.objects, e.pending, e.orphans, e.adoptable, e.queue = nil, nil, nil, nil, nil
	e.mu.Unlock()
	for fd, p := range events {
		if !p.taken {
			_ = unix.Close(int(fd))
		}
	}
	for fd, o := range orphans {
		if o.placed {
			_ = unix.Close(int(fd))
		}
	}
	var err error
	for _, f := range adoptable {
		err = errors.Join(err, f.Close())
	}
	for _, o := range objects {
		err = errors.Join(err, o.close())
	}
	if e.root != nil {
		err = errors.Join(err, e.root.Close())
	}
	if e.group != nil {
		err = errors.Join(err, e.group.Close())
	}
	return err
}
