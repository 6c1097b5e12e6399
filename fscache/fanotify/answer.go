package fanotify

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/state/crash"
)

const (
	responseLen = 8  // struct fanotify_response: s32 fd, u32 response
	errnoShift  = 24 // FAN_ERRNO_SHIFT: the errno of a denial is in the top byte (Linux 6.14)
)

// denyErrno is the errno a reader of the cache file gets for each answer but OK. The kernel takes only EPERM, EIO,
// EBUSY, ETXTBSY, EAGAIN, ENOSPC and EDQUOT (fanotify_user.c, process_access_response; others are EINVAL and leave the
// reader asleep). A reader of a file in the mounted image gets EIO for all of them: EROFS hands its pages on as failed
// without saying why (fs/erofs/fileio.c).
var denyErrno = map[fscache.Errno]unix.Errno{
	fscache.EIO:    unix.EIO,
	fscache.ENOSPC: unix.ENOSPC,
	fscache.EAGAIN: unix.EAGAIN,
}

// response returns the u32 of an answer; an Errno without a row is EIO.
func response(e fscache.Errno) uint32 {
	if e == fscache.OK {
		return unix.FAN_ALLOW
	}
	errno, ok := denyErrno[e]
	if !ok {
		errno = unix.EIO
	}
	return unix.FAN_DENY | uint32(errno)<<errnoShift
}

// encodeResponse lays out struct fanotify_response.
func encodeResponse(fd int32, response uint32) (b [responseLen]byte) {
	binary.NativeEndian.PutUint32(b[0:], uint32(fd))
	binary.NativeEndian.PutUint32(b[4:], response)
	return b
}

// Answer implements fscache.Engine.
func (e *Engine) Answer(r fscache.Request, a fscache.Errno) error {
	fd := int32(r.ID)
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return fscache.ErrClosed
	}
	o := e.orphans[fd]
	p, ok := e.pending[fd]
	switch {
	case r.ID != uint64(fd):
		ok, o = false, nil
	case ok && p.token == r.Token && o != nil:
		o.behind = &behind{slot: p.slot, answer: a}
		p.token = 0
		e.pending[fd] = p
		e.mu.Unlock()
		return nil
	case ok && p.token == r.Token && !p.taken:
		p.taken = true
		e.pending[fd] = p
		e.mu.Unlock()
		return e.finish(fd, p.slot, a)
	}
	if o != nil {
		return e.answerOrphan(o, r, a)
	}
	e.mu.Unlock()
	return fmt.Errorf("event %d of %s: %w", r.ID, r.Object, fscache.ErrAnswered)
}

// finish answers an event that is taken, and lets another one in.
func (e *Engine) finish(fd int32, slot int, a fscache.Errno) error {
	err := e.respond(fd, slot, a)
	if err != nil && !errors.Is(err, fscache.ErrGone) {
		return err // the slot and the number stay taken
	}
	e.mu.Lock()
	e.inFlight--
	e.room.Signal()
	e.mu.Unlock()
	return err
}

// respond writes an answer and gives the event's slot and number back.
//
// ORDER: answer, slot, pending, number. The kernel finds the event by number: closed first, the number could name a newer event. The slot is
// free before that, so that an inbox never has two messages of one number; and not before the answer, or a successor would not know of
// it. So it is with Pending, which a successor that comes meanwhile is told.
func (e *Engine) respond(fd int32, slot int, a fscache.Errno) error {
	b := encodeResponse(fd, response(a))
	crash.Point("fanotify.answer.before-write")
	_, err := e.group.Write(b[:])
	switch {
	case err == nil:
	case errors.Is(err, unix.ENOENT):
		err = fscache.ErrGone
	default:
		return e.unanswered(fd, err)
	}
	crash.Point("fanotify.answer.before-free")
	e.free(slot)
	e.mu.Lock()
	delete(e.pending, fd)
	e.mu.Unlock()
	crash.Point("fanotify.answer.before-close")
	if closeErr := unix.Close(int(fd)); err == nil && closeErr != nil {
		err = fmt.Errorf("closing event %d: %w", fd, closeErr)
	}
	crash.Point("fanotify.answer.after-close")
	return err
}

// unanswered keeps the number of an event that the kernel may still wait for, so that no other can get it. Where the group was closed
// meanwhile there will be none.
func (e *Engine) unanswered(fd int32, err error) error {
	if errors.Is(err, os.ErrClosed) {
		_ = unix.Close(int(fd))
		return fscache.ErrClosed
	}
	return fmt.Errorf("answering event %d: %w", fd, err)
}
