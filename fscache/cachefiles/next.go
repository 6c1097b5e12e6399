package cachefiles

import (
	"errors"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/state/crash"
)

// Next implements fscache.Engine. One caller at a time reads, one message; what a predecessor left comes first.
func (e *Engine) Next() (fscache.Request, error) {
	e.reading.RLock()
	defer e.reading.RUnlock()
	e.turn.Lock()
	defer e.turn.Unlock()
	e.heard.Store(true)
	for {
		if r, done, err := e.unread(); done {
			return r, err
		}
		got, err := e.dev.read()
		if errors.Is(err, errStarved) {
			e.starve(nil)
			continue
		}
		if errors.Is(err, errNoDescriptor) {
			e.starve(time.After(e.dev.spare.Pause()))
			continue
		}
		if err != nil {
			err = e.readError(got, err)
			e.free(got.slot)
			if err != nil {
				return fscache.Request{}, err
			}
			continue
		}
		if r, ok := e.accept(got); ok {
			crash.Point("cachefiles.next.after-accept")
			return r, nil
		}
		e.free(got.slot)
	}
}

// unread returns what is to be returned without reading the device: a request from the queue, or that there will be no more.
func (e *Engine) unread() (r fscache.Request, done bool, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.closed:
		return r, true, fscache.ErrClosed
	case len(e.queue) > 0:
		q := e.queue[0]
		e.queue = e.queue[1:]
		return e.track(opOf(q.m), delivery{m: q.m, slot: q.slot}, q.handle), true, nil
	case e.frozen:
		return r, true, fscache.ErrClosed
	case e.waiting:
		return r, true, errors.New("cachefiles engine: the predecessor reads the device until Expect")
	}
	return r, false, nil
}

// starve waits until a slot or a descriptor may be free, which it is after an answer at the earliest, or at timeout, or until there is another
// reason to look.
func (e *Engine) starve(timeout <-chan time.Time) {
	e.mu.Lock()
	stopped := e.stopped
	e.mu.Unlock()
	select {
	case <-e.nudge:
	case <-timeout:
	case <-stopped:
	}
}

// free gives a slot of the inbox back.
func (e *Engine) free(slot int) {
	if slot != noSlot {
		e.dev.inbox.Free(slot)
		e.poke()
	}
}

// readError deals with a read that brought no request. It returns an error if there will be no more.
func (e *Engine) readError(got delivery, err error) error {
	var malformed *MalformedError
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded): // Freeze, Close or wake
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.frozen {
			return nil // the queue comes before the end
		}
		return e.dev.resume()
	case errors.As(err, &malformed):
		e.log.Error("malformed request", zap.Error(err), zap.Int("bytes", got.n))
		if got.n >= msgLen {
			e.refuse(got.m)
		}
		return nil
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM):
		e.log.Error("the kernel failed an open: no descriptor for its object (LimitNOFILE=?)", zap.Error(err))
		return nil
	case errors.Is(err, unix.EEXIST):
		e.log.Error("the kernel failed an open: the object has a descriptor already, which somebody else holds", zap.Error(err))
		return nil
	}
	return fmt.Errorf("reading %s: %w", devicePath, err) // the same again the next time
}

// refuse lets go whoever waits for a request that makes no sense.
func (e *Engine) refuse(m Message) {
	var err error
	switch m.Opcode {
	case CACHEFILES_OP_OPEN:
		err = e.copen(m.ID, -int64(unix.EIO))
	case CACHEFILES_OP_READ:
		e.mu.Lock()
		h := e.handles[m.ObjectID]
		e.mu.Unlock()
		if h != nil {
			err = h.complete(m.ID)
		}
	}
	if err != nil && !errors.Is(err, fscache.ErrGone) {
		e.log.Error("refusing a request", zap.Uint32("msg", m.ID), zap.Error(err))
	}
}

