package simkernel

import (
	"strings"

	"holdfast/fscache"
	"holdfast/fscache/cachefiles"
)

// cacheProcess is what a process has of /dev/cachefiles besides the device.
type cacheProcess struct {
	handles map[uint32]*anon
	objects map[uint32]fscache.Object // by handle
	current map[fscache.Key]uint32    // the handle of an object that is written through
	stale   []fscache.Held            // closed, and not yet dropped by the supervisor
}

// attached says whether an object has a file, which lseek(2) tells.
func (c *cacheProcess) attached(handle uint32) bool {
	a := c.handles[handle]
	return a != nil && a.object.attached
}

func (c *cacheProcess) have(a *anon, o fscache.Object) {
	c.handles[a.id], c.objects[a.id] = a, o
	c.current[o.Key] = a.id
}

// startCachefiles takes over what a predecessor left.
//
// ORDER: inherited OPENs whose descriptors survived are answered before restore. Delivered again they would fail with EEXIST.
func (e *Engine) startCachefiles() {
	d := e.k.device
	e.cache = cacheProcess{
		handles: make(map[uint32]*anon), objects: make(map[uint32]fscache.Object), current: make(map[fscache.Key]uint32),
	}
	e.adopt(e.c.Inherited.Objects)
	if e.waits {
		return
	}
	left := e.leftOfCachefiles()
	opens := make(map[uint32]bool)
	for _, p := range left {
		_, held := e.cache.handles[p.Handle]
		switch {
		case p.Op == fscache.OpClose && held:
			e.release(p.Handle)
		case p.Op == fscache.OpOpen && held && e.c.Unsafe.RestoreFirst:
			opens[p.Handle] = true
			e.handout = append(e.handout, &work{Pending: p, slot: noSlot, lent: true})
		case p.Op == fscache.OpOpen && held:
			opens[p.Handle] = true
			e.c.Point("start.before-copen")
			_ = d.copen(p.ID, fscache.OK)
		case p.Op == fscache.OpOpen && !d.restores:
			// Its descriptor went with the process and it is never delivered again: without an answer its mount hangs.
			e.c.Point("start.before-copen")
			_ = d.copen(p.ID, fscache.EIO)
		case p.Op == fscache.OpRead && held && !d.restores:
			e.handout = append(e.handout, &work{Pending: p, slot: noSlot})
		}
	}
	for id, a := range e.cache.handles {
		if !a.object.attached && !opens[id] {
			e.release(id)
		}
	}
	e.c.Point("start.before-restore")
	_ = d.restore()
}

// leftOfCachefiles is what the predecessor had, each once. Of READs in messages the handle says which object they are about.
func (e *Engine) leftOfCachefiles() []fscache.Pending {
	var left []fscache.Pending
	seen := make(map[uint64]bool)
	add := func(p fscache.Pending) {
		if !seen[p.ID] {
			seen[p.ID] = true
			left = append(left, p)
		}
	}
	for _, b := range e.c.Inherited.Messages {
		if p, ok := decodeCachefiles(b); ok {
			if o, ok := e.cache.objects[p.Handle]; ok {
				p.Object = o.Key
			}
			add(p)
		}
	}
	for _, p := range e.c.Inherited.Pending {
		add(p)
	}
	return left
}

// adopt takes over descriptors that others hold too.
func (e *Engine) adopt(held []fscache.Held) {
	for _, h := range held {
		if e.k.group != nil {
			e.adoptQuiet(h)
			continue
		}
		if e.cache.handles[h.Handle] != nil {
			continue
		}
		a, ok := e.k.device.hold(h.Handle)
		if !ok {
			continue
		}
		old := e.cache.current[h.Object.Key]
		e.cache.have(a, h.Object)
		if o := e.cache.handles[old]; o != nil && (old > a.id || o.object.attached && !a.object.attached) {
			e.cache.current[h.Object.Key] = old
		}
	}
}

// release closes a descriptor.
func (e *Engine) release(handle uint32) {
	a := e.cache.handles[handle]
	if a == nil {
		return
	}
	o := e.cache.objects[handle]
	delete(e.cache.handles, handle)
	delete(e.cache.objects, handle)
	if e.cache.current[o.Key] == handle {
		delete(e.cache.current, o.Key)
	}
	e.k.device.close(a)
	e.cache.stale = append(e.cache.stale, fscache.Held{Object: o, Handle: handle})
	e.k.changed.Broadcast()
}

