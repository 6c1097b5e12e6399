package daemon

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/rafs"
	"holdfast/state"
)

// settle decides what of an object is present (I5). What was written in this boot, through the same chunk table, was
// verified before it was written, and page cache outlives a process. Anything else is read back and checked: after a
// power failure a file may hold zeros or old bytes where it was written to last.
//
// An engine that cannot read back (cachefiles) gets no such check, for it would change nothing: there the kernel itself
// decides by the same cache file what to ask for, and the daemon is not asked about the rest.
func (d *Daemon) settle(ctx context.Context, o *object) error {
	if d.given != nil {
		p := d.given[o.key]
		d.find(o, p.spans(o))
		return nil
	}
	extents, err := d.engine.Present(o.key)
	switch {
	case errors.Is(err, fscache.ErrNotOpen), errors.Is(err, errors.ErrUnsupported):
		extents = nil
	case err != nil:
		return fmt.Errorf("find what is cached of %s: %w", o.key, err)
	}
	whole := o.covered(extents)
	for _, s := range whole { // of what cannot be read back now too
		o.gave(s)
	}
	want := state.Object{Domain: o.key.Domain, ID: o.key.ID, Boot: d.boot, Table: o.print, Size: o.size()}
	known, err := d.state.Object(o.key.Domain, o.key.ID)
	if err != nil {
		return err
	}
	if known.Table != "" && known.Table != o.print && !d.readsBack(o.key) {
		return fmt.Errorf("object %s: what is cached was described differently by another image, and the engine cannot check it; mount this image in another domain: %w", o.key, errConflict)
	}
	if known.Boot != want.Boot || known.Table != want.Table || known.Removing {
		whole, err = d.verify(ctx, o, whole)
		switch {
		case errors.Is(err, fscache.ErrNotOpen):
			whole = nil // cannot be read now: not trusted now, nor after the next restart
		case err != nil:
			return err
		default:
			want.Used = time.Now().UTC()
			if err := d.state.RecordObject(want); err != nil {
				return err
			}
		}
	}
	d.find(o, whole)
	return nil
}

// readsBack reports whether the engine can read its cache.
func (d *Daemon) readsBack(k fscache.Key) bool {
	p := getBuffer(fscache.BlockSize)
	defer p.free()
	return !errors.Is(d.engine.ReadAt(k, p.b, 0), errors.ErrUnsupported)
}

// covered returns the chunks all of whose blocks lie in extents, as runs.
func (o *object) covered(extents []fscache.Extent) []span { return covered(o.table, extents) }

func covered(t *rafs.Table, extents []fscache.Extent) (whole []span) {
	e := 0
	for i := range t.Len() {
		c := t.At(i)
		for e < len(extents) && extents[e].Off+extents[e].Len <= int64(c.Offset) {
			e++
		}
		at := int64(c.Offset)
		for k := e; k < len(extents) && extents[k].Off <= at && at < int64(c.End()); k++ {
			at = extents[k].Off + extents[k].Len
		}
		if at < int64(c.End()) {
			continue
		}
		if n := len(whole); n > 0 && whole[n-1].last == i {
			whole[n-1].last++
		} else {
			whole = append(whole, span{i, i + 1})
		}
	}
	return whole
}

// verify reads the chunks of whole back and returns those whose digest is right; of the others it makes holes.
func (d *Daemon) verify(ctx context.Context, o *object, whole []span) (good []span, err error) {
	wrong := 0
	for _, s := range whole {
		for i := s.first; i < s.last; i++ {
			if err := context.Cause(ctx); err != nil {
				return nil, fmt.Errorf("check what is cached of %s: %w", o.key, err)
			}
			ok, err := d.intact(o, i)
			switch {
			case errors.Is(err, errors.ErrUnsupported):
				d.log.Warn("the engine cannot read its cache back: what it holds is not checked", zap.Stringer("object", o.key))
				return whole, nil
			case err != nil:
				return nil, err
			case !ok:
				wrong++
				if err := d.dropWrong(o, i); err != nil {
					return nil, err
				}
			case len(good) > 0 && good[len(good)-1].last == i:
				good[len(good)-1].last++
			default:
				good = append(good, span{i, i + 1})
			}
		}
	}
	if len(whole) > 0 {
		d.log.Info("checked what was cached before", zap.Stringer("object", o.key), zap.Int("dropped_chunks", wrong))
	}
	return good, nil
}

// intact reports whether a cached chunk has the bytes its row says.
func (d *Daemon) intact(o *object, i int) (bool, error) {
	return intact(o.table, i, func(p []byte, off int64) error {
		if err := d.engine.ReadAt(o.key, p, off); err != nil {
			return fmt.Errorf("read back %s, %d bytes at %d: %w", o.key, len(p), off, err)
		}
		return nil
	})
}

// dropWrong makes a hole of a chunk with wrong bytes, unless a mount would read the hole that nobody serves.
func (d *Daemon) dropWrong(o *object, i int) error {
	dir, err := d.usedOffline(o.key)
	if err != nil {
		return err
	}
	if dir != "" {
		return fmt.Errorf("object %s has wrong bytes at %d in the cache, and what was mounted on %s without a daemon reads them: unmount that first: %w", o.key, o.table.At(i).Offset, dir, errConflict)
	}
	return d.drop(o, i)
}

func (d *Daemon) drop(o *object, i int) error {
	c := o.table.At(i)
	if err := d.engine.Drop(o.key, fscache.Extent{Off: int64(c.Offset), Len: int64(c.End() - c.Offset)}); err != nil {
		return fmt.Errorf("drop wrong bytes of %s at %d: %w", o.key, c.Offset, err)
	}
	return nil
}

// find adopts what settle found, for the index too. What an object's later openings bring back is not looked up there: it was
// when it was first seen.
func (d *Daemon) find(o *object, whole []span) {
	d.adopt(o, o.epoch, whole)
	for _, s := range whole {
		d.index.add(o, s)
	}
}

// adopt marks chunks present that the cache file was found to hold.
func (d *Daemon) adopt(o *object, epoch int, whole []span) {
	for _, s := range whole {
		o.gave(s)
		if _, complete := o.mark(s, epoch, span{}); complete {
			d.finish(o)
		}
	}
}
