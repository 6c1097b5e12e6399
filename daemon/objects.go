package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"

	"holdfast/fscache"
	"holdfast/rafs"
	"holdfast/rafs/source"
)

// errConflict means that two images of one domain disagree about a blob.
var errConflict = errors.New("images disagree")

// objects is the object table: the cache objects of mounted images.
type objects struct {
	mu   sync.RWMutex // held for a map access only
	live map[fscache.Key]*object
	keys map[fscache.Key]*entry
}

// An entry serialises what is done to one key: making its object ready, sharing it, forgetting it.
type entry struct {
	turn  chan struct{} // room for one: a lock that gives up with a context
	users int           // guarded by objects.mu: who holds or waits for turn, or has the object attached
}

func newObjects() *objects {
	return &objects{live: map[fscache.Key]*object{}, keys: map[fscache.Key]*entry{}}
}

// get returns the object with a key, nil if no mounted image has it.
func (t *objects) get(k fscache.Key) *object {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.live[k]
}

// all returns the live objects, in no order.
func (t *objects) all() []*object {
	t.mu.RLock()
	defer t.mu.RUnlock()
	list := make([]*object, 0, len(t.live))
	for _, o := range t.live {
		list = append(list, o)
	}
	return list
}

func (t *objects) enter(k fscache.Key) *entry {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.keys[k]
	if e == nil {
		e = &entry{turn: make(chan struct{}, 1)}
		t.keys[k] = e
	}
	e.users++
	return e
}

func (t *objects) leave(k fscache.Key, e *entry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e.users--; e.users == 0 {
		delete(t.keys, k)
	}
}

func (t *objects) publish(k fscache.Key, o *object) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if o == nil {
		delete(t.live, k)
	} else {
		t.live[k] = o
	}
}

// A hold is a mount's share of an object.
type hold struct {
	o *object
	e *entry
	u *use
}

// hold makes an object of a mount ready: known to the engine, its presence settled, with src to fill it from. base is
// the daemon's context, ctx the caller's.
func (d *Daemon) hold(ctx context.Context, key fscache.Key, table *rafs.Table, src source.Source, g *gate) (*hold, error) {
	e := d.objects.enter(key)
	h, err := d.holdEntry(ctx, e, key, table, src, g)
	if err != nil {
		d.objects.leave(key, e)
	}
	return h, err
}

func (d *Daemon) holdEntry(ctx context.Context, e *entry, key fscache.Key, table *rafs.Table, src source.Source, g *gate) (*hold, error) {
	select {
	case e.turn <- struct{}{}:
		defer func() { <-e.turn }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	print := fingerprint(table)
	o := d.objects.get(key)
	if o == nil {
		o = newObject(key, table, print, d.opt.Streams)
		if err := d.ready(ctx, o); err != nil {
			return nil, err
		}
		d.objects.publish(key, o)
	} else if o.print != print {
		return nil, fmt.Errorf("blob %s: a mounted image of domain %s describes it differently; mount this one in another domain: %w", key.ID, key.Domain, errConflict)
	}
	return &hold{o: o, e: e, u: o.attach(d.base, src, d.sources.get(src.String()), g)}, nil
}

// ready adds an object to the engine and settles what of it is present.
func (d *Daemon) ready(ctx context.Context, o *object) error {
	if err := d.engine.Add(ctx, fscache.Object{Key: o.key, Size: o.size()}); err != nil {
		return fmt.Errorf("add object %s: %w", o.key, err)
	}
	if err := d.settle(ctx, o); err != nil {
		err = errors.Join(err, d.engine.Remove(o.key))
		o.completing.Wait()
		return err
	}
	return nil
}

// release ends a hold: the source is no longer used when it returns. The last hold's end makes the engine forget the
// object; its cached data stays. ErrBusy: the kernel still uses the object, through a mount in another namespace for
// example; the hold goes on then, and is to be released later.
func (d *Daemon) release(h *hold) error {
	h.e.turn <- struct{}{}
	err := d.releaseEntry(h)
	<-h.e.turn
	if err == nil || !errors.Is(err, fscache.ErrBusy) {
		d.objects.leave(h.o.key, h.e)
	}
	return err
}

func (d *Daemon) releaseEntry(h *hold) error {
	// Fetches through the source end; readers that wait for one go on through what takes its place meanwhile.
	again := h.o.attach(d.base, h.u.src, h.u.stats, h.u.gate)
	h.o.detach(h.u)
	h.u = again
	if h.o.sources() > 1 {
		h.o.detach(h.u)
		return nil
	}
	err := d.engine.Remove(h.o.key)
	if errors.Is(err, fscache.ErrBusy) {
		return err
	}
	h.o.detach(h.u)
	h.o.completing.Wait()
	d.objects.publish(h.o.key, nil)
	d.index.remove(h.o)
	if err != nil {
		err = fmt.Errorf("remove object %s: %w", h.o.key, err)
	}
	return err
}

// fingerprint is a digest over a chunk table. Two images may share a cache object only if they agree on what is in it: a
// blob's name proves nothing before its bytes are there, and who describes a blob first would else decide for the other
// what its bytes are (I8, I9).
func fingerprint(t *rafs.Table) string {
	h := sha256.New()
	row := make([]byte, 0, 64)
	for i := range t.Len() {
		c := t.At(i)
		row = binary.LittleEndian.AppendUint64(row[:0], c.Offset)
		row = binary.LittleEndian.AppendUint32(row, c.Size)
		if c.Zero() {
			row = append(row, 0)
		} else {
			row = append(append(row, 1+byte(t.Algo())), c.Digest[:]...)
		}
		h.Write(row)
	}
	return hex.EncodeToString(h.Sum(nil))
}
