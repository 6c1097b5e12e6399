package cachefiles

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/state/crash"
)

// takeOver makes the engine of an inherited device and of what came with it. Nothing polls or reads the device before it returns.
//
// ORDER: objects, copen, restore, refusals. An OPEN whose descriptor somebody holds must be answered before it can be delivered
// again: the kernel fails it with EEXIST then (cachefiles_ondemand_get_fd). And `restore` comes once, before anything polls or
// reads: two processes or threads that see requests become new again while they read free them twice on kernels before 6.9.6
// (CVE-2024-39510, CVE-2024-40899).
func (e *Engine) takeOver(c Config) error {
	if err := checkDevice(e.dev.f); err != nil {
		return err
	}
	var useless []fscache.Held
	for _, h := range c.Inherited.Objects {
		useless = append(useless, e.inherit(h)...)
	}
	if c.Inherited.Alive {
		e.adopted, e.waiting = true, true
		return nil
	}
	for _, h := range useless {
		e.dropHeld(h)
	}
	left := e.inFlight(c.Inherited)
	crash.Point("cachefiles.takeover.before-copen")
	lost, err := e.answerInherited(left)
	if err != nil {
		return err
	}
	crash.Point("cachefiles.takeover.before-restore")
	err = command(e.dev.f, "restore")
	crash.Point("cachefiles.takeover.after-restore")
	if err == nil {
		e.adopted = true
		e.forgetUnattached(left)
		return nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	// The kernel has no `restore` (before 6.8), or no cache is bound.
	err = bind(e.dev.f, c)
	if !errors.Is(err, unix.EBUSY) {
		e.fresh = err == nil
		return err
	}
	e.adopted = true
	e.replayWithoutRestore(left, lost)
	return nil
}

// checkDevice refuses a descriptor that is not the device. The name alone may be that of another mount namespace.
func checkDevice(f *os.File) error {
	return control(f, func(fd int) error {
		link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
		if err != nil || filepath.Base(link) != filepath.Base(devicePath) {
			return fmt.Errorf("inherited fd %d is %q, not %s (%v)", fd, link, devicePath, err)
		}
		return nil
	})
}

// inherit takes a descriptor of an object that a predecessor had open, and returns those that are of no use, closed: what cannot be one,
// and of two of one object the older, with which the kernel is done: an object is looked up anew only after it was dropped.
// e.mu is held, or nobody else is there.
func (e *Engine) inherit(held fscache.Held) (useless []fscache.Held) {
	o := e.objects[held.Object.Key]
	err := errors.Join(checkObject(held.Object), checkAnon(held.File))
	switch {
	case err == nil && held.Handle == 0:
		err = errors.New("it has no object id")
	case err == nil && o != nil && o.size != held.Object.Size:
		err = fmt.Errorf("another has %d bytes, this one %d", o.size, held.Object.Size)
	}
	if err != nil {
		e.log.Error("inherited descriptor of an object is not used: the kernel opens the object again, or its readers get EIO",
			zap.Stringer("object", held.Object.Key), zap.Uint32("id", held.Handle), zap.Error(err))
		_ = held.File.Close()
		return []fscache.Held{held}
	}
	if o == nil {
		o = &object{key: held.Object.Key, size: held.Object.Size}
		o.file.used = true
		e.objects[o.key] = o
	}
	if old := o.handle; old != nil {
		if old.id >= held.Handle {
			_ = held.File.Close()
			return []fscache.Held{held}
		}
		e.release(old)
		useless = []fscache.Held{old.asHeld(nil)}
	}
	h := &handle{id: held.Handle, object: o, f: held.File, inherited: true}
	h.opened.Store(true)
	h.held.Store(true)
	o.handle = h
	e.handles[h.id] = h
	return useless
}

// checkAnon refuses a descriptor that is not an object's.
func checkAnon(f *os.File) error {
	return control(f, func(fd int) error {
		if link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil || link != anonName {
			return fmt.Errorf("fd %d is %q, not a cachefiles object (%v)", fd, link, err)
		}
		return nil
	})
}

// inFlight merges what the predecessors' inboxes and the records say into one message for each request, in the order of message
// ids. A message says more than a record.
func (e *Engine) inFlight(in fscache.Inherited) []Message {
	type name struct{ id, opcode uint32 }
	all := make(map[name]Message)
	for _, p := range in.Pending {
		if m, ok := e.recorded(p); ok {
			all[name{m.ID, m.Opcode}] = m
		}
	}
	for _, b := range in.Messages {
		m, err := decodeSlot(b)
		if err != nil {
			e.log.Error("a predecessor's inbox has what is no request", zap.Error(err))
			continue
		}
		all[name{m.ID, m.Opcode}] = m
	}
	left := make([]Message, 0, len(all))
	for _, m := range all {
		left = append(left, m)
	}
	slices.SortFunc(left, func(a, b Message) int { return cmp.Compare(a.ID, b.ID) })
	return left
}

// decodeSlot decodes the message at the beginning of a slot, which may be longer.
func decodeSlot(b []byte) (Message, error) {
	if len(b) >= msgLen {
		b = b[:min(len(b), int(messageLength(b)))]
	}
	return DecodeMessage(b)
}

// recorded makes the message of a record. false: it cannot be of a request of this kernel's.
func (e *Engine) recorded(p fscache.Pending) (Message, bool) {
	m := Message{ID: uint32(p.ID), ObjectID: p.Handle}
	switch p.Op {
	case fscache.OpOpen:
		m.Opcode = CACHEFILES_OP_OPEN
		m.Open = OpenBody{Volume: volumePrefix + volumeOf(p.Object.Domain), Cookie: p.Object.ID}
	case fscache.OpClose:
		m.Opcode = CACHEFILES_OP_CLOSE
	case fscache.OpRead:
		m.Opcode, m.Read = CACHEFILES_OP_READ, ReadBody{Off: p.Off, Len: p.Len}
	}
	// The same checks as for what the kernel wrote.
	decoded, err := DecodeMessage(encode(m))
	if err != nil || p.ID > math.MaxUint32 || p.Op < fscache.OpOpen || p.Op > fscache.OpClose {
		e.log.Error("a record of a request makes no sense", zap.Stringer("op", p.Op), zap.Uint64("request", p.ID),
			zap.Stringer("object", p.Object), zap.Error(err))
		return Message{}, false
	}
	return decoded, true
}

// answerInherited answers the OPENs whose objects' descriptors were inherited, and finishes the CLOSEs. It returns the OPENs whose
// descriptors are gone.
func (e *Engine) answerInherited(left []Message) (lost []Message, err error) {
	for _, m := range left {
		h := e.handles[m.ObjectID]
		switch {
		case m.Opcode == CACHEFILES_OP_CLOSE && h != nil:
			// The kernel took it for done when it was read.
			e.release(h)
			e.drop(h)
		case m.Opcode == CACHEFILES_OP_OPEN && h == nil:
			lost = append(lost, m)
		case m.Opcode == CACHEFILES_OP_OPEN:
			if err := e.copenInherited(m, h); err != nil {
				return nil, err
			}
			crash.Point("cachefiles.takeover.after-copen")
		}
	}
	return lost, nil
}

// copenInherited answers an OPEN with the size on record. ErrGone, which is no error here, means that the predecessor had answered it.
func (e *Engine) copenInherited(m Message, h *handle) error {
	size := h.object.size
	if m.Open.Volume != volumePrefix+volumeOf(h.object.key.Domain) || m.Open.Cookie != h.object.key.ID {
		e.log.Error("the record of an open object is of another object: its open is refused", zap.Stringer("record", h.object.key),
			zap.String("volume", m.Open.Volume), zap.String("cookie", m.Open.Cookie), zap.Uint32("id", h.id))
		size = -int64(unix.EIO)
	}
	err := e.copen(m.ID, size)
	if size < 0 {
		e.release(h)
		e.drop(h)
	}
	if errors.Is(err, unix.EOPNOTSUPP) { // no cache is bound: it is not this device's
		return nil
	}
	if err != nil && !errors.Is(err, fscache.ErrGone) {
		return fmt.Errorf("answering an inherited open of %s: %w", h.object.key, err)
	}
	return nil
}

// forgetUnattached lets go of inherited descriptors whose objects have no file, but for those just opened. If an open of one is
// still pending and nobody knows, `restore` delivers it again, which works only when nobody holds its descriptor; if the kernel has
// dropped the object nothing is lost; and one that was opened a moment before the predecessor died is opened again when it is read.
func (e *Engine) forgetUnattached(left []Message) {
	opening := make(map[uint32]bool)
	for _, m := range left {
		if m.Opcode == CACHEFILES_OP_OPEN {
			opening[m.ObjectID] = true
		}
	}
	for id, h := range e.handles {
		if !opening[id] && !h.attached() {
			e.log.Info("an inherited object has no file: its descriptor is let go", zap.Stringer("object", h.object.key), zap.Uint32("id", id))
			e.release(h)
			e.drop(h)
		}
	}
}

// replayWithoutRestore does for a kernel before 6.8 what `restore` does: the READs go to Next, and are completed through their
// objects' descriptors. The rest nobody can serve, and it is said which.
func (e *Engine) replayWithoutRestore(left, lost []Message) {
	for _, m := range lost {
		// Its descriptor went with the process, and this kernel makes another only for another request.
		e.log.Error("an open was read by a process that died, and the object's descriptor is gone: it is refused, its mount fails or its readers get EIO",
			zap.String("volume", m.Open.Volume), zap.String("cookie", m.Open.Cookie), zap.Uint32("request", m.ID))
		if err := e.copen(m.ID, -int64(unix.EIO)); err != nil && !errors.Is(err, fscache.ErrGone) {
			e.log.Error("refusing an inherited open", zap.Uint32("request", m.ID), zap.Error(err))
		}
		crash.Point("cachefiles.takeover.after-refuse")
	}
	reads := 0
	for _, m := range left {
		if m.Opcode != CACHEFILES_OP_READ {
			continue
		}
		h := e.handles[m.ObjectID]
		if h == nil {
			e.log.Error("a read was left by a process that died, and the object's descriptor is gone: its reader got EIO, as does every later one until the image is mounted anew",
				zap.Uint32("request", m.ID), zap.Uint32("id", m.ObjectID), zap.Int64("offset", m.Read.Off), zap.Int64("length", m.Read.Len))
			continue
		}
		e.enqueue(m, h)
		reads++
	}
	e.log.Info("the kernel cannot deliver again what the last process left unanswered (restore: Linux 6.8): it is answered from the record",
		zap.Int("reads", reads))
}

// A queued is a request for Next that the kernel does not deliver again.
type queued struct {
	m      Message
	handle *handle
	slot   int
}

// enqueue hands a request to Next. It goes into this process's inbox too, if there is room: whoever comes after us finds it there,
// and else in the records. e.mu is held, or nobody else is there.
func (e *Engine) enqueue(m Message, h *handle) {
	q := queued{m: m, handle: h, slot: noSlot}
	if e.dev.inbox != nil {
		if slot, p, ok := e.dev.inbox.Take(); ok {
			copy(p, encode(m))
			q.slot = slot
		}
	}
	e.queue = append(e.queue, q)
}
