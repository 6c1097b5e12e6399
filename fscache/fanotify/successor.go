package fanotify

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/state/crash"
)

// Pending implements fscache.Successor. Of events that other processes left it lists whatever they may be, as far as the objects were added:
// once all are, nothing but this list is needed of the inboxes they came from.
func (e *Engine) Pending() []fscache.Pending {
	e.mu.Lock()
	defer e.mu.Unlock()
	list := make([]fscache.Pending, 0, len(e.pending)+len(e.orphans))
	for fd, p := range e.pending {
		list = append(list, fscache.Pending{Op: fscache.OpRead, Object: p.object.key, Off: p.off, Len: p.len, ID: uint64(fd)})
	}
	for _, o := range e.orphans {
		reads := o.reads
		if o.done == nil {
			var wrong string
			if reads, wrong = e.candidates(o); wrong == "" && len(reads) == 0 {
				reads = e.anything(o)
			}
		}
		// All of them, also those that were answered: the event is not, and no answer but the worst will do for it.
		for _, r := range reads {
			list = append(list, fscache.Pending{Op: r.Op, Object: r.Object, Off: r.Off, Len: r.Len, ID: r.ID})
		}
	}
	return list
}

// anything stands for an orphan whose bytes are all there, whatever it is: a read of any object will do for it to be on record until it is answered,
// and be allowed by a successor that finds the record. mu is held.
func (e *Engine) anything(o *orphan) []fscache.Request {
	for _, obj := range e.objects {
		return []fscache.Request{{Op: fscache.OpRead, Object: obj.key, Off: 0, Len: fscache.BlockSize, ID: uint64(o.number)}}
	}
	return nil
}

// Holding implements fscache.Successor. Of a complete object a successor opens the file itself.
func (e *Engine) Holding() []fscache.Held {
	e.mu.Lock()
	objects := slices.Collect(maps.Values(e.objects))
	e.mu.Unlock()
	list := make([]fscache.Held, 0, len(objects))
	for _, o := range objects {
		// Without changing, which is held while the supervisor works: the predecessor of an upgrade asks while nobody reads.
		if o.held.Load() && !o.gone.Load() {
			list = append(list, fscache.Held{Object: o.object(), File: o.quiet.Load()})
		}
	}
	return list
}

// Expect implements fscache.Successor. A number that was not reserved must be in use: what has it is then trusted to keep it, and if it does
// not, the event of ours that gets it waits for the predecessor's. Objects in opened are to be added before the first Next.
func (e *Engine) Expect(pending []fscache.Pending, opened, gone []fscache.Held) error {
	orphans := make(map[int32]*orphan)
	err := e.expectable(pending, orphans)
	if err != nil {
		closeHeld(opened)
		return fmt.Errorf("taking over from a running process: %w", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed || !e.alive {
		closeHeld(opened)
		return errors.New("taking over from a running process: none is there, or it was done before")
	}
	for _, h := range opened {
		if old := e.adoptable[h.Object.Key]; old != nil {
			_ = old.Close()
		}
		e.adoptable[h.Object.Key] = h.File
	}
	for _, h := range gone {
		if f := e.adoptable[h.Object.Key]; f != nil {
			_ = f.Close()
			delete(e.adoptable, h.Object.Key)
		}
	}
	for n, o := range orphans {
		o.lent = true
		o.placed = e.reserved.give(n)
	}
	e.orphans, e.alive = orphans, false
	crash.Point("fanotify.expect.before-release")
	// Ends by itself; closeFiles waits for it. The first reads need not wait until all is given back: they get higher numbers.
	e.background.Go(e.reserved.Release)
	return nil
}

// expectable makes orphans of what the predecessor has, or says which number this process cannot keep clear of.
func (e *Engine) expectable(pending []fscache.Pending, orphans map[int32]*orphan) error {
	for _, p := range pending {
		n, err := number(p)
		if err != nil {
			return err
		}
		if !e.reserved.keeps(n) && !inUse(n) {
			return fmt.Errorf("event number %d of %s is not reserved here: reserve more", n, p.Object)
		}
		claimNumber(orphans, n, claim{key: p.Object, off: p.Off, len: p.Len})
	}
	return nil
}

func closeHeld(list []fscache.Held) {
	for _, h := range list {
		_ = h.File.Close()
	}
}

// Finished implements fscache.Successor.
func (e *Engine) Finished(id uint64) {
	e.mu.Lock()
	n := int32(id)
	o := e.orphans[n]
	expected := o != nil && o.lent && id == uint64(n)
	e.mu.Unlock()
	if expected {
		e.bury(o)
	}
}

// Replay implements fscache.Successor.
func (e *Engine) Replay() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, o := range e.orphans {
		o.lent = false
	}
	e.unsettled = len(e.orphans) > 0
	for _, o := range e.objects {
		if f := o.quiet.Load(); f != nil {
			e.endLeases([]fscache.Held{{Object: o.object(), File: f}})
		}
	}
	if err := e.wake(); err != nil && !errors.Is(err, os.ErrClosed) {
		e.log.Error("handing out what a predecessor did not finish", zap.Error(err))
	}
}

// Thaw implements fscache.Successor.
func (e *Engine) Thaw() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return fscache.ErrClosed
	}
	e.frozen = false
	if err := e.group.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("reading the fanotify group again: %w", err)
	}
	return nil
}
