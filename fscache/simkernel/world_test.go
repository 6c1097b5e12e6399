package simkernel_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"syscall"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
)

var ctx = context.Background()

// A world is a simulated host: a kernel, what outlives processes, and at most two processes.
type world struct {
	k        *simkernel.Kernel
	mode     simkernel.Mode
	mutation mutation
	choose   chooser
	fail     func(format string, args ...any) // does not return
	log      []string                         // what happened; only kept when tracing
	tracing  bool

	objects []fscache.Object
	images  []*image
	readers []*reader

	// What survives processes.
	store   []entry                 // the supervisor's
	closing []fscache.Held          // removed from the store, and not closed yet
	records map[string]fscache.Held // session.db: of held objects, by name
	pending []fscache.Pending       // session.db: of requests in flight
	boxes   []*box                  // inbox files
	names   int

	main *process // nil: none is running
	next *process // a successor in an upgrade
	up   upgradeState

	// Faults.
	down      bool // the source does not answer
	slowStore bool // the supervisor closes in its own time
	broken    []brokenRange
	lossy     bool // the supervisor lost something, some time
}

type entry struct {
	name string
	held fscache.Held
}

// A brokenRange is one that the source will never have.
type brokenRange struct {
	key      fscache.Key
	off, end int64
}

type image struct {
	m      fscache.Mount
	state  imageState
	failed error
}

type imageState int

const (
	unmounted imageState = iota
	mounting
	mountedOn
)

type reader struct {
	*simkernel.Reader
	key    fscache.Key
	p      []byte
	off    int64
	im     *image
	killed bool
}

// A chooser makes the choices of a schedule: one of n, 0 being the simplest.
type chooser interface{ pick(what string, n int) int }

const blobPages = 12

func newWorld(mode simkernel.Mode, m mutation, dirs []string, c chooser) *world {
	w := &world{k: simkernel.New(mode), mode: mode, mutation: m, choose: c, records: make(map[string]fscache.Held)}
	key := func(id string) fscache.Key { return fscache.Key{Domain: "d", ID: id} }
	blobs := []fscache.Object{{Key: key("a"), Size: blobPages * page}, {Key: key("b"), Size: blobPages * page}, {Key: key("c"), Size: blobPages * page}}
	boots := []fscache.Object{{Key: key("boot1"), Size: page}, {Key: key("boot2"), Size: page}}
	w.objects = append(slices.Clone(blobs), boots...)
	for i, b := range boots {
		w.images = append(w.images, &image{m: fscache.Mount{Dir: dirs[i], Bootstrap: b, Blobs: blobs[i : i+2]}})
	}
	return w
}

func (w *world) note(format string, args ...any) {
	if w.tracing {
		w.log = append(w.log, fmt.Sprintf(format, args...))
	}
}

func (w *world) nameOf(p *process) string {
	if p == w.next {
		return "successor"
	}
	return "daemon"
}

func (w *world) freeName() string {
	w.names++
	return "o" + strconv.Itoa(w.names)
}

func (w *world) size(k fscache.Key) int64 {
	i := slices.IndexFunc(w.objects, func(o fscache.Object) bool { return o.Key == k })
	return w.objects[i].Size
}

func clip(size, off, n int64) (int64, int64) {
	off = min(off, size)
	return off, min(n, size-off)
}

// contents is what every object holds: each 8 bytes say whose they are, and which.
var contents = func() map[string][]byte {
	all := make(map[string][]byte)
	for i, id := range []string{"a", "b", "c", "boot1", "boot2"} {
		p := make([]byte, blobPages*page)
		for at := 0; at < len(p); at += 8 {
			binary.LittleEndian.PutUint64(p[at:], uint64(i+1)<<32|uint64(at)|1)
		}
		all[id] = p
	}
	return all
}()

func content(k fscache.Key, off, n int64) []byte { return contents[k.ID][off : off+n] }

func (w *world) isBroken(k fscache.Key, off, n int64) bool {
	return slices.ContainsFunc(w.broken, func(b brokenRange) bool { return b.key == k && off < b.end && b.off < off+n })
}

// run lets a process run, and buries it if it dies.
func (w *world) run(p *process, f func()) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case death:
			w.note("died at %s", r.point)
			w.died(p)
		default:
			panic(r)
		}
	}()
	f()
}

// kill takes a process out of the world.
func (p *process) kill() {
	p.dead = true
	if p.e != nil {
		p.e.Kill()
	}
	p.jobs = nil
}

