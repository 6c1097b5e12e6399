package simkernel

import (
	"fmt"
	"maps"
	"slices"

	"holdfast/fscache"
)

// fanProcess is what a process that has a fanotify group has besides it: descriptors, of which only the numbers matter.
type fanProcess struct {
	used         []bool              // numbers
	quiet        map[fscache.Key]int // numbers of the descriptors that raise no events; 0: none
	unheld       []fscache.Held      // quiet ones that the supervisor has not got yet
	placeholders map[uint64]bool     // numbers kept occupied because a predecessor's events have them, or may have
	orphans      map[uint64]*orphan  // by number
	unsettled    bool                // some of them were not queued for Next yet
}

// lowest is the lowest free number; -1: the process has as many as it can (get_unused_fd_flags).
func (f *fanProcess) lowest(limit int) int {
	n := slices.Index(f.used, false)
	if n < 0 {
		n = len(f.used)
	}
	if limit > 0 && n >= limit {
		return -1
	}
	return n
}

func (f *fanProcess) occupy(n int) {
	for len(f.used) <= n {
		f.used = append(f.used, false)
	}
	f.used[n] = true
}

// open takes the lowest free number.
func (f *fanProcess) open() int {
	n := f.lowest(0)
	f.occupy(n)
	return n
}

func (f *fanProcess) close(n int) { f.used[n] = false }

// leave closes the placeholder at a number, if there is one.
func (f *fanProcess) leave(number uint64) {
	if f.placeholders[number] {
		delete(f.placeholders, number)
		f.close(int(number))
	}
}

// OpenOther is the process opening something that has nothing to do with the kernel's requests; it returns the number.
func (e *Engine) OpenOther() int {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	return e.fan.open()
}

// CloseOther closes what OpenOther opened.
func (e *Engine) CloseOther(number int) {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	e.fan.close(number)
}

// startFanotify takes over what a predecessor left.
//
// ORDER: inherited numbers are occupied, and those nobody can make sense of denied, before the first read: from then on a number
// may be that of an event of this process's.
func (e *Engine) startFanotify() {
	e.fan = fanProcess{
		quiet: make(map[fscache.Key]int), placeholders: make(map[uint64]bool), orphans: make(map[uint64]*orphan),
	}
	for range 4 { // standard input and output, the group
		e.fan.open()
	}
	if e.waits {
		for n := e.fan.lowest(0); n < e.c.Reserve; n = e.fan.lowest(0) {
			e.fan.occupy(n)
			e.fan.placeholders[uint64(n)] = true
		}
		e.adopt(e.c.Inherited.Objects)
		return
	}
	e.gather()
	for _, number := range slices.Sorted(maps.Keys(e.fan.orphans)) {
		if n := int(number); !e.c.Unsafe.NoOccupying && (n >= len(e.fan.used) || !e.fan.used[n]) {
			e.fan.occupy(n)
			e.fan.placeholders[number] = true
		}
	}
	e.c.Point("start.before-sweep")
	e.sweep()
	e.c.Point("start.after-sweep")
	e.adopt(e.c.Inherited.Objects)
}

// sweep denies every event a dead process read and nobody wrote down. The numbers are not known, so all are tried: one that no event
// has is ENOENT.
func (e *Engine) sweep() {
	for _, r := range slices.Clone(e.k.group.access) {
		if e.fan.orphans[r.number] == nil {
			_ = e.k.group.answer(r.number, fscache.EIO, nil)
		}
	}
}

func (e *Engine) adoptQuiet(h fscache.Held) {
	if e.fan.quiet[h.Object.Key] == 0 {
		e.fan.quiet[h.Object.Key] = e.fan.open()
	}
}

