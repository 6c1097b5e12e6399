package fanotify

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

// Next implements fscache.Engine. One caller at a time waits; it reads one event. An epoll instance for each caller
// instead (EPOLLEXCLUSIVE) was measured to be no faster: see BenchmarkMissEngine.
func (e *Engine) Next() (fscache.Request, error) {
	r, blind, err := e.next()
	if blind != nil {
		e.adopt(blind, int(r.ID))
	}
	return r, err
}

// next also returns the request's object if that has no quiet descriptor yet.
func (e *Engine) next() (fscache.Request, *object, error) {
	e.reading.Lock()
	defer e.reading.Unlock()
	for {
		if r, ok, err := e.admit(); ok || err != nil {
			return r, nil, err
		}
		err := e.sweep.ahead()
		if errors.Is(err, errStarved) {
			e.starve()
			continue
		}
		if err != nil {
			return fscache.Request{}, nil, err
		}
		ev, slot, err := e.read()
		if errors.Is(err, errStarved) {
			e.starve()
			continue
		}
		if err != nil {
			return fscache.Request{}, nil, err
		}
		if ev.FD == noFD {
			continue
		}
		if err := e.sweep.pass(ev.FD); err != nil {
			return fscache.Request{}, nil, err // the event is in its slot
		}
		if r, o, ok := e.accept(ev, slot); ok {
			return r, o, nil
		}
	}
}

// errStarved means that no descriptor is to be had for an event: what is pending stays in the kernel until there is one.
var errStarved = errors.New("no file descriptor for an event")

// starve waits until there may be a descriptor, or there is another reason to look. An answer gives its event's back.
func (e *Engine) starve() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.frozen || e.unsettled || len(e.queue) > 0 {
		return
	}
	t := time.AfterFunc(e.spare.Pause(), func() {
		e.mu.Lock() // who is about to wait does
		defer e.mu.Unlock()
		e.room.Broadcast()
	})
	defer t.Stop()
	e.room.Wait()
}

// admit returns a request that was inherited, or waits until one more event may be read: one that finds no descriptor is denied by
// the kernel, one that is left with it waits.
func (e *Engine) admit() (fscache.Request, bool, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for {
		switch {
		case e.frozen:
			return fscache.Request{}, false, fscache.ErrClosed
		case e.alive:
			return fscache.Request{}, false, errors.New("reading the fanotify group while the predecessor does: Expect comes first")
		case e.unsettled:
			e.mu.Unlock()
			e.settle()
			e.mu.Lock()
			continue
		case len(e.queue) > 0:
			r := e.queue[0]
			e.queue = e.queue[1:]
			return r, true, nil
		case e.inFlight < e.limit:
			return fscache.Request{}, false, nil
		}
		e.room.Wait()
	}
}

// A reception is a read(2) of the group. It is the engine's, and guarded by reading, so that a read allocates nothing.
type reception struct {
	p   []byte
	n   int
	err error
}

// try reads once: it is what the poller calls at once, and then each time something may have come.
func (e *Engine) try(fd uintptr) bool {
	in := &e.in
	if !e.spare.Ready() {
		in.err = errStarved
		return true
	}
	for in.err = unix.EINTR; in.err == unix.EINTR; {
		in.n, in.err = unix.Read(int(fd), in.p)
	}
	e.spare.Done(in.err != unix.EAGAIN)
	return in.err != unix.EAGAIN
}

// read returns the next event and the slot it is in, with its file written down there. Its FD is noFD where one was denied, or something
// woke the reader. Errors end the engine, but for errStarved.
func (e *Engine) read() (Event, int, error) {
	none := Event{FD: noFD}
	slot, p, err := e.take()
	if err != nil {
		return none, noSlot, err
	}
	in := &e.in
	in.p = p[:maxEventLen] // room for one event: what we have not read stays with the kernel
	for {
		unidentify(p)
		if err := e.raw.Read(e.attempt); err != nil {
			e.free(slot)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return none, noSlot, e.rearm()
			}
			return none, noSlot, fscache.ErrClosed // Go has an error of its own here, which nothing matches
		}
		switch {
		case in.err == nil && in.n > 0:
			crash.Point("fanotify.read.before-identity")
			ev := e.decode(p, in.n, slot)
			e.spare.Lowest(int(ev.FD))
			return ev, slot, nil
		case in.err == nil: // nothing, of an event whose file is gone (EOPENSTALE)
		case errors.Is(in.err, errStarved):
			e.free(slot)
			return none, noSlot, errStarved
		case errors.Is(in.err, unix.EINVAL), errors.Is(in.err, unix.EFAULT), errors.Is(in.err, unix.EBADF):
			// EINVAL: a record larger than any this release knows (get_one_event). It stays first in the queue.
			e.free(slot)
			return none, noSlot, fmt.Errorf("reading the fanotify group: %w", in.err)
		default:
			// The kernel could not open a descriptor (EMFILE, ENFILE, ENOMEM) and denied that one reader.
			e.log.Error("the kernel denied a reader: no descriptor for its event", zap.Error(in.err))
		}
	}
}

