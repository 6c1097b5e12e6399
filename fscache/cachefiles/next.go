package cachefiles

import (
	"errors"
	"fmt"
	"os"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// Next implements fscache.Engine. The device's read lock lets one caller at a time wait; it reads one message.
func (e *Engine) Next() (fscache.Request, error) {
	e.reading.RLock()
	defer e.reading.RUnlock()
	e.mu.Lock()
	closed := e.closed
	e.mu.Unlock()
	if closed {
		return fscache.Request{}, fscache.ErrClosed
	}
	for {
		m, anon, n, err := e.dev.read()
		if err != nil {
			if err := e.readError(m, n, err); err != nil {
				return fscache.Request{}, err
			}
			continue
		}
		if r, ok := e.accept(m, anon); ok {
			return r, nil
		}
	}
}

// readError deals with a read that brought no request. It returns an error if there will be no more.
func (e *Engine) readError(m Message, n int, err error) error {
	var malformed *MalformedError
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded): // Freeze or Close
		return fscache.ErrClosed
	case errors.As(err, &malformed):
		e.log.Error("malformed request", zap.Error(err), zap.Int("bytes", n))
		if n >= msgLen {
			e.refuse(m)
		}
		return nil
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.EEXIST):
		// The kernel found no descriptor for an open, or the object has one already, and has failed that open.
		e.log.Error("the kernel failed an open: no descriptor for its object (LimitNOFILE=?)", zap.Error(err))
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
func (e *Engine) accept(m Message, anon *os.File) (fscache.Request, bool) {
	switch m.Opcode {
	case CACHEFILES_OP_OPEN:
		return e.acceptOpen(m, anon)
	case CACHEFILES_OP_CLOSE:
		return e.acceptClose(m)
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
	r := e.track(fscache.OpRead, m.ID, h)
	r.Off, r.Len = m.Read.Off, m.Read.Len
	return r, true
}

// acceptOpen takes the object's new descriptor. An object that is open has been dropped meanwhile: its old one goes.
func (e *Engine) acceptOpen(m Message, anon *os.File) (fscache.Request, bool) {
	e.mu.Lock()
	k, ok := e.keyOf(m.Open)
	o := e.objects[k]
	if !ok || o == nil {
		e.mu.Unlock()
		e.log.Error("refused to open an object that was not added", zap.String("volume", m.Open.Volume), zap.String("cookie", m.Open.Cookie))
		if err := errors.Join(e.copen(m.ID, -int64(unix.ENOENT)), anon.Close()); err != nil && !errors.Is(err, fscache.ErrGone) {
			e.log.Error("refusing an open", zap.Uint32("msg", m.ID), zap.Error(err))
		}
		return fscache.Request{}, false
	}
	defer e.mu.Unlock()
	e.release(o.handle)
	h := &handle{id: m.ObjectID, object: o, f: anon}
	o.handle, o.refused = h, nil
	e.handles[h.id] = h
	return e.track(fscache.OpOpen, m.ID, h), true
}

// acceptClose closes the object's descriptor; writes under way finish first. The kernel counted the request as done when
// it was read.
func (e *Engine) acceptClose(m Message) (fscache.Request, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	h := e.handles[m.ObjectID]
	if h == nil {
		return fscache.Request{}, false
	}
	e.release(h)
	return e.track(fscache.OpClose, m.ID, h), true
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

// track remembers a request until it is answered. e.mu is held.
func (e *Engine) track(op fscache.Op, msg uint32, h *handle) fscache.Request {
	if old := e.byMsg[msg]; old != nil {
		old.gone = true // its reader was killed; an answer would reach the new one
	}
	p := &request{op: op, msg: msg, handle: h}
	e.token++
	e.pending[e.token] = p
	e.byMsg[msg] = p
	return fscache.Request{Op: op, Object: h.object.key, ID: uint64(msg), Token: e.token}
}

// openErrno is the errno the kernel gets for an open that is answered with anything but OK; mount(2) says EIO for all of
// them. A read has no errno: it is completed, and the hole that is still there makes the reader's EIO.
var openErrno = map[fscache.Errno]unix.Errno{
	fscache.EIO:    unix.EIO,
	fscache.ENOSPC: unix.ENOSPC,
	fscache.EAGAIN: unix.EAGAIN,
}

// Answer implements fscache.Engine.
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
	delete(e.pending, r.Token)
	if e.byMsg[p.msg] == p {
		delete(e.byMsg, p.msg)
	}
	e.mu.Unlock()
	switch {
	case p.gone:
		return fscache.ErrGone
	case p.op == fscache.OpOpen:
		return e.answerOpen(p, a)
	case p.op == fscache.OpRead:
		return p.handle.complete(p.msg)
	}
	return nil
}

// answerOpen tells the kernel the object's size, or why there is none.
//
// ORDER: copen before close: an object whose descriptor is closed first fails with EBADFD, not with our errno.
func (e *Engine) answerOpen(p *request, a fscache.Errno) error {
	o := p.handle.object
	if a == fscache.OK {
		err := e.copen(p.msg, o.size)
		e.mu.Lock()
		defer e.mu.Unlock()
		if err != nil {
			e.release(p.handle)
			return err
		}
		p.handle.opened.Store(true)
		e.announce()
		return nil
	}
	errno, ok := openErrno[a]
	if !ok {
		errno = unix.EIO
	}
	err := e.copen(p.msg, -int64(errno))
	e.mu.Lock()
	defer e.mu.Unlock()
	o.refused = errno
	e.release(p.handle)
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
