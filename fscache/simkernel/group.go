package simkernel

import (
	"slices"

	"holdfast/fscache"
)

// group is a fanotify pre-content group. Functions are of fs/notify/fanotify/ in 6.18.
type group struct {
	k      *Kernel
	marks  map[fscache.Key]bool
	queue  []*request // not read yet, oldest first (notification_list)
	access []*request // read and not answered, oldest first (access_list)
}

// last lets everybody on, onto whatever is in the files, when the last descriptor goes (fanotify_release answers
// FAN_ALLOW to both lists and the marks go with the group).
func (g *group) last() {
	all := slices.Concat(g.access, g.queue)
	g.access, g.queue = nil, nil
	clear(g.marks)
	for _, r := range all {
		r.finish(nil)
	}
}

// released: a process's going changes nothing for its events: they wait for somebody to write their numbers.
func (g *group) released(*Engine) {}

// mount asks nothing: metadata is read without events.
func (g *group) mount(_ *waiter, _ *mount, done func(error)) { done(nil) }

func (g *group) unmount(*mount) {}

// fetch raises one event for the range, whether or not the file holds it: a mark knows nothing of holes. ALLOW on a
// hole reads zeros.
func (g *group) fetch(w *waiter, k fscache.Key, off, n int64, done func(error)) {
	if !g.marks[k] {
		done(nil)
		return
	}
	r := &request{op: fscache.OpRead, key: k, off: off, n: n}
	r.done = func(err error) {
		w.request = nil
		done(err)
	}
	w.request = r
	g.queue = append(g.queue, r)
	g.k.changed.Broadcast()
}

// cancel (fanotify_get_response): not read yet, the event is taken back; read, it stays until it is answered, which then is
// an answer to nobody (FAN_EVENT_CANCELED).
func (g *group) cancel(w *waiter) {
	r := w.request
	if r == nil {
		return
	}
	r.done, w.request = nil, nil
	if i := slices.Index(g.queue, r); i >= 0 {
		g.queue = slices.Delete(g.queue, i, i+1)
	}
}

// read hands out the oldest event under number, the process's lowest free descriptor (create_fd). Where there is none
// (number < 0), the reader is denied (fanotify_read).
func (g *group) read(p *Engine, number int) (*request, error) {
	if len(g.queue) == 0 {
		return nil, nil
	}
	g.k.reads(p)
	r := g.queue[0]
	g.queue = g.queue[1:]
	if number < 0 {
		r.finish(errRead)
		return nil, errFiles
	}
	r.number, r.read = uint64(number), true
	g.access = append(g.access, r)
	return r, nil
}

// answer ends the oldest event with the number, whoever read it (process_access_response: first match, else ENOENT). meant is
// the request that the process has in mind; nil: whatever it is.
func (g *group) answer(number uint64, e fscache.Errno, meant *fscache.Request) error {
	i := slices.IndexFunc(g.access, func(r *request) bool { return r.number == number })
	if i < 0 {
		return fscache.ErrGone
	}
	r := g.access[i]
	g.access = slices.Delete(g.access, i, i+1)
	if r.done != nil {
		g.judge(r, e, meant)
	}
	r.finish(errnoOf(e))
	return nil
}

// judge notes answers that are wrong whether or not their reader finds out.
func (g *group) judge(r *request, e fscache.Errno, meant *fscache.Request) {
	if meant != nil && (meant.Object != r.key || meant.Off != r.off || meant.Len != r.n) {
		g.k.violation("the answer to %s %d+%d reached the reader of %s %d+%d under number %d (I2)",
			meant.Object, meant.Off, meant.Len, r.key, r.off, r.n, r.number)
	}
	if e == fscache.OK && g.k.files[r.key].hole(r.off, r.n) {
		g.k.violation("%s %d+%d was allowed onto a hole (I1, I3)", r.key, r.off, r.n)
	}
}

func (g *group) obligations() []fscache.Pending {
	var list []fscache.Pending
	for _, r := range g.access {
		if r.done != nil {
			list = append(list, fscache.Pending{Op: r.op, Object: r.key, Off: r.off, Len: r.n, ID: r.number})
		}
	}
	return list
}
