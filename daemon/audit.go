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

// A CacheReport says what was found of what is cached.
type CacheReport struct {
	Objects  []CheckedObject `json:"objects"`
	Bad      int             `json:"bad"`      // chunks
	Repaired int             `json:"repaired"` // of those
}

// A CheckedObject is a cache object that was compared with the digests of its chunks.
type CheckedObject struct {
	Domain    string     `json:"domain"`
	ID        string     `json:"id"`
	Chunks    int        `json:"chunks"` // compared: those that are cached
	Bytes     int64      `json:"bytes"`  // of those
	Bad       []BadChunk `json:"bad"`
	Unchecked string     `json:"unchecked,omitempty"` // why it, or the rest of it, could not be compared
}

// A BadChunk is one that does not have the bytes that its digest is of.
type BadChunk struct {
	Offset   int64  `json:"offset"` // in the object
	Bytes    int64  `json:"bytes"`
	Repaired bool   `json:"repaired"`
	Failed   string `json:"failed,omitempty"` // why it was not
}

// checkCache compares what is cached, of one image or of all that are mounted, with the digests, as it is on the disk, and with repair writes
// the right bytes over the wrong ones.
func (d *Daemon) checkCache(ctx context.Context, name string, repair bool) (r CacheReport, err error) {
	list, done, err := d.toCheck(ctx, name)
	if err != nil {
		return r, err
	}
	r.Objects = []CheckedObject{}
	for _, o := range list {
		c := d.checkObject(ctx, o, repair)
		if err := context.Cause(ctx); err != nil {
			return r, errors.Join(err, done())
		}
		r.Objects = append(r.Objects, c)
		r.Bad += len(c.Bad)
		for _, b := range c.Bad {
			if b.Repaired {
				r.Repaired++
			}
		}
	}
	return r, done()
}

// toCheck are the objects of an image, or of all that are mounted. What is not mounted is held until done is called.
func (d *Daemon) toCheck(ctx context.Context, name string) (list []*object, done func() error, err error) {
	done = func() error { return nil }
	if name == "" {
		list = d.objects.all()
		slices.SortFunc(list, func(a, b *object) int {
			return cmp.Or(cmp.Compare(a.key.Domain, b.key.Domain), cmp.Compare(a.key.ID, b.key.ID))
		})
		return list, done, nil
	}
	changed, err := d.change()
	if err != nil {
		return nil, nil, err
	}
	var held []*mount
	done = func() (err error) {
		defer changed()
		for _, m := range held {
			err = errors.Join(err, d.part(m, d.letGo(m)))
		}
		return err
	}
	if held, err = d.holdImage(ctx, name); err != nil {
		return nil, nil, errors.Join(err, done())
	}
	for _, m := range held {
		for _, h := range m.blobs {
			list = append(list, h.o)
		}
	}
	return list, done, nil
}

// holdImage holds the objects of an image on record in all of its domains, as mounts of it that are nowhere would. What it returns is held after
// an error too.
func (d *Daemon) holdImage(ctx context.Context, name string) (held []*mount, err error) {
	g, err := d.state.Graph()
	if err != nil {
		return nil, err
	}
	images, err := resolve(g, []string{name})
	if err != nil {
		return nil, err
	}
	i := images[0]
	l, err := d.loaded(i.Digest)
	if err != nil {
		return nil, unusable(err)
	}
	for _, domain := range i.Domains {
		m := &mount{record: state.Mount{
			ID: newMountID(), Ref: i.Ref, Image: i.Digest, Domain: domain, Bootstrap: l.boot.sum, Boot: d.boot, Created: time.Now().UTC(),
		}}
		if _, err := d.load(ctx, m); err != nil {
			return held, err
		}
		held = append(held, m)
	}
	return held, nil
}

