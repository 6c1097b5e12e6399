package daemon

import (
	"context"
	"errors"

	"golang.org/x/sync/errgroup"

	"holdfast/fscache"
)

// holders is how many objects of a mount are made ready at once: each waits for the disk, and for the supervisor.
const holders = 8

// holdAll makes the objects of m ready.
func (d *Daemon) holdAll(ctx context.Context, m *mount, boot *bootstrap) (err error) {
	if d.engine.AsksForBootstrap() {
		m.bootstrap, err = d.hold(ctx, fscache.Key{Domain: m.record.Domain, ID: m.record.ID}, boot.table, boot.source, &m.gate)
	}
	if err != nil {
		return err
	}
	holds := make([]*hold, len(m.image.Blobs))
	var g errgroup.Group
	g.SetLimit(holders)
	for n, b := range m.image.Blobs {
		g.Go(func() (err error) {
			holds[n], err = d.hold(ctx, fscache.Key{Domain: m.record.Domain, ID: b.Info.ID}, b.Table, d.source(m, b.Source), &m.gate)
			return err
		})
	}
	err = g.Wait()
	for n, h := range holds {
		if h == nil {
			continue // which is an error's
		}
		m.image.Blobs[n].Table = h.o.table // which says the same
		m.blobs = append(m.blobs, h)
	}
	return err
}

// letGo ends m's holds, of which there may be any number. It comes once in a mount's life. What the kernel still uses is kept.
func (d *Daemon) letGo(m *mount) error {
	return d.letGoHolds(m, m.holds())
}

// holds are all of m's, the bootstrap's first.
func (m *mount) holds() (list []*hold) {
	if m.bootstrap != nil {
		list = append(list, m.bootstrap)
	}
	return append(list, m.blobs...)
}

// letGoHolds begins with the bootstrap, if there is one: while that is used, so is the rest, even if the engine does not know.
func (d *Daemon) letGoHolds(m *mount, holds []*hold) (err error) {
	m.kept = nil
	for i, h := range holds {
		e := d.release(h)
		if errors.Is(e, fscache.ErrBusy) {
			if h == m.bootstrap {
				m.kept = holds[i:]
				return err
			}
			m.kept = append(m.kept, h)
			continue
		}
		err = errors.Join(err, e)
	}
	return err
}
