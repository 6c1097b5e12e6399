package simkernel_test

import (
	"slices"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
)

// upgradeState is how far a hot upgrade has come.
type upgradeState int

const (
	idle      upgradeState = iota
	prepared               // the successor has its objects, and does not read
	committed              // the successor reads, the predecessor finishes
)

// reserved is below which number the successor keeps clear.
const reserved = 48

// prepare starts a successor beside the running process.
func (w *world) prepare(die int) {
	p := &process{w: w, die: die, box: newBox()}
	w.next, w.up = p, prepared
	w.run(p, func() {
		w.boxes = append(w.boxes, p.box)
		in := fscache.Inherited{Alive: true, Objects: w.main.e.Holding()}
		if err := p.start(simkernel.Config{Inherited: in, Reserve: reserved}); err != nil {
			w.fail("start of a successor: %v", err)
		}
	})
}

// abandon is the predecessor going on alone.
func (w *world) abandon() {
	if w.next != nil {
		w.next.kill()
		w.boxes = slices.DeleteFunc(w.boxes, func(b *box) bool { return b == w.next.box })
	}
	w.next, w.up = nil, idle
	if w.main != nil {
		if err := w.main.e.Thaw(); err != nil {
			w.fail("thaw: %v", err)
		}
	}
}

// commit is the pause: the predecessor stops reading, the successor begins.
func (w *world) commit() {
	old, p := w.main, w.next
	var pending []fscache.Pending
	var holding []fscache.Held
	w.run(old, func() {
		if w.mutation != oldGoesOnReading {
			if err := old.e.Freeze(); err != nil {
				w.fail("freeze: %v", err)
			}
		}
		pending, holding = old.e.Pending(), old.e.Holding()
		old.point("commit.after-freeze")
	})
	if old.dead {
		return
	}
	w.run(p, func() {
		have := p.e.Holding()
		var opened, gone []fscache.Held
		for _, h := range holding {
			if !slices.Contains(have, h) {
				opened = append(opened, h)
			}
		}
		for _, h := range have {
			if !slices.Contains(holding, h) {
				gone = append(gone, h)
			}
		}
		p.point("commit.before-expect")
		if err := p.e.Expect(pending, opened, gone); err != nil {
			w.note("commit: %v", err)
			w.abandon()
			return
		}
		w.up = committed
		p.point("commit.after-expect")
	})
}

// finish is the predecessor's end: what it has not finished by then the successor answers.
func (w *world) finish() {
	w.main.kill()
	w.inheritUpgrade()
}

// inheritUpgrade makes the successor the main process. ORDER: record, then the predecessor's inbox, then replay.
func (w *world) inheritUpgrade() {
	old, p := w.main, w.next
	w.main, w.next, w.up = p, nil, idle
	w.run(p, func() {
		p.record()
		p.point("finish.after-record")
		w.boxes = slices.DeleteFunc(w.boxes, func(b *box) bool { return b == old.box })
		p.point("finish.before-replay")
		p.e.Replay()
		p.point("finish.after-replay")
	})
}
