package simkernel_test

import (
	"fmt"
	"slices"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
)

// actions are what can happen in a world, by name. Those that cannot happen now do nothing.
var actions = []struct {
	name string
	do   func(w *world)
}{
	{"read", (*world).actRead},
	{"read more", (*world).actRead},
	{"take", (*world).actTake},
	{"take more", (*world).actTake},
	{"step", (*world).actStep},
	{"step more", (*world).actStep},
	{"step again", (*world).actStep},
	{"record", (*world).actRecord},
	{"kill reader", (*world).actKillReader},
	{"crash", (*world).actCrash},
	{"crash within", (*world).actCrashWithin},
	{"restart", (*world).actRestart},
	{"restart soon", (*world).actRestart},
	{"upgrade", (*world).actUpgrade},
	{"upgrade on", (*world).actUpgrade},
	{"abandon upgrade", (*world).actAbandon},
	{"mount", (*world).actMount},
	{"unmount", (*world).actUnmount},
	{"other descriptor", (*world).actDescriptor},
	{"source", (*world).actSource},
	{"break source", (*world).actBreak},
	{"store", (*world).actStore},
}

// act lets one thing happen, and looks at what came of it.
func (w *world) act(i int) {
	if w.tracing {
		w.note("-- %s", actions[i].name)
	}
	actions[i].do(w)
	w.check()
}

// pick chooses from a list that is not empty.
func pickFrom[T any](w *world, what string, list []T) T { return list[w.choose.pick(what, len(list))] }

func (w *world) actRead() {
	var on []*image
	for _, im := range w.images {
		if im.state == mountedOn {
			on = append(on, im)
		}
	}
	if len(on) == 0 || len(w.readers) >= 8 {
		return
	}
	im := pickFrom(w, "image", on)
	key := pickFrom(w, "blob", im.m.Blobs).Key
	off := int64(w.choose.pick("offset", blobPages))
	n := 1 + int64(w.choose.pick("length", int(min(4, blobPages-off))))
	r := &reader{key: key, p: make([]byte, n*page), off: off * page, im: im}
	var err error
	if r.Reader, err = w.k.StartRead(im.m.Dir, key, r.p, r.off); err != nil {
		w.fail("read: %v", err)
	}
	w.readers = append(w.readers, r)
	w.note("reader of %s at %d+%d", key, off, n)
}

func (w *world) actKillReader() {
	if len(w.readers) == 0 {
		return
	}
	r := pickFrom(w, "reader", w.readers)
	r.killed = true
	r.Kill()
}

// processes are those that can do something.
func (w *world) processes() (list []*process) {
	for _, p := range []*process{w.main, w.next} {
		if p != nil {
			list = append(list, p)
		}
	}
	return list
}

func (w *world) actTake() {
	if list := w.processes(); len(list) > 0 {
		p := pickFrom(w, "process", list)
		w.run(p, p.take)
	}
}

func (w *world) actStep() {
	var busy []*process
	for _, p := range w.processes() {
		if len(p.jobs) > 0 {
			busy = append(busy, p)
		}
	}
	if len(busy) > 0 {
		p := pickFrom(w, "process", busy)
		j := pickFrom(w, "job", p.jobs)
		w.run(p, func() { p.step(j) })
	}
}

// actRecord is the write-behind, which rests during an upgrade: the predecessor has closed its databases.
func (w *world) actRecord() {
	if w.main != nil && w.up != committed {
		w.run(w.main, w.main.record)
	}
}

func (w *world) actCrash() {
	if list := w.processes(); len(list) > 0 {
		w.died(pickFrom(w, "process", list))
	}
}

const steps = 12

func (w *world) actCrashWithin() {
	if list := w.processes(); len(list) > 0 {
		pickFrom(w, "process", list).die = 1 + w.choose.pick("steps", steps)
	}
}

// drawDeath is at which of its first steps a new process dies; 0, mostly: at none.
func (w *world) drawDeath() int {
	if w.choose.pick("dies at once", 4) < 3 {
		return 0
	}
	return 1 + w.choose.pick("steps", 2*steps)
}

func (w *world) actRestart() {
	if w.main == nil {
		w.restart(w.drawDeath())
	}
}

func (w *world) actUpgrade() {
	switch {
	case w.main == nil:
	case w.up == idle:
		w.prepare(w.drawDeath())
	case w.up == prepared:
		w.commit()
	case len(w.main.jobs) == 0 || w.choose.pick("deadline", 3) == 2:
		w.finish()
	}
}

func (w *world) actAbandon() {
	if w.up == prepared && w.choose.pick("really", 3) == 2 {
		w.abandon()
	}
}

