package cachefiles

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/internal/erofs"
	"holdfast/state/crash"
)

// Pending implements fscache.Successor.
func (e *Engine) Pending() []fscache.Pending {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := make([]fscache.Pending, 0, len(e.pending)+len(e.queue)+len(e.expected))
	for _, p := range e.pending {
		if !p.gone {
			all = append(all, fscache.Pending{
				Op: p.op, Object: p.handle.object.key, Off: p.off, Len: p.len, ID: uint64(p.msg), Handle: p.handle.id,
			})
		}
	}
	for _, q := range e.queue {
		all = append(all, fscache.Pending{
			Op: opOf(q.m), Object: q.handle.object.key, Off: q.m.Read.Off, Len: q.m.Read.Len, ID: uint64(q.m.ID), Handle: q.handle.id,
		})
	}
	for _, p := range e.expected {
		all = append(all, p)
	}
	return all
}

// opOf is the operation of a message that was decoded.
func opOf(m Message) fscache.Op {
	switch m.Opcode {
	case CACHEFILES_OP_OPEN:
		return fscache.OpOpen
	case CACHEFILES_OP_CLOSE:
		return fscache.OpClose
	}
	return fscache.OpRead
}

// Holding implements fscache.Successor. Objects whose open is not answered yet are among them: whoever answers it needs theirs.
func (e *Engine) Holding() []fscache.Held {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := make([]fscache.Held, 0, len(e.handles))
	for _, h := range e.handles {
		all = append(all, h.asHeld(h.f))
	}
	return all
}

// Expect implements fscache.Successor. Nothing was restored: what the predecessor has in flight is its own until Replay.
func (e *Engine) Expect(pending []fscache.Pending, opened []fscache.Held, gone []fscache.Held) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.waiting || e.closed {
		for _, h := range opened {
			_ = h.File.Close()
		}
		return errors.New("cachefiles engine: it does not wait for a predecessor")
	}
	crash.Point("cachefiles.expect.before-start")
	if err := e.dev.start(e.log); err != nil {
		for _, h := range opened {
			_ = h.File.Close()
		}
		return fmt.Errorf("cachefiles engine: taking over: %w", err)
	}
	e.waiting = false
	for _, held := range gone {
		e.release(e.handles[held.Handle]) // the predecessor dropped it
	}
	for _, held := range opened {
		e.inherit(held) // so it did of those that are of no use
	}
	for _, p := range pending {
		e.expected[uint32(p.ID)] = p
		if h := e.handles[p.Handle]; h != nil && p.Op == fscache.OpOpen {
			h.opened.Store(false)
		}
	}
	if e.frozen {
		return e.dev.interrupt()
	}
	return nil
}

// Finished implements fscache.Successor. An open that was refused leaves a descriptor of no use, which goes when the object is
// opened anew or removed.
func (e *Engine) Finished(id uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if id <= math.MaxUint32 {
		e.finished(uint32(id))
	}
}

// finished forgets an expected request that was answered. e.mu is held.
func (e *Engine) finished(msg uint32) {
	p, ok := e.expected[msg]
	if !ok {
		return
	}
	delete(e.expected, msg)
	if h := e.handles[p.Handle]; h != nil && p.Op == fscache.OpOpen {
		h.opened.Store(true)
		e.announce()
	}
}

// Replay implements fscache.Successor.
func (e *Engine) Replay() {
	e.mu.Lock()
	var over []*handle
	var lost []fscache.Pending
	for _, p := range e.expected {
		m, ok := e.recorded(p)
		if !ok {
			continue
		}
		h := e.handles[p.Handle]
		switch {
		case p.Op == fscache.OpClose:
			// The kernel took it for done when it was read, and the object is gone.
			if h == nil {
				h = &handle{id: p.Handle, object: &object{key: p.Object}}
				h.held.Store(true)
			}
			e.release(h)
			over = append(over, h)
		case h == nil:
			lost = append(lost, p)
		default:
			e.enqueue(m, h)
		}
	}
	clear(e.expected)
	e.mu.Unlock()
	for _, h := range over {
		e.drop(h)
	}
	for _, p := range lost {
		e.log.Error("a request of the predecessor's cannot be answered, for its object's descriptor was not handed over",
			zap.Stringer("op", p.Op), zap.Stringer("object", p.Object), zap.Uint64("request", p.ID))
		if p.Op != fscache.OpOpen {
			continue
		}
		if err := e.copen(uint32(p.ID), -int64(unix.EIO)); err != nil && !errors.Is(err, fscache.ErrGone) {
			e.log.Error("refusing an open of the predecessor's", zap.Stringer("object", p.Object), zap.Error(err))
		}
	}
	crash.Point("cachefiles.replay.before-wake")
	e.wake()
}

// Thaw implements fscache.Successor.
func (e *Engine) Thaw() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return fscache.ErrClosed
	}
	if !e.frozen {
		return nil
	}
	if !e.waiting {
		if err := e.dev.resume(); err != nil {
			return fmt.Errorf("reading %s again: %w", devicePath, err)
		}
	}
	e.frozen, e.stopped = false, make(chan struct{})
	return nil
}

// Abandon implements fscache.Successor. There is nothing to make unreadable: of a cache that lost its device the kernel reads nothing
// more (EIO or ENOBUFS), and what is in memory is right (daemon.c, cachefiles_daemon_release).
func (e *Engine) Abandon(_ context.Context, m fscache.Mount) error {
	mounted, err := erofs.Mounted(m.Dir)
	if err == nil && mounted {
		crash.Point("cachefiles.abandon.before-detach")
		err = erofs.Detach(m.Dir)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("giving up the mount on %s, whose cachefiles device is lost: %w", m.Dir, err)
	}
	return nil
}

// wake makes the Next that reads look at the queue.
func (e *Engine) wake() {
	if err := e.dev.interrupt(); err != nil {
		e.log.Error("replaying what the predecessor left", zap.Error(err))
	}
	e.poke()
}

// poke wakes the Next that waits for a slot.
func (e *Engine) poke() {
	select {
	case e.nudge <- struct{}{}:
	default:
	}
}

// asHeld describes a handle to the Holder or a successor.
func (h *handle) asHeld(f *os.File) fscache.Held {
	return fscache.Held{Object: fscache.Object{Key: h.object.key, Size: h.object.size}, Handle: h.id, File: f}
}
