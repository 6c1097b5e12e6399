package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/state"
)

const (
	// cullTick is how often the culler looks unasked.
	cullTick = 10 * time.Second
	// cullPause follows each culled object: deleting a large file keeps the file system busy, and readers use it too.
	cullPause = 20 * time.Millisecond
	// While nobody waits for room the pause is so many times what the deletion took, and cullAtMost at most: then fewer reads than one in a
	// hundred meet a deletion.
	cullShare  = 100
	cullAtMost = 2 * time.Second
	// cullRest is how long the culler rests when it found nothing to cull, whoever asks.
	cullRest = time.Second
)

// keepRoom culls until ctx ends: first what another process had begun to cull, then whenever there is little room, or a domain is over
// its quota.
func (d *Daemon) keepRoom(ctx context.Context) {
	tick := time.NewTicker(cullTick)
	defer tick.Stop()
	for {
		if d.makeRoom(ctx) == fruitless && sleep(ctx, cullRest) != nil {
			return
		}
		select {
		case <-d.room.wake:
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// fruitless is makeRoom's result when there was something to do and nothing to cull.
const fruitless = -1

// makeRoom culls what is to be culled now, and returns how many objects, and steps of mounted ones, that were.
//
// Who is to go: what is on record as being removed; the objects of domains that are over their quota, until they are not; and when there
// is little room, those of all domains, until there is enough. What no image refers to goes first, then what was used least recently, and what
// is mounted never, but for parts that nobody has read, last of all and with Options.CullMounted.
func (d *Daemon) makeRoom(ctx context.Context) (culled int) {
	refused := d.room.refused.Swap(false)
	space, err := d.room.engine.Space()
	if err != nil {
		d.log.Error("ask how much room the cache has: nothing is culled", zap.Error(err))
		return 0
	}
	limits := d.room.limits
	wanted := d.room.wanted.Swap(false) || space.Wanted
	short := refused || limits.Low(space) || wanted && !limits.Ample(space)
	if !short && len(d.room.quotas.limit) == 0 && !d.begun.Load() {
		return 0
	}
	list, err := d.cullable()
	if err != nil {
		d.log.Error("look for what can be culled", zap.Error(err))
		return 0
	}
	d.begun.Store(false)
	cull := func(want func(candidate) bool, enough func() bool) {
		for i := range list {
			if ctx.Err() != nil || enough() {
				return
			}
			began := time.Now()
			if c := &list[i]; !c.gone && !c.live && want(*c) && d.cullOne(ctx, c) {
				culled++
				d.afterCull(ctx, time.Since(began))
			}
		}
	}
	cull(func(c candidate) bool { return c.Removing }, func() bool { return false })
	cullAll := func(want func(candidate) bool, enough func() bool) {
		cull(want, enough)
		d.cullParts(ctx, list, want, enough, func(took time.Duration) {
			culled++
			d.afterCull(ctx, took)
		})
	}
	over := d.cullQuotas(list, cullAll)
	if short {
		first := refused && culled == 0
		cullAll(func(c candidate) bool { return c.bytes > 0 }, func() bool {
			s, err := d.room.engine.Space()
			if first && culled == 0 {
				return false
			}
			return err != nil || limits.Ample(s)
		})
		d.reportRoom(culled)
	}
	if (short || over) && culled == 0 {
		return fruitless
	}
	return culled
}

// afterCull pauses after a deletion that took so long, for longer while nobody waits for room.
func (d *Daemon) afterCull(ctx context.Context, took time.Duration) {
	over := time.Now().Add(min(cullShare*took, cullAtMost))
	for sleep(ctx, cullPause) == nil && time.Now().Before(over) && d.room.waiting.Load() == 0 {
	}
}

// reportRoom logs, once for each time, that there is little room and nothing left to cull.
func (d *Daemon) reportRoom(culled int) {
	s, err := d.room.engine.Space()
	low := err == nil && d.room.limits.Low(s)
	if was := d.cramped.Swap(low); low && !was {
		d.log.Warn("the cache's file system is nearly full, and everything left in the cache is mounted: unmount images, or make room otherwise",
			zap.Int64("free", s.Free), zap.Int64("total", s.Total), zap.Int64("free_inodes", s.FreeInodes), zap.Int("culled", culled))
	}
}

// cullQuotas culls in each domain that is over its quota, and reports whether there was one.
func (d *Daemon) cullQuotas(list []candidate, cull func(func(candidate) bool, func() bool)) (over bool) {
	quotas := &d.room.quotas
	if len(quotas.limit) == 0 {
		return false
	}
	used := map[string]int64{}
	for _, c := range list {
		if !c.gone {
			used[c.Domain] += c.bytes
		}
	}
	quotas.count(used)
	for domain := range used {
		left := func() (n int64) {
			for _, c := range list {
				if c.Domain == domain && !c.gone {
					n += c.bytes
				}
			}
			return n
		}
		limit, ok := quotas.of(domain)
		if !ok || used[domain] <= limit {
			continue
		}
		over = true
		cull(func(c candidate) bool { return c.Domain == domain && c.bytes > 0 }, func() bool { return left() <= limit })
		quotas.count(map[string]int64{domain: left()})
	}
	return over
}

// A candidate is an object on record.
type candidate struct {
	state.Object
	bytes  int64 // that it takes
	needed bool  // an image refers to it
	live   bool  // it is mounted
	gone   bool  // it was culled
}

// cullable lists the objects on record in the order in which they are to go.
func (d *Daemon) cullable() ([]candidate, error) {
	g, err := d.state.Graph()
	if err != nil {
		return nil, err
	}
	list := make([]candidate, 0, len(g.Objects))
	for _, o := range g.Objects {
		list = append(list, candidate{
			Object: o, bytes: d.usage(o), needed: g.Needed(o), live: d.objects.get(keyOf(o)) != nil || g.InUse(o),
		})
	}
	slices.SortFunc(list, func(a, b candidate) int {
		if a.needed != b.needed {
			if b.needed {
				return -1
			}
			return 1
		}
		return cmp.Or(a.Used.Compare(b.Used), cmp.Compare(a.ID, b.ID))
	})
	return list, nil
}

// cullOne deletes what is cached of an object, unless it is used, and says whether it is deleted.
func (d *Daemon) cullOne(ctx context.Context, c *candidate) bool {
	d.culling.Lock()
	defer d.culling.Unlock()
	if d.succession.under.Load() {
		return false // the successor culls
	}
	err := d.cull(ctx, c.Object)
	switch {
	case err == nil:
		c.gone = true
		d.log.Info("culled", zap.Stringer("object", keyOf(c.Object)), zap.Int64("bytes", c.bytes), zap.Time("last_used", c.Used))
	case ctx.Err() != nil:
	case errors.Is(err, fscache.ErrBusy): // mounted meanwhile, or in another mount namespace, by somebody else perhaps
		c.live = true
		if c.Removing {
			d.begun.Store(true)
		}
		d.log.Debug("not culled: it is in use", zap.Stringer("object", keyOf(c.Object)), zap.Error(err))
	default:
		d.log.Error("cull an object", zap.Stringer("object", keyOf(c.Object)), zap.Error(err))
	}
	return err == nil
}

// cull has its turn with an object, retires it, deletes what is cached of it, and takes it off the record. Somebody else's turn is not
// waited for: it is being mounted, or unmounted.
//
// Where the disk is too full to record it, it is deleted all the same: what that leaves is the record of an object of which nothing is cached.
func (d *Daemon) cull(ctx context.Context, o state.Object) error {
	k := keyOf(o)
	e := d.objects.enter(k)
	defer d.objects.leave(k, e)
	select {
	case e.turn <- struct{}{}:
		defer func() { <-e.turn }()
	default:
		return fmt.Errorf("object %s is being mounted or unmounted: %w", k, fscache.ErrBusy)
	}
	var used bool
	_, err := d.state.RetireObjects(func(g *state.Graph, x state.Object) bool {
		if keyOf(x) != k {
			return false
		}
		used = g.InUse(x)
		return true
	})
	if used {
		return fmt.Errorf("object %s is mounted: %w", k, fscache.ErrBusy)
	}
	if err != nil {
		d.log.Warn("record that an object is culled", zap.Stringer("object", k), zap.Error(err))
	}
	if err := d.deleteCached(ctx, k); err != nil {
		return err
	}
	if err := d.state.ForgetObjects([]state.Object{o}); err != nil { // it is deleted; that it was is found out next time
		d.begun.Store(true)
		d.log.Warn("record that an object was culled", zap.Stringer("object", k), zap.Error(err))
	}
	return nil
}

// discardBootstrap has the culler delete the object of a bootstrap, which was one mount's alone.
func (d *Daemon) discardBootstrap(m *mount) {
	if !d.engine.AsksForBootstrap() {
		return
	}
	k := fscache.Key{Domain: m.record.Domain, ID: m.record.ID}
	_, err := d.state.RetireObjects(func(_ *state.Graph, o state.Object) bool { return keyOf(o) == k })
	if err != nil {
		d.log.Warn("record that a bootstrap is not needed any more: holdfast gc deletes it", zap.Stringer("object", k), zap.Error(err))
		return
	}
	d.begun.Store(true)
	d.room.kick()
}

// usedUntilNow records when the objects of a mount were last used: now.
func (d *Daemon) usedUntilNow(m *mount) {
	var ids []string
	for _, h := range m.holds() {
		ids = append(ids, h.o.key.ID)
	}
	if len(ids) == 0 {
		return
	}
	if err := d.state.UseObjects(m.record.Domain, ids, time.Now().UTC()); err != nil {
		d.log.Warn("record when an image was last used: it may be culled before its turn", zap.String("image", m.record.Ref), zap.Error(err))
	}
}