// accept makes a request of a message.
func (e *Engine) accept(got delivery) (fscache.Request, bool) {
	m := got.m
	switch m.Opcode {
	case CACHEFILES_OP_OPEN:
		return e.acceptOpen(got)
	case CACHEFILES_OP_CLOSE:
		return e.acceptClose(got)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	h := e.handles[m.ObjectID]
	if h == nil {
		// Only the object's own descriptor could answer it.
		e.log.Error("read request for an object that is not open: its reader waits until killed",
			zap.Uint32("msg", m.ID), zap.Uint32("object", m.ObjectID))
		return fscache.Request{}, false
	}
	return e.track(fscache.OpRead, got, h), true
}

// acceptOpen takes the object's new descriptor. An object that is open has been dropped meanwhile: its old one goes.
func (e *Engine) acceptOpen(got delivery) (fscache.Request, bool) {
	m := got.m
	e.mu.Lock()
	k, ok := e.keyOf(m.Open)
	o := e.objects[k]
	if !ok || o == nil || !o.added {
		e.mu.Unlock()
		e.log.Error("refused to open an object that was not added", zap.String("volume", m.Open.Volume), zap.String("cookie", m.Open.Cookie))
		if err := errors.Join(e.copen(m.ID, -int64(unix.ENOENT)), got.anon.Close()); err != nil && !errors.Is(err, fscache.ErrGone) {
			e.log.Error("refusing an open", zap.Uint32("msg", m.ID), zap.Error(err))
		}
		return fscache.Request{}, false
	}
	defer e.mu.Unlock()
	old := o.handle
	e.release(old)
	h := &handle{id: m.ObjectID, object: o, f: got.anon}
	o.handle, o.refused = h, nil
	e.handles[h.id] = h
	r := e.track(fscache.OpOpen, got, h)
	e.pending[r.Token].stale = old
	return r, true
}

// acceptClose closes the object's descriptor; writes under way finish first. The kernel counted the request as done when
// it was read.
func (e *Engine) acceptClose(got delivery) (fscache.Request, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	h := e.handles[got.m.ObjectID]
	if h == nil {
		return fscache.Request{}, false
	}
	e.release(h)
	crash.Point("cachefiles.close.after-close")
	return e.track(fscache.OpClose, got, h), true
}

// release forgets a handle and closes it. e.mu is held.
func (e *Engine) release(h *handle) {
	if h == nil || e.handles[h.id] != h {
		return
	}
	delete(e.handles, h.id)
	if h.object.handle == h {
		h.object.handle = nil
	}
	e.announce()
	if err := h.f.Close(); err != nil {
		e.log.Error("closing an object", zap.Stringer("object", h.object.key), zap.Error(err))
	}
}

// drop makes the supervisor let go of a handle's descriptor. A lingering one pins the cache, and the kernel never opens its object anew.
//
// ORDER: after release. What the supervisor has let go of must not be needed.
func (e *Engine) drop(h *handle) {
	if h != nil && h.held.CompareAndSwap(true, false) {
		e.dropHeld(h.asHeld(nil))
	}
}

func (e *Engine) dropHeld(held fscache.Held) {
	if e.holder != nil {
		held.File = nil // closed
		e.holder.Drop(held)
	}
}

// track remembers a request until it is answered. e.mu is held.
func (e *Engine) track(op fscache.Op, got delivery, h *handle) fscache.Request {
	msg := got.m.ID
	if old := e.byMsg[msg]; old != nil {
		old.gone = true // its reader was killed; an answer would reach the new one
	}
	e.finished(msg) // the same, of the predecessor's
	p := &request{op: op, msg: msg, handle: h, off: got.m.Read.Off, len: got.m.Read.Len, slot: got.slot}
	e.token++
	e.pending[e.token] = p
	e.byMsg[msg] = p
	return fscache.Request{Op: op, Object: h.object.key, Off: p.off, Len: p.len, ID: uint64(msg), Token: e.token}
}

// openErrno is the errno the kernel gets for an open that is answered with anything but OK; mount(2) says EIO for all of
// them. A read has no errno: it is completed, and the hole that is still there makes the reader's EIO.
var openErrno = map[fscache.Errno]unix.Errno{
	fscache.EIO:    unix.EIO,
	fscache.ENOSPC: unix.ENOSPC,
	fscache.EAGAIN: unix.EAGAIN,
}

// Answer implements fscache.Engine.
//
// ORDER: the kernel, then the inbox. Until the slot is free a successor knows of the request, and answering it a second time does
// nothing.
func (e *Engine) Answer(r fscache.Request, a fscache.Errno) error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return fscache.ErrClosed
	}
	p := e.pending[r.Token]
	if p == nil || uint64(p.msg) != r.ID {
		e.mu.Unlock()
		return fmt.Errorf("%s %d of %s: %w", r.Op, r.ID, r.Object, fscache.ErrAnswered)
	}
	if p.taken {
		e.mu.Unlock()
		return fmt.Errorf("%s %d of %s is being answered: %w", r.Op, r.ID, r.Object, fscache.ErrAnswered)
	}
	p.taken = true
	gone := p.gone
	e.mu.Unlock()
	err := e.answer(p, a, gone)
	e.mu.Lock()
	if err != nil && e.closed { // the kernel was not told: the slot stays lent, for a successor
		e.mu.Unlock()
		return fscache.ErrClosed
	}
	delete(e.pending, r.Token)
	if e.byMsg[p.msg] == p {
		delete(e.byMsg, p.msg)
	}
	e.mu.Unlock()
	e.free(p.slot)
	crash.Point("cachefiles.answer.after-free")
	return err
}