// checkObject compares the chunks of an object that are present. What is on its way meanwhile is verified by who brings it.
func (d *Daemon) checkObject(ctx context.Context, o *object, repair bool) CheckedObject {
	c := CheckedObject{Domain: o.key.Domain, ID: o.key.ID, Bad: []BadChunk{}}
	for i := range o.table.Len() {
		if ctx.Err() != nil || !o.has(span{i, i + 1}) {
			continue
		}
		b, err := d.checkChunk(ctx, o, i, repair)
		switch {
		case errors.Is(err, errors.ErrUnsupported):
			c.Unchecked = "the kernel has it open, and the engine cannot read it back: it is checked when its image is mounted for the first time after the host was started anew"
			return c
		case errors.Is(err, fscache.ErrNotOpen), errors.Is(err, fscache.ErrUnknown), errors.Is(err, errNoSource):
			c.Unchecked = "it cannot be read now: " + err.Error()
			return c
		case err != nil:
			b = &BadChunk{Failed: err.Error()} // the disk gives nothing at all
			b.Offset, b.Bytes = o.at(i)
		}
		c.Chunks++
		_, n := o.at(i)
		c.Bytes += n
		if b != nil {
			c.Bad = append(c.Bad, *b)
		}
	}
	return c
}

// at is where a chunk lies in the object, and how much room it has, in bytes.
func (o *object) at(i int) (off, n int64) {
	c := o.table.At(i)
	return int64(c.Offset), int64(c.End() - c.Offset)
}

// checkChunk compares one chunk; nil: it is as it must be.
func (d *Daemon) checkChunk(ctx context.Context, o *object, i int, repair bool) (*BadChunk, error) {
	good, err := d.intactOnDisk(o, i)
	if err != nil || good || !o.has(span{i, i + 1}) { // culled meanwhile
		return nil, err
	}
	b := &BadChunk{}
	b.Offset, b.Bytes = o.at(i)
	d.log.Error("cached bytes are not what was written", zap.Stringer("object", o.key), zap.Int64("offset", b.Offset), zap.Int64("bytes", b.Bytes))
	if !repair {
		return b, nil
	}
	if err := d.repair(ctx, o, i); err != nil {
		b.Failed = err.Error()
		return b, nil
	}
	b.Repaired = true
	return b, nil
}

// intactOnDisk is intact of what the disk has, not of what the page cache keeps of it. The object stays known to the engine meanwhile.
func (d *Daemon) intactOnDisk(o *object, i int) (bool, error) {
	u := o.borrow()
	if u == nil {
		return false, errNoSource
	}
	defer u.wg.Done()
	off, n := o.at(i)
	if err := d.engine.Evict(o.key, fscache.Extent{Off: off, Len: n}); err != nil {
		return false, err
	}
	return d.intact(o, i)
}

// repairPause is between attempts to fetch what is to be repaired.
const repairPause = 500 * time.Millisecond

// repair fetches a chunk and writes it over what is cached of it. There is no hole at any moment, nor is anything taken for absent: a
// reader meanwhile gets what it would have got before, or the right bytes. The kernel may not ask about the object any more, and would
// give a hole's zeros (I1).
func (d *Daemon) repair(ctx context.Context, o *object, i int) (err error) {
	for attempt := range maxMismatches {
		if attempt > 0 {
			if err := sleep(ctx, repairPause); err != nil {
				return err
			}
		}
		if err = d.refetch(ctx, o, i); err == nil || errors.Is(err, errWrite) || errors.Is(err, errNoSource) || refusal(err) && attempt+1 >= o.sources() {
			break
		}
	}
	if err != nil {
		return err
	}
	if err := d.engine.Sync(o.key); err != nil {
		return err
	}
	good, err := d.intactOnDisk(o, i)
	if err == nil && !good && o.has(span{i, i + 1}) {
		err = errors.New("the disk gives other bytes than were just written to it: replace it")
	}
	return err
}

// refetch is one attempt. The order is transfer.land's: verified, then written (I3).
func (d *Daemon) refetch(ctx context.Context, o *object, i int) error {
	u := o.borrow()
	if u == nil {
		return errNoSource
	}
	defer u.wg.Done()
	of, cancel := context.WithTimeoutCause(u.ctx, d.deadline, errDeadline)
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	t := &transfer{filler: d.filler, o: o, in: stream{use: u, o: o}}
	defer t.in.close()
	b := t.batch(span{i, i + 1})
	p, err := t.verified(of, b)
	if err != nil {
		o.demote(u)
		return err
	}
	defer p.free()
	if err := t.write(b, p.b); err != nil {
		return fmt.Errorf("repair: %w", err)
	}
	return nil
}