func (w *world) actMount() {
	i := slices.IndexFunc(w.images, func(im *image) bool { return im.state == unmounted })
	if i < 0 || w.main == nil || w.up != idle {
		return
	}
	im := w.images[i]
	im.state = mounting
	err := w.main.e.StartMount(im.m, func(err error) {
		im.state = mountedOn
		if err != nil {
			im.state, im.failed = unmounted, err
		}
	})
	if err != nil {
		w.fail("mount: %v", err)
	}
}

func (w *world) actUnmount() {
	i := slices.IndexFunc(w.images, func(im *image) bool { return im.state == mountedOn })
	if i < 0 || w.main == nil || w.choose.pick("really", 3) < 2 {
		return
	}
	im := w.images[i]
	if slices.ContainsFunc(w.readers, func(r *reader) bool { return r.im == im }) {
		return
	}
	if err := w.main.e.Unmount(ctx, im.m.Dir); err != nil {
		w.fail("unmount: %v", err)
	}
	im.state = unmounted
}

func (w *world) actDescriptor() {
	if w.main != nil && w.mode == simkernel.Fanotify {
		w.main.other(w.choose.pick("other", 2) == 1)
	}
}

// other opens something that has nothing to do with the kernel, or closes the last such thing.
func (p *process) other(shut bool) {
	if n := len(p.others); shut && n > 0 {
		p.e.CloseOther(p.others[n-1])
		p.others = p.others[:n-1]
	} else if n < 4 {
		p.others = append(p.others, p.e.OpenOther())
	}
}

func (w *world) actSource() { w.down = !w.down && w.choose.pick("down", 2) == 1 }

// actBreak makes a range unreadable for good: its readers, and no others, may get errors.
func (w *world) actBreak() {
	if len(w.broken) > 1 || w.choose.pick("really", 4) < 3 {
		return
	}
	off := int64(w.choose.pick("offset", blobPages)) * page
	w.broken = append(w.broken, brokenRange{w.images[0].m.Blobs[w.choose.pick("blob", 2)].Key, off, off + page})
}

// actStore is what a supervisor does to descriptors: it closes removed ones late, and it loses one, where the kernel can do without.
func (w *world) actStore() {
	switch w.choose.pick("fault", 4) {
	case 0:
		w.flushStore()
	case 1:
		w.slowStore = !w.slowStore
	case 2: // given back twice
		if len(w.store) > 0 {
			s := pickFrom(w, "entry", w.store)
			if w.k.Keep(s.held) == nil {
				w.store = append(w.store, s)
			}
		}
	default:
		if len(w.store) > 0 && w.mode == simkernel.Cachefiles {
			s := pickFrom(w, "entry", w.store)
			i := slices.Index(w.store, s)
			w.store = slices.Delete(w.store, i, i+1)
			w.k.Let(s.held)
		}
	}
}

func (w *world) flushStore() {
	closing := w.closing
	w.closing = nil
	for _, h := range closing {
		w.k.Let(h)
	}
}

// settle takes all faults away and looks whether everybody ends (liveness).
func (w *world) settle() {
	w.note("-- settle")
	w.down, w.slowStore = false, false
	w.flushStore()
	for range 4000 {
		if w.quiet() {
			return
		}
		switch {
		case w.main == nil:
			w.restart(0)
		case w.up == prepared:
			w.abandon()
		case w.up == committed && len(w.main.jobs) == 0:
			w.finish()
		default:
			for _, p := range w.processes() {
				p.die = 0
				w.run(p, p.take)
				for _, j := range slices.Clone(p.jobs) {
					w.run(p, func() { p.step(j) })
				}
			}
		}
		w.check()
	}
	what := fmt.Sprintf("%d readers", len(w.readers))
	for _, im := range w.images {
		if im.state == mounting {
			what += ", the mount of " + im.m.Bootstrap.Key.ID
		}
	}
	w.fail("with a working source nobody lets go: %s; the kernel waits for %+v", what, w.k.Obligations())
}

func (w *world) quiet() bool {
	return len(w.readers) == 0 && w.up == idle && !slices.ContainsFunc(w.images, func(im *image) bool { return im.state == mounting })
}

// start mounts the first image.
func (w *world) start() {
	w.restart(0)
	w.actMount()
	for w.images[0].state == mounting {
		w.run(w.main, w.main.take)
		for _, j := range slices.Clone(w.main.jobs) {
			w.run(w.main, func() { w.main.step(j) })
		}
	}
}

var _ fscache.Holder = (*process)(nil)
