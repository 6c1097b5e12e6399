package daemon

import (
	"context"
	"errors"
	"slices"
	"time"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/state/crash"
)

// cullStep is how much of a mounted object is culled at a time, in bytes.
const cullStep = 64 << 20

// errPartsCulled is why a prefetch did not leave everything there.
var errPartsCulled = errors.New("parts of it were culled again, for want of room: holdfast prefetch fetches them, and what it was asked for is not culled")

// cullParts makes holes of chunks of mounted objects that no reader was ever told of, in objects that were read least recently first, until it is
// enough. After each step it calls culled with how long that took.
//
// A chunk that a reader was told of stays: between the answer and the reader's copy of the bytes nobody can tell that a hole must not be made,
// and it would read zeros (I1). So does what another process put there, for nobody knows whom that one told, and what somebody asked for with
// holdfast prefetch.
func (d *Daemon) cullParts(ctx context.Context, list []candidate, want func(candidate) bool, enough func() bool, culled func(took time.Duration)) {
	if !d.cullsParts {
		return
	}
	type part struct {
		*candidate
		o *object
	}
	var parts []part
	for i := range list {
		c := &list[i]
		o := d.objects.get(keyOf(c.Object))
		if o != nil && want(*c) {
			parts = append(parts, part{c, o})
		}
	}
	slices.SortStableFunc(parts, func(a, b part) int { return a.o.readLast().Compare(b.o.readLast()) })
	for _, p := range parts {
		for ctx.Err() == nil && !enough() {
			began := time.Now()
			if !d.cullPart(p.o) {
				break
			}
			p.bytes = d.usage(p.Object)
			culled(time.Since(began))
		}
	}
}

// hurried reports whether somebody asked for all of an object with holdfast prefetch: of this process, which began at began, or, as far as is on
// record, of another.
func (t *mounts) hurried(o *object, began time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, m := range t.byDir {
		if !m.ready { // its blobs are somebody else's now
			if m.hurried.Load() {
				return true
			}
			continue
		}
		asked := m.hurried.Load() || m.record.Prefetch && m.record.PrefetchBPS == 0 && m.record.Created.Before(began)
		if asked && slices.ContainsFunc(m.blobs, func(h *hold) bool { return h.o == o }) {
			return true
		}
	}
	return false
}

// cullPart makes one step of holes in a mounted object, and says whether that made room.
//
// ORDER: absent first, and on their way, so that readers who come meanwhile wait; holes then; and free to be fetched last. A process that dies in
// between leaves chunks that are there or are not, as the next one finds by looking at the file.
func (d *Daemon) cullPart(o *object) bool {
	d.culling.Lock()
	defer d.culling.Unlock()
	if d.succession.under.Load() || d.unsettled.Load() || d.mounts.hurried(o, d.started) {
		return false
	}
	spans, bytes := o.retract(cullStep)
	if len(spans) == 0 {
		return false
	}
	var failed error
	for _, s := range spans {
		crash.Point("daemon.parts.before-drop")
		if err := d.engine.Drop(o.key, o.extent(s)); err != nil && !errors.Is(err, fscache.ErrUnknown) { // unmounted meanwhile
			failed = err
		}
		crash.Point("daemon.parts.after-drop")
		o.abandon(s, nil)
	}
	if failed != nil {
		d.log.Error("cull parts of a mounted object", zap.Stringer("object", o.key), zap.Error(failed))
		return false
	}
	d.room.parts.Add(bytes)
	d.room.made()
	d.log.Info("culled parts of a mounted object that nobody has read", zap.Stringer("object", o.key), zap.Int64("bytes", bytes))
	return true
}

// extent is where a span lies in the object.
func (o *object) extent(s span) fscache.Extent {
	first := int64(o.table.At(s.first).Offset)
	return fscache.Extent{Off: first, Len: int64(o.table.At(s.last-1).End()) - first}
}

// retract takes chunks that no reader was told of for absent, and for being on their way until abandon: about limit bytes of them. It takes none
// of an object that is being fetched or synced, or was not synced.
func (o *object) retract(limit int64) (spans []span, bytes int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	all := span{0, o.table.Len()}
	if o.flying.any(all) || o.finished && !o.durable {
		return nil, 0
	}
	for i := 0; i < all.last && bytes < limit; i++ {
		if !o.present.has(i) || o.given.has(i) {
			continue
		}
		_, n := o.at(i)
		bytes += n
		if k := len(spans); k > 0 && spans[k-1].last == i {
			spans[k-1].last++
		} else {
			spans = append(spans, span{i, i + 1})
		}
	}
	if len(spans) == 0 {
		return nil, 0
	}
	for _, s := range spans {
		o.present.clear(s)
		o.flying.set(s)
		o.missing += s.last - s.first
	}
	o.changes++
	o.finished, o.durable, o.left, o.retracted = false, false, false, true
	o.vouched.Store(false)
	return spans, bytes
}

// lostParts reports whether chunks are missing that were there.
func (o *object) lostParts() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.retracted
}