// died is a process's death, and what the supervisor does about it: it lets nothing of the service live on when its main process
// ends, before it starts that again.
func (w *world) died(p *process) {
	p.kill()
	switch {
	case p == w.next && w.up < committed: // a successor that failed before it was needed
		w.abandon()
	case p == w.main && w.up == committed: // the predecessor: the successor answers what it left
		w.inheritUpgrade()
	default:
		if w.main != nil {
			w.main.kill()
		}
		if w.next != nil {
			w.next.kill()
		}
		w.main, w.next, w.up = nil, nil, idle
	}
}

// restart is the supervisor starting the daemon: the order of recovery.
func (w *world) restart(die int) {
	p := &process{w: w, die: die, box: newBox()}
	w.main = p
	w.run(p, func() {
		in := fscache.Inherited{Pending: w.pending}
		old := slices.Clone(w.boxes)
		for _, b := range old {
			in.Messages = append(in.Messages, b.messages()...)
		}
		w.boxes = append(w.boxes, p.box)
		in.Objects = w.inherited()
		if w.mutation == inboxRemovedBeforeRecord {
			w.boxes = []*box{p.box}
			w.pending = nil
		}
		if err := p.start(simkernel.Config{Inherited: in}); err != nil {
			w.fail("start: %v", err)
		}
		p.record()
		p.point("start.after-record")
		w.boxes = []*box{p.box}
		p.point("start.after-removal")
	})
}

// inherited is what the supervisor hands over, as far as there is a record of what it is.
func (w *world) inherited() (list []fscache.Held) {
	for _, s := range w.store {
		if h, ok := w.records[s.name]; ok {
			list = append(list, h)
		}
	}
	return list
}

// answered tells a successor what its predecessor has finished. Of an event that may be several things only the last answer ends it.
func (w *world) answered(p *process, j *job) {
	if p != w.main || w.up != committed {
		return
	}
	unfinished := slices.ContainsFunc(p.e.Pending(), func(x fscache.Pending) bool { return x.ID == j.ID })
	if !unfinished || w.mutation == finishedAtOnce {
		w.next.e.Finished(j.ID)
	}
}

// check looks at every reader and at the kernel.
func (w *world) check() {
	if v := w.k.Violations(); len(v) > 0 {
		w.fail("%s", v[0])
	}
	w.readers = slices.DeleteFunc(w.readers, func(r *reader) bool {
		ended, err := r.Ended()
		if ended {
			w.judge(r, err)
		}
		return ended
	})
	for _, im := range w.images {
		// Without restore an OPEN is lost with its descriptor, if the process dies before the supervisor has that.
		if im.failed != nil && w.mode != simkernel.CachefilesWithoutRestore {
			w.fail("mount: %v", im.failed)
		}
	}
	w.checkJournal()
}

// judge is I1.
func (w *world) judge(r *reader, err error) {
	switch {
	case r.killed:
	case err == nil && !bytes.Equal(r.p, content(r.key, r.off, int64(len(r.p)))):
		w.fail("wrong bytes of %s at %d+%d", r.key, r.off, len(r.p))
	case err == nil:
	case !errors.Is(err, syscall.EIO):
		w.fail("read of %s: %v", r.key, err)
	case w.isBroken(r.key, r.off, int64(len(r.p))), w.lossy:
	default:
		w.fail("reader of %s at %d+%d got %v, and the source works", r.key, r.off, len(r.p), err)
	}
}

// checkJournal is I2's: what some process has read and nobody answered is written down where a successor looks. Where the kernel
// delivers again, that is for OPENs whose descriptors are held.
func (w *world) checkJournal() {
	known := make(map[uint64]bool)
	for _, p := range w.pending {
		known[p.ID] = true
	}
	for _, b := range w.boxes {
		for _, m := range b.messages() {
			known[w.number(m)] = true
		}
	}
	for _, o := range w.k.Obligations() {
		held := slices.ContainsFunc(w.store, func(s entry) bool { return s.held.Handle == o.Handle })
		needed := w.mode == simkernel.Fanotify || o.Op == fscache.OpOpen && held || w.mode == simkernel.CachefilesWithoutRestore
		if needed && !known[o.ID] {
			w.fail("%s of %s under number %d is nowhere written down", o.Op, o.Object, o.ID)
		}
	}
}

// number is what a message answers to.
func (w *world) number(m []byte) uint64 {
	if w.mode == simkernel.Fanotify {
		return uint64(binary.NativeEndian.Uint32(m[16:]))
	}
	return uint64(binary.NativeEndian.Uint32(m))
}