// watch opens an object's file and puts it under a mark. A descriptor opened before the mark raises no events; a file that has
// its mark from a predecessor gets one from it, or from an event. ORDER: the supervisor has it before there are events.
func (e *Engine) watch(o fscache.Object) error {
	k := o.Key
	e.k.mu.Lock()
	fresh := !e.k.group.marks[k] && e.fan.quiet[k] == 0
	if fresh {
		e.fan.quiet[k] = e.fan.open()
	}
	e.k.mu.Unlock()
	if fresh && e.c.Holder != nil {
		e.c.Point("add.before-hold")
		if err := e.c.Holder.Hold(fscache.Held{Object: o}); err != nil {
			return err
		}
		e.c.Point("add.after-hold")
	}
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if e.closed {
		return fscache.ErrClosed
	}
	e.k.group.marks[k] = true
	return nil
}

// unwatch undoes watch; e.k.mu is held.
func (e *Engine) unwatch(k fscache.Key) []fscache.Held {
	delete(e.k.group.marks, k)
	if n := e.fan.quiet[k]; n != 0 {
		e.fan.close(n)
	}
	delete(e.fan.quiet, k)
	return []fscache.Held{{Object: fscache.Object{Key: k, Size: e.added[k]}}}
}

// readFanotify reads one event into p, or returns nil.
func (e *Engine) readFanotify(p []byte) *work {
	p[noteAt] = 0 // an earlier event's note is not this one's
	number := e.fan.lowest(e.c.Limit)
	r, err := e.k.group.read(e, number)
	if r == nil || err != nil {
		return nil
	}
	e.fan.occupy(number)
	encodeEvent(p, r.number, r.off, r.n)
	e.c.Point("next.after-read")
	size, known := e.added[r.key]
	if !known {
		_ = e.k.group.answer(r.number, fscache.EIO, nil)
		e.fan.close(number)
		return nil
	}
	note(p, r.key)
	e.c.Point("next.after-note")
	if e.fan.quiet[r.key] == 0 { // a copy of the event's descriptor, which raises no events
		e.fan.quiet[r.key] = e.fan.open()
		e.fan.unheld = append(e.fan.unheld, fscache.Held{Object: fscache.Object{Key: r.key, Size: size}})
	}
	return &work{Pending: fscache.Pending{Op: r.op, Object: r.key, Off: r.off, Len: r.n, ID: r.number}}
}

// answerFanotify ends an event. ORDER: answer, slot, number. With the number free and the slot not, a successor could find two
// messages of one number.
func (e *Engine) answerFanotify(w *work, a fscache.Errno) error {
	e.holdQuiet()
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if e.closed {
		return fscache.ErrClosed
	}
	if e.c.Unsafe.AnswerFreed {
		e.free(w.slot)
		w.slot = noSlot
		e.c.Point("answer.freed-first")
	}
	meant := fscache.Request{Object: w.Object, Off: w.Off, Len: w.Len}
	err := e.k.group.answer(w.ID, a, &meant)
	e.c.Point("answer.after-answer")
	if e.c.Unsafe.CloseThenFree {
		e.fan.close(int(w.ID))
		e.c.Point("answer.closed-first")
		e.free(w.slot)
		return err
	}
	e.free(w.slot)
	e.c.Point("answer.after-free")
	e.fan.close(int(w.ID))
	return err
}

// holdQuiet gives the supervisor what was found with events.
func (e *Engine) holdQuiet() {
	e.k.mu.Lock()
	unheld := e.fan.unheld
	e.fan.unheld = nil
	e.k.mu.Unlock()
	for _, h := range unheld {
		if e.c.Holder != nil {
			_ = e.c.Holder.Hold(h) // without it a successor waits for an event
		}
	}
}

// expectFanotify keeps the numbers of pending events occupied, and lets the others go.
func (e *Engine) expectFanotify(pending []fscache.Pending) error {
	named := make(map[uint64]bool)
	for _, p := range pending {
		if !e.fan.placeholders[p.ID] {
			return fmt.Errorf("event number %d is not below %d, or in use here", p.ID, e.c.Reserve)
		}
		named[p.ID] = true
	}
	for _, p := range pending {
		e.fan.claim(p.ID, p, false).lent = true
	}
	for number := range e.fan.placeholders {
		if !named[number] {
			delete(e.fan.placeholders, number)
			e.fan.close(int(number))
		}
	}
	return nil
}