// dropStale has the supervisor close what this process has closed.
func (e *Engine) dropStale() {
	e.k.mu.Lock()
	stale := e.cache.stale
	e.cache.stale = nil
	e.k.mu.Unlock()
	e.drop(stale...)
}

// readCachefiles reads one request into p, or returns nil.
func (e *Engine) readCachefiles(p []byte) *work {
	d := e.k.device
	room := e.c.Limit == 0 || len(e.cache.handles)+3 < e.c.Limit
	r, a, err := d.read(e, room)
	if r == nil || err != nil {
		return nil // the kernel has failed an OPEN that it found no descriptor for
	}
	w := &work{Pending: fscache.Pending{Op: r.op, Object: r.key, Off: r.off, Len: r.n, ID: r.number, Handle: uint32(max(r.object.id, 0))}}
	encodeCachefiles(p, w.Pending)
	if a != nil {
		e.cache.handles[a.id] = a // installed before read(2) returns
	}
	e.c.Point("next.after-read")
	switch r.op {
	case fscache.OpOpen:
		size, known := e.added[r.key]
		if !known {
			_ = d.copen(r.number, fscache.EIO)
			delete(e.cache.handles, a.id)
			d.close(a)
			return nil
		}
		e.release(e.cache.current[r.key]) // the object was dropped meanwhile
		e.cache.have(a, fscache.Object{Key: r.key, Size: size})
	case fscache.OpRead:
		if e.cache.handles[w.Handle] == nil {
			return nil // only the object's own descriptor could answer it: its reader waits until it is killed
		}
	case fscache.OpClose:
		w.Handle = e.cache.current[r.key]
		if e.cache.handles[w.Handle] == nil {
			return nil
		}
		e.release(w.Handle)
	}
	return w
}

// answerCachefiles ends a request. ORDER: record, supervisor, copen; answer, then the slot.
func (e *Engine) answerCachefiles(w *work, a fscache.Errno) error {
	if e.c.Unsafe.AnswerFreed {
		e.free(w.slot)
		w.slot = noSlot
		e.c.Point("answer.freed-first")
	}
	e.dropStale()
	if w.Op == fscache.OpOpen && a == fscache.OK {
		if err := e.hold(w.Handle); err != nil {
			a = fscache.EIO
		}
	}
	err := e.answerDevice(w, a)
	e.dropStale()
	e.c.Point("answer.before-free")
	e.free(w.slot)
	return err
}

// hold gives an object's descriptor to the supervisor.
func (e *Engine) hold(handle uint32) error {
	e.k.mu.Lock()
	o, ok := e.cache.objects[handle]
	e.k.mu.Unlock()
	if !ok || e.c.Holder == nil {
		return nil
	}
	e.c.Point("open.before-hold")
	err := e.c.Holder.Hold(fscache.Held{Object: o, Handle: handle})
	e.c.Point("open.after-hold")
	return err
}

func (e *Engine) answerDevice(w *work, a fscache.Errno) error {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if e.closed {
		return fscache.ErrClosed
	}
	d := e.k.device
	defer e.c.Point("answer.after-answer")
	switch w.Op {
	case fscache.OpOpen:
		err := d.copen(w.ID, a)
		open := w.lent && !e.c.Unsafe.ForgetReplay && err != nil && e.cache.attached(w.Handle) // a predecessor answered it
		if a != fscache.OK || err != nil && !open {                                            // ORDER: copen before close, which would fail it with EBADFD
			e.release(w.Handle)
		}
		return err
	case fscache.OpRead:
		h := e.cache.handles[w.Handle]
		if h == nil {
			return fscache.ErrGone
		}
		return d.complete(h, w.ID)
	}
	return nil
}

const volumePrefix = "erofs,"

// decodeCachefiles is what a message says to a successor.
func decodeCachefiles(b []byte) (fscache.Pending, bool) {
	n := messageLen(b)
	if n == 0 {
		return fscache.Pending{}, false
	}
	m, err := cachefiles.DecodeMessage(b[:n])
	if err != nil {
		return fscache.Pending{}, false
	}
	p := fscache.Pending{ID: uint64(m.ID), Handle: m.ObjectID}
	switch m.Opcode {
	case cachefiles.CACHEFILES_OP_OPEN:
		p.Op = fscache.OpOpen
		p.Object = fscache.Key{Domain: strings.TrimPrefix(m.Open.Volume, volumePrefix), ID: m.Open.Cookie}
	case cachefiles.CACHEFILES_OP_READ:
		p.Op, p.Off, p.Len = fscache.OpRead, m.Read.Off, m.Read.Len
	default:
		p.Op = fscache.OpClose
	}
	return p, true
}
