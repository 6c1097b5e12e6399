package simkernel

import (
	"maps"
	"slices"
	"strings"

	"holdfast/fscache"
)

// An orphan is the number under which another process read an event, and as far as is known did not answer it. What is written down
// may make several claims to it; the event is answered when what each claims is there.
type orphan struct {
	number uint64
	claims []claim
	lent   bool // the process that read it lives, and answers it
	left   int  // answers that are missing; only meaningful when queued
	queued bool
	answer fscache.Errno // the worst of those that came
}

// A claim says what an orphan may be. Without an object it may be anybody's: the process died between reading the event and writing
// down whose it is.
type claim struct {
	fscache.Pending
	message bool
}

func (f *fanProcess) claim(number uint64, p fscache.Pending, message bool) *orphan {
	o := f.orphans[number]
	if o == nil {
		o = &orphan{number: number}
		f.orphans[number] = o
	}
	o.claims = append(o.claims, claim{p, message})
	return o
}

// gather makes orphans of what a dead process left.
func (e *Engine) gather() {
	recorded := make(map[uint64]bool)
	for _, p := range e.c.Inherited.Pending {
		e.fan.claim(p.ID, p, false)
		recorded[p.ID] = true
	}
	for _, b := range e.c.Inherited.Messages {
		if p, ok := decodeEvent(b); ok && !(e.c.Unsafe.RecordsFirst && recorded[p.ID]) {
			e.fan.claim(p.ID, p, true)
		}
	}
	e.fan.unsettled = len(e.fan.orphans) > 0
}

// candidates lists what an orphan may be, as far as objects are known by now.
func (e *Engine) candidates(o *orphan) []fscache.Pending {
	var list []fscache.Pending
	add := func(k fscache.Key, c claim) {
		if _, known := e.added[k]; !known {
			return
		}
		p := fscache.Pending{Op: fscache.OpRead, Object: k, Off: c.Off, Len: c.Len, ID: o.number}
		if !slices.Contains(list, p) {
			list = append(list, p)
		}
	}
	for _, c := range o.claims {
		if c.Object.ID != "" {
			add(c.Object, c)
			continue
		}
		keys := slices.SortedFunc(maps.Keys(e.added), func(a, b fscache.Key) int { return strings.Compare(a.String(), b.String()) })
		for _, k := range keys {
			if e.k.group.marks[k] && e.added[k] > c.Off {
				add(k, c)
			}
		}
	}
	return list
}

// settle queues what orphans may be, for Next: objects that are not known by now never will be. What nobody can identify is denied.
func (e *Engine) settle() {
	if !e.fan.unsettled {
		return
	}
	e.fan.unsettled = false
	for _, number := range slices.Sorted(maps.Keys(e.fan.orphans)) {
		o := e.fan.orphans[number]
		if o.lent || o.queued {
			continue
		}
		all := e.candidates(o)
		o.queued, o.left = true, len(all)
		for _, p := range all {
			e.handout = append(e.handout, &work{Pending: p, slot: noSlot, orphan: o})
		}
		if len(all) == 0 {
			o.answer = fscache.EIO
			_ = e.end(o)
		}
	}
}

// answerOrphan takes the answer to one of the things an orphan may be.
func (e *Engine) answerOrphan(w *work, a fscache.Errno) error {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if e.closed {
		return fscache.ErrClosed
	}
	o := w.orphan
	if a != fscache.OK {
		o.answer = a
	}
	if o.left--; o.left > 0 {
		return nil
	}
	return e.end(o)
}

// end answers an orphan's event, and gives its number back. Two claims can be two events.
func (e *Engine) end(o *orphan) error {
	e.c.Point("orphan.before-answer")
	err := e.k.group.answer(o.number, o.answer, nil)
	for again := err; again == nil && len(o.claims) > 1 && e.fan.placeholders[o.number]; {
		again = e.k.group.answer(o.number, o.answer, nil)
	}
	e.c.Point("orphan.before-close")
	e.bury(o)
	return err
}

func (e *Engine) bury(o *orphan) {
	delete(e.fan.orphans, o.number)
	e.fan.leave(o.number)
}