func (e *Engine) answer(p *request, a fscache.Errno, gone bool) error {
	switch {
	case gone:
		e.drop(p.stale)
		if p.op == fscache.OpOpen && p.handle.inherited {
			e.opened(p.handle) // as in answerOpen
		} else if p.op == fscache.OpOpen {
			e.drop(p.handle)
		}
		return fscache.ErrGone
	case p.op == fscache.OpOpen:
		e.drop(p.stale)
		return e.answerOpen(p, a)
	case p.op == fscache.OpRead:
		crash.Point("cachefiles.read.before-complete")
		err := p.handle.complete(p.msg)
		crash.Point("cachefiles.read.after-complete")
		return err
	}
	e.drop(p.handle)
	crash.Point("cachefiles.close.after-drop")
	return nil
}

// answerOpen tells the kernel the object's size, or why there is none.
func (e *Engine) answerOpen(p *request, a fscache.Errno) error {
	if a != fscache.OK {
		errno, ok := openErrno[a]
		if !ok {
			errno = unix.EIO
		}
		return e.refuseOpen(p, errno)
	}
	h := p.handle
	if err := e.hold(h); err != nil {
		err = fmt.Errorf("object %s is not opened, for its descriptor would not outlive this process (is the supervisor's store full? see FileDescriptorStoreMax=): %w",
			h.object.key, err)
		return errors.Join(err, e.refuseOpen(p, unix.EIO))
	}
	h.object.file.hand()
	e.mu.Lock()
	e.used[h.object.key] = true
	e.mu.Unlock()
	err := e.copen(p.msg, h.object.size)
	crash.Point("cachefiles.open.after-copen")
	if h.inherited && errors.Is(err, fscache.ErrGone) {
		// The predecessor had answered before it died. The object is open, and only through this descriptor can its readers be served; if
		// the answer was no, it is of no use and goes when the object is opened anew or removed.
		err = nil
	}
	if err != nil {
		e.mu.Lock()
		e.release(h)
		e.mu.Unlock()
		e.drop(h)
		return err
	}
	e.opened(h)
	return nil
}

// opened notes that the kernel was told the object's size.
func (e *Engine) opened(h *handle) {
	e.mu.Lock()
	defer e.mu.Unlock()
	h.opened.Store(true)
	e.announce()
}

// hold puts an object's descriptor where it outlives the process.
//
// ORDER: record, supervisor, kernel. A successor that finds the object open in the kernel has its descriptor, and knows its size.
func (e *Engine) hold(h *handle) error {
	if e.holder == nil || h.held.Load() {
		return nil
	}
	crash.Point("cachefiles.open.before-hold")
	h.held.Store(true) // also if it fails: Drop clears what it left
	if err := e.holder.Hold(h.asHeld(h.f)); err != nil {
		return err
	}
	crash.Point("cachefiles.open.after-hold")
	return nil
}

// refuseOpen tells the kernel why there is no such object.
//
// ORDER: copen before close: an object whose descriptor is closed first fails with EBADFD, not with our errno.
func (e *Engine) refuseOpen(p *request, errno unix.Errno) error {
	err := e.copen(p.msg, -int64(errno))
	crash.Point("cachefiles.open.after-refuse")
	e.mu.Lock()
	p.handle.object.refused = errno
	e.release(p.handle)
	e.mu.Unlock()
	e.drop(p.handle)
	return err
}

// copen answers an open with a size or a negative errno (ondemand.c, cachefiles_ondemand_copen).
func (e *Engine) copen(msg uint32, size int64) error {
	err := command(e.dev.f, fmt.Sprintf("copen %d,%d", msg, size))
	switch {
	case errors.Is(err, unix.EINVAL):
		return fscache.ErrGone
	case errors.Is(err, os.ErrClosed):
		return fscache.ErrClosed
	}
	return err
}
