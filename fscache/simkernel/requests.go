package simkernel

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"

	"holdfast/fscache"
)

// Next implements fscache.Engine.
func (e *Engine) Next() (fscache.Request, error) {
	for {
		e.k.mu.Lock()
		for !e.frozen && !e.ready() {
			e.k.changed.Wait()
		}
		e.k.mu.Unlock()
		if r, ok, err := e.TryNext(); ok || err != nil {
			return r, err
		}
	}
}

// ready says whether TryNext would find something to look at. e.k.mu is held.
func (e *Engine) ready() bool {
	switch {
	case e.waits:
		return true
	case len(e.handout) > 0, e.fan.unsettled:
		return true
	case e.k.device != nil:
		return slices.ContainsFunc(e.k.device.requests, func(r *request) bool {
			return !r.read && (r.op != fscache.OpRead || r.object.state != objectReopening) // cachefiles_ondemand_is_reopening_read
		})
	}
	return len(e.k.group.queue) > 0
}

// TryNext is Next, but returns false instead of waiting.
func (e *Engine) TryNext() (fscache.Request, bool, error) {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	switch {
	case e.frozen:
		return fscache.Request{}, false, fscache.ErrClosed
	case e.waits:
		return fscache.Request{}, false, errEarly
	}
	e.settle()
	if len(e.handout) > 0 {
		w := e.handout[0]
		e.handout = e.handout[1:]
		return e.request(w), true, nil
	}
	slot, p, ok := e.lend()
	if !ok {
		return fscache.Request{}, false, nil // what is pending stays in the kernel until a slot is free
	}
	e.c.Point("next.before-read")
	var w *work
	if e.k.device != nil {
		w = e.readCachefiles(p)
	} else {
		w = e.readFanotify(p)
	}
	if w == nil {
		e.free(slot)
		return fscache.Request{}, false, nil
	}
	w.slot = slot
	return e.request(w), true, nil
}

// request is what the daemon gets of a work.
func (e *Engine) request(w *work) fscache.Request {
	e.token++
	e.pending[e.token] = w
	return fscache.Request{Op: w.Op, Object: w.Object, Off: w.Off, Len: w.Len, ID: w.ID, Token: e.token}
}

// lend takes a slot for the kernel to write to.
func (e *Engine) lend() (slot int, p []byte, ok bool) {
	if e.c.Inbox == nil {
		return noSlot, make([]byte, messageSize), true
	}
	return e.c.Inbox.Take()
}

func (e *Engine) free(slot int) {
	if slot != noSlot {
		e.c.Inbox.Free(slot)
	}
}

// take finds what a request of the daemon's stands for, and forgets it.
func (e *Engine) take(r fscache.Request) (*work, error) {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if e.closed {
		return nil, fscache.ErrClosed
	}
	w := e.pending[r.Token]
	if w == nil || w.ID != r.ID || w.Op != r.Op {
		return nil, fmt.Errorf("request %d of %s: %w", r.ID, r.Object, fscache.ErrAnswered)
	}
	delete(e.pending, r.Token)
	return w, nil
}

// Answer implements fscache.Engine.
func (e *Engine) Answer(r fscache.Request, a fscache.Errno) error {
	w, err := e.take(r)
	if err != nil {
		return err
	}
	switch {
	case w.orphan != nil:
		return e.answerOrphan(w, a)
	case e.k.group != nil:
		return e.answerFanotify(w, a)
	}
	return e.answerCachefiles(w, a)
}

// Pending implements fscache.Successor. Of an event that another process left it lists whatever it may be.
func (e *Engine) Pending() []fscache.Pending {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	var list []fscache.Pending
	for _, token := range slices.Sorted(maps.Keys(e.pending)) {
		if w := e.pending[token]; w.orphan == nil {
			list = append(list, w.Pending)
		}
	}
	for _, w := range e.handout {
		if w.orphan == nil {
			list = append(list, w.Pending)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(e.expected)) {
		list = append(list, e.expected[id].Pending)
	}
	for _, number := range slices.Sorted(maps.Keys(e.fan.orphans)) {
		list = append(list, e.candidates(e.fan.orphans[number])...)
	}
	return list
}

// Holding implements fscache.Successor.
func (e *Engine) Holding() []fscache.Held {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	var list []fscache.Held
	for _, id := range slices.Sorted(maps.Keys(e.cache.handles)) {
		list = append(list, fscache.Held{Object: e.cache.objects[id], Handle: id})
	}
	for k := range e.fan.quiet {
		list = append(list, fscache.Held{Object: fscache.Object{Key: k, Size: e.k.files[k].size}})
	}
	slices.SortFunc(list, func(a, b fscache.Held) int {
		return cmp.Or(cmp.Compare(a.Handle, b.Handle), cmp.Compare(a.Object.Key.String(), b.Object.Key.String()))
	})
	return list
}

var (
	errExpected = errors.New("no upgrade is going on")
	errEarly    = errors.New("reading requests while the predecessor does: Expect comes first")
)

// Expect implements fscache.Successor.
func (e *Engine) Expect(pending []fscache.Pending, opened []fscache.Held, gone []fscache.Held) error {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	switch {
	case e.closed:
		return fscache.ErrClosed
	case !e.waits:
		return errExpected
	}
	if e.k.group != nil {
		if err := e.expectFanotify(pending); err != nil {
			return err
		}
	} else {
		for _, p := range pending {
			e.expected[p.ID] = &work{Pending: p, slot: noSlot, lent: true}
		}
	}
	e.adopt(opened)
	for _, h := range gone {
		e.release(h.Handle)
	}
	e.waits = false
	e.k.changed.Broadcast()
	return nil
}

// Finished implements fscache.Successor.
func (e *Engine) Finished(id uint64) {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	delete(e.expected, id)
	if o := e.fan.orphans[id]; o != nil && o.lent {
		e.bury(o)
	}
}

// Replay implements fscache.Successor.
func (e *Engine) Replay() {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(e.expected)) {
		e.handout = append(e.handout, e.expected[id])
	}
	clear(e.expected)
	for _, o := range e.fan.orphans {
		o.lent = false
	}
	e.fan.unsettled = len(e.fan.orphans) > 0
	e.k.changed.Broadcast()
}