// rearm lets reads wait again after Replay woke them.
func (e *Engine) rearm() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.frozen {
		return fscache.ErrClosed
	}
	return e.group.SetReadDeadline(time.Time{})
}

// wake makes the Next that reads look at what there is to do; mu is held.
func (e *Engine) wake() error {
	e.room.Broadcast()
	if err := e.group.SetReadDeadline(time.Unix(1, 0)); err != nil {
		return fmt.Errorf("waking readers of the fanotify group: %w", err)
	}
	return nil
}

// decode returns the event in the first n bytes of p, identified; FD is noFD if it was denied. One that makes no sense is denied, as is
// anything behind it: the buffer has room for one event with its range.
func (e *Engine) decode(p []byte, n, slot int) Event {
	first, rest, err := DecodeEvent(p[:n])
	if err == nil && first.FD != noFD && first.Mask == unix.FAN_PRE_ACCESS && len(rest) == 0 {
		var st unix.Stat_t
		if err = unix.Fstat(int(first.FD), &st); err == nil {
			first.file = inode{dev: st.Dev, ino: st.Ino}
			identify(p, first.file)
			return first
		}
	}
	why := []zap.Field{zap.Error(err), zap.Binary("message", p[:n]), zap.Uint64("mask", first.Mask)}
	for len(rest) > 0 {
		var extra Event
		extra, rest, _ = DecodeEvent(rest)
		e.refuse(extra, noSlot, "event behind another one", why...)
	}
	e.refuse(first, slot, "event that makes no sense", why...)
	return Event{FD: noFD}
}

// accept makes a request of an event, whose descriptor and slot are pending from here on. It also returns the object if that has
// no quiet descriptor yet.
func (e *Engine) accept(ev Event, slot int) (fscache.Request, *object, bool) {
	e.mu.Lock()
	o := e.byInode[ev.file]
	if o == nil {
		known := e.abandoned[ev.file]
		e.mu.Unlock()
		if known {
			e.turnAway(ev, slot)
			return fscache.Request{}, nil, false
		}
		e.refuse(ev, slot, "event of a file that is no cache object", zap.Uint64("dev", ev.file.dev), zap.Uint64("inode", ev.file.ino))
		return fscache.Request{}, nil, false
	}
	e.token++
	r := fscache.Request{Op: fscache.OpRead, Object: o.key, Off: ev.Off, Len: ev.Len, ID: uint64(ev.FD), Token: e.token}
	if !ev.HasRange {
		r.Off, r.Len = 0, o.size
	}
	e.pending[ev.FD] = pendingEvent{token: e.token, slot: slot, object: o, off: r.Off, len: r.Len}
	e.inFlight++
	e.mu.Unlock()
	crash.Point("fanotify.read.after-identity")
	if o.quiet.Load() == nil {
		return r, o, true
	}
	return r, nil, true
}

// refuse denies an event that cannot become a request, and says why.
func (e *Engine) refuse(ev Event, slot int, why string, fields ...zap.Field) {
	e.log.Error("denied a reader: "+why, append(fields, zap.Int32("pid", ev.PID), zap.Int32("fd", ev.FD))...)
	e.turnAway(ev, slot)
}

// turnAway denies an event that is not pending.
func (e *Engine) turnAway(ev Event, slot int) {
	if ev.FD == noFD {
		e.free(slot)
		return
	}
	if err := e.respond(ev.FD, slot, fscache.EIO); err != nil && !errors.Is(err, fscache.ErrGone) {
		e.log.Error("denying a reader", zap.Error(err))
	}
}
