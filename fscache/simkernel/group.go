package simkernel

import (
	"context"
	"slices"

	"holdfast/fscache"
)

// group is a fanotify pre-content group (fs/notify/fanotify/fanotify_user.c).
type group struct {
	k      *Kernel
	marks  map[fscache.Key]bool
	queue  []*request // not read yet, oldest first (notification_list)
	access []*request // read and not answered, oldest first (access_list)
}

// opened sweeps the numbers a predecessor read events under, as the engine does: it cannot know them.
func (g *group) opened(p *Engine) {
	for len(g.access) > 0 {
		_ = g.answer(p, g.access[0].number, fscache.EIO)
	}
}

// closed lets everybody on, onto whatever is in the files, when the last descriptor goes (fanotify_release answers
// FAN_ALLOW to both lists and the marks go with the group).
func (g *group) closed(_ *Engine, last bool) {
	if !last {
		return
	}
	for _, r := range slices.Concat(g.access, g.queue) {
		r.done <- nil
	}
	g.access, g.queue = nil, nil
	clear(g.marks)
}

// add marks a file. A descriptor opened before the mark raises no events; a file that has its mark from a predecessor
// has none of ours until an event brings one.
func (g *group) add(p *Engine, k fscache.Key) {
	if !g.marks[k] {
		p.quiet[k] = true
	}
	g.marks[k] = true
}

func (g *group) complete(k fscache.Key) { delete(g.marks, k) }

func (g *group) writable(p *Engine, k fscache.Key) bool { return p.quiet[k] }

// mount asks nothing: metadata is read without events.
func (g *group) mount(context.Context, *mount) error { return nil }

func (g *group) unmount(*mount) {}

// fetch raises one event for the range, whether or not the file holds it: a mark knows nothing of holes. ALLOW on a
// hole reads zeros.
func (g *group) fetch(ctx context.Context, k fscache.Key, off, n int64) error {
	if !g.marks[k] {
		return nil
	}
	r := newRequest(fscache.OpRead, k, off, n)
	g.queue = append(g.queue, r)
	err, killed := g.k.wait(ctx, r)
	if !killed {
		return err
	}
	// fanotify_get_response: not read yet, it is taken back; read, it stays until it is answered, which then is an answer
	// to nobody (FAN_EVENT_CANCELED).
	if i := slices.Index(g.queue, r); i >= 0 {
		g.queue = slices.Delete(g.queue, i, i+1)
	}
	return err
}

// next reads one event; its number is the process's lowest free descriptor (get_unused_fd_flags).
func (g *group) next(p *Engine) *request {
	if len(g.queue) == 0 {
		return nil
	}
	r := g.queue[0]
	g.queue = g.queue[1:]
	r.number, r.read = p.lowestFree(), true
	g.access = append(g.access, r)
	p.quiet[r.key] = true
	return r
}

// answer ends the oldest event with the number, whoever read it (process_access_response: first match, else ENOENT).
func (g *group) answer(_ *Engine, number uint64, e fscache.Errno) error {
	i := slices.IndexFunc(g.access, func(r *request) bool { return r.number == number })
	if i < 0 {
		return fscache.ErrGone
	}
	r := g.access[i]
	g.access = slices.Delete(g.access, i, i+1)
	r.done <- errnoOf(e)
	return nil
}
