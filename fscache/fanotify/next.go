package fanotify

import (
	"errors"
	"fmt"
	"io"
	"os"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// Next implements fscache.Engine. The group's read lock lets one caller at a time wait; it reads one event. An epoll
// instance for each caller instead (EPOLLEXCLUSIVE) was measured to be no faster: see BenchmarkMissEngine.
func (e *Engine) Next() (fscache.Request, error) {
	for {
		ev, err := e.read()
		if err != nil {
			return fscache.Request{}, err
		}
		if r, ok, err := e.accept(ev); ok || err != nil {
			return r, err
		}
	}
}

// read returns the next event that has a descriptor. Errors end the engine.
func (e *Engine) read() (Event, error) {
	var buf [maxEventLen]byte // room for one event: what we have not read stays with the kernel
	for {
		e.waitForRoom()
		n, err := e.group.Read(buf[:])
		switch {
		case err == nil:
			if ev, ok := e.decode(buf[:n]); ok {
				return ev, nil
			}
		case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, os.ErrClosed):
			return Event{}, fscache.ErrClosed
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EFAULT), errors.Is(err, unix.EBADF):
			// EINVAL: a record larger than any this release knows (get_one_event). It stays first in the queue.
			return Event{}, fmt.Errorf("reading the fanotify group: %w", err)
		case errors.Is(err, io.EOF):
		default:
			// The kernel could not open a descriptor (EMFILE, ENFILE, ENOMEM) and denied that one reader.
			e.log.Error("the kernel denied a reader: no descriptor for its event", zap.Error(err))
		}
	}
}

// waitForRoom holds reading back while half of all descriptors are taken by events: an event left with the kernel
// waits, one it finds no descriptor for is denied.
func (e *Engine) waitForRoom() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for len(e.pending) >= e.limit && !e.frozen {
		e.room.Wait()
	}
}

// decode returns the event in b. One that makes no sense is denied, as is anything behind it: the buffer has room for one
// event with its range.
func (e *Engine) decode(b []byte) (Event, bool) {
	first, rest, err := DecodeEvent(b)
	if err != nil {
		e.refuse(first, "malformed event", zap.Error(err), zap.Binary("message", b))
		return Event{}, false
	}
	for len(rest) > 0 {
		var extra Event
		extra, rest, err = DecodeEvent(rest)
		e.refuse(extra, "event behind another one", zap.Error(err), zap.Binary("message", b))
	}
	if first.FD == noFD || first.Mask != unix.FAN_PRE_ACCESS {
		e.refuse(first, "unexpected kind of event", zap.Uint64("mask", first.Mask))
		return Event{}, false
	}
	return first, true
}

// accept takes ownership of the event's descriptor and makes a request of it.
func (e *Engine) accept(ev Event) (fscache.Request, bool, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(ev.FD), &st); err != nil {
		e.refuse(ev, "event with a bad descriptor", zap.Error(err))
		return fscache.Request{}, false, nil
	}
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		_ = unix.Close(int(ev.FD)) // unanswered: the successor's, if there is one
		return fscache.Request{}, false, fscache.ErrClosed
	}
	o := e.byInode[inode{dev: st.Dev, ino: st.Ino}]
	if o == nil {
		e.mu.Unlock()
		e.refuse(ev, "event of a file that is no cache object", zap.Uint64("dev", st.Dev), zap.Uint64("inode", st.Ino))
		return fscache.Request{}, false, nil
	}
	e.token++
	r := fscache.Request{Op: fscache.OpRead, Object: o.key, Off: ev.Off, Len: ev.Len, ID: uint64(ev.FD), Token: e.token}
	if !ev.HasRange {
		r.Off, r.Len = 0, o.size
	}
	if o.quiet.Load() == nil {
		if err := o.adopt(int(ev.FD)); err != nil {
			e.log.Warn("cannot write to an object yet", zap.Error(err))
		}
	}
	e.pending[ev.FD] = pendingEvent{token: e.token}
	e.mu.Unlock()
	return r, true, nil
}

// refuse denies an event that cannot become a request, and says why.
func (e *Engine) refuse(ev Event, why string, fields ...zap.Field) {
	e.log.Error("denied a reader: "+why, append(fields, zap.Int32("pid", ev.PID), zap.Int32("fd", ev.FD))...)
	if ev.FD == noFD {
		return
	}
	if err := e.respond(ev.FD, response(fscache.EIO)); err != nil && !errors.Is(err, fscache.ErrGone) {
		e.log.Error("denying a reader", zap.Error(err))
	}
}

// Answer implements fscache.Engine.
func (e *Engine) Answer(r fscache.Request, a fscache.Errno) error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return fscache.ErrClosed
	}
	fd := int32(r.ID)
	p, ok := e.pending[fd]
	if !ok || p.token != r.Token || r.ID != uint64(fd) {
		e.mu.Unlock()
		return fmt.Errorf("event %d of %s: %w", r.ID, r.Object, fscache.ErrAnswered)
	}
	delete(e.pending, fd)
	e.room.Signal()
	e.mu.Unlock()
	return e.respond(fd, response(a))
}

// respond writes an answer and gives the event's number back.
//
// ORDER: answer before close. The kernel finds the event by number: closed first, the number could name a newer event.
func (e *Engine) respond(fd int32, response uint32) error {
	b := encodeResponse(fd, response)
	_, err := e.group.Write(b[:])
	closeErr := unix.Close(int(fd))
	switch {
	case errors.Is(err, unix.ENOENT):
		return fscache.ErrGone
	case errors.Is(err, os.ErrClosed):
		return fscache.ErrClosed
	case err != nil:
		return fmt.Errorf("answering event %d: %w", fd, err)
	case closeErr != nil:
		return fmt.Errorf("closing event %d: %w", fd, closeErr)
	}
	return nil
}
