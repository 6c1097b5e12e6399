package daemon

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"

	"go.uber.org/zap"

	"holdfast/rafs"
)

const (
	// maxIndexed is how many chunks the index holds, of all domains. An entry takes 17 bytes, in a map that is half full at
	// the least: 40 MB.
	maxIndexed = 1 << 20
	// indexStep is for how many chunks a lock is held at a time.
	indexStep = 1024
	// minCopied is how many stored bytes in the middle of a range request are worth a second request.
	minCopied = 64 << 10
)

// An index finds a chunk in the cache by its digest, among the chunks of mounted images' objects in one domain (I8). It is a hint: an
// entry says where a chunk was present, and whoever uses it looks whether it still is, and checks the bytes.
type index struct {
	off   atomic.Bool  // the engine cannot read its cache
	apart atomic.Bool  // what is copied cannot share its space with where it is from
	size  atomic.Int64 // entries
	limit int64        // of size

	mu      sync.Mutex // held for a map access only
	domains map[string]*domainIndex
}

// A domainIndex is the index of one domain. Its lock is taken while no other is held.
type domainIndex struct {
	mu      sync.RWMutex
	chunks  map[uint64]uint64  // by the first 64 bits of the digest: object number << 32 | row
	objects map[uint32]*object // by number
	last    uint32             // number
}

// removed is the number of an object that is not in the index any more. No domain has as many.
const removed = math.MaxUint32

func newIndex() *index { return &index{limit: maxIndexed, domains: map[string]*domainIndex{}} }

func (x *index) domain(name string) *domainIndex {
	x.mu.Lock()
	defer x.mu.Unlock()
	d := x.domains[name]
	if d == nil {
		d = &domainIndex{chunks: map[uint64]uint64{}, objects: map[uint32]*object{}}
		x.domains[name] = d
	}
	return d
}

func indexKey(d rafs.Digest) uint64 { return binary.LittleEndian.Uint64(d[:]) }

// add notes that chunks of o are present. After remove it does nothing.
func (x *index) add(o *object, s span) {
	if x.off.Load() {
		return
	}
	d := x.domain(o.key.Domain)
	for ; !s.empty(); s.first += indexStep {
		x.addStep(d, o, span{s.first, min(s.last, s.first+indexStep)})
	}
}

func (x *index) addStep(d *domainIndex, o *object, s span) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if o.number == 0 && d.last < removed-1 {
		d.last++
		o.number = d.last
		d.objects[o.number] = o
	}
	if o.number == 0 || o.number == removed {
		return
	}
	for i := s.first; i < s.last; i++ {
		c := o.table.At(i)
		k := indexKey(c.Digest)
		if c.Zero() {
			continue
		}
		if _, ok := d.chunks[k]; !ok {
			if x.size.Load() >= x.limit {
				continue
			}
			x.size.Add(1)
		}
		d.chunks[k] = uint64(o.number)<<32 | uint64(i)
	}
}

// remove takes an object out that nothing is written to any more.
func (x *index) remove(o *object) {
	d := x.domain(o.key.Domain)
	for s := (span{0, o.table.Len()}); !s.empty(); s.first += indexStep {
		x.removeStep(d, o, span{s.first, min(s.last, s.first+indexStep)})
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.objects, o.number)
	o.number = removed
	if len(d.chunks) == 0 {
		d.chunks = map[uint64]uint64{} // a map never gives its memory back
	}
}

func (x *index) removeStep(d *domainIndex, o *object, s span) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := s.first; i < s.last; i++ {
		k := indexKey(o.table.At(i).Digest)
		if v, ok := d.chunks[k]; ok && v == uint64(o.number)<<32|uint64(i) {
			delete(d.chunks, k)
			x.size.Add(-1)
		}
	}
}

// disable empties the index for good: the engine cannot read its cache.
func (x *index) disable() {
	x.off.Store(true)
	x.mu.Lock()
	defer x.mu.Unlock()
	x.domains = map[string]*domainIndex{}
	x.size.Store(0)
}

// A place is a chunk in the cache.
type place struct {
	o *object
	i int
}

// find returns where the domain's cache has what chunk i of o must be. A chunk that is only on its way is not there.
func (x *index) find(d *domainIndex, o *object, i int) (p place, ok bool) {
	c := o.table.At(i)
	if c.Zero() {
		return p, false
	}
	d.mu.RLock()
	v, ok := d.chunks[indexKey(c.Digest)]
	p = place{d.objects[uint32(v>>32)], int(v & math.MaxUint32)}
	d.mu.RUnlock()
	if !ok || p.o == nil || p.i >= p.o.table.Len() || p.o.table.Algo() != o.table.Algo() {
		return p, false
	}
	if at := p.o.table.At(p.i); at.Digest != c.Digest || at.Size != c.Size {
		return p, false
	}
	return p, p.o.has(span{p.i, p.i + 1})
}

// near looks for claimed chunks in the cache, and returns from where to copy them, with the spans cut so that those chunks are in spans
// of their own. A few that lie in the middle of what is fetched are fetched with the rest: they would cost a second request.
func (x *index) near(o *object, spans []span) (cut []span, from map[int]place) {
	if x.off.Load() || x.size.Load() == 0 {
		return spans, nil
	}
	d := x.domain(o.key.Domain)
	from = map[int]place{}
	for _, s := range spans {
		fetch := s.first // the first chunk that is in no span yet
		for at := s.first; at < s.last; at++ {
			run, stored := x.run(d, o, span{at, s.last}, from)
			if run.empty() {
				continue
			}
			at = run.last // which is not in the cache
			if stored < minCopied && run.first > s.first && run.last < s.last {
				for i := run.first; i < run.last; i++ {
					delete(from, i)
				}
				continue
			}
			if fetch < run.first {
				cut = append(cut, span{fetch, run.first})
			}
			cut = append(cut, run)
			fetch = run.last
		}
		if fetch < s.last {
			cut = append(cut, span{fetch, s.last})
		}
	}
	return cut, from
}

// run puts the chunks at the beginning of s that the cache has into from, and returns them and the bytes they are stored in.
func (x *index) run(d *domainIndex, o *object, s span, from map[int]place) (run span, stored uint64) {
	run = span{s.first, s.first}
	for ; run.last < s.last; run.last++ {
		p, ok := x.find(d, o, run.last)
		if !ok {
			break
		}
		from[run.last] = p
		stored += uint64(o.table.At(run.last).Stored)
	}
	return run, stored
}

// copied returns a batch that the cache has in other places, checked like what comes from a source; nil: it is to be fetched.
func (t *transfer) copied(b batch) *buffer {
	if _, ok := t.from[b.first]; !ok {
		return nil
	}
	if t.demand != nil {
		t.turn.pass()
	}
	out := getBuffer(int(b.end - b.off))
	for i := b.first; i < b.last; i++ {
		c := t.o.table.At(i)
		if err := t.copy(i, out.b[c.Offset-b.off:c.End()-b.off]); err != nil {
			out.free()
			clear(t.from) // the request for this one brings the rest too
			if errors.Is(err, errors.ErrUnsupported) {
				t.index.disable()
			} else { // unmounted or culled meanwhile, if all is well
				t.log.Debug("a chunk that the cache has is fetched all the same", zap.Stringer("object", t.o.key), zap.Error(err))
			}
			return nil
		}
	}
	return out
}

// copy reads chunk i from where the cache has it, and pads it with zeros.
func (t *transfer) copy(i int, dst []byte) error {
	p := t.from[i]
	if p.o == nil {
		return errElsewhere
	}
	at, c := p.o.table.At(p.i), t.o.table.At(i)
	if err := t.engine.ReadAt(p.o.key, dst, int64(at.Offset)); err != nil {
		return err
	}
	clear(dst[c.Size:])
	if t.o.table.Algo().Sum(dst[:c.Size]) != c.Digest {
		return fmt.Errorf("%w: object %s at %d", errElsewhere, p.o.key, at.Offset)
	}
	return nil
}

// share has the spans that were copied, each as a whole or not at all, share their space on disk with where they were copied from. That comes last, when
// no reader waits for any of them, and is safe at any time, for the file system compares the bytes.
func (t *transfer) share(ctx context.Context, spans []span) {
	for _, s := range spans {
		t.shareSpan(ctx, s)
	}
}

func (t *transfer) shareSpan(ctx context.Context, s span) {
	for s.first < s.last && !t.index.apart.Load() && ctx.Err() == nil {
		p, ok := t.from[s.first]
		if !ok {
			return
		}
		run := span{s.first, s.first + 1}
		for run.last < s.last && t.follows(run.last) {
			run.last++
		}
		s.first = run.last
		x := t.o.extent(run)
		n, err := t.engine.Share(t.o.key, x, p.o.key, int64(p.o.table.At(p.i).Offset))
		t.o.reflinked.Add(n)
		t.count.reflinked.Add(n)
		if errors.Is(err, errors.ErrUnsupported) {
			t.index.apart.Store(true)
		} else if err != nil { // unmounted or culled meanwhile, if all is well
			t.log.Debug("a copied chunk shares no space", zap.Stringer("object", t.o.key), zap.Error(err))
		}
	}
}

// follows reports whether chunk i was copied from right behind where the chunk before it was.
func (t *transfer) follows(i int) bool {
	p, ok := t.from[i]
	before := t.from[i-1]
	return ok && p.o == before.o && p.i == before.i+1 && p.o.table.At(p.i).Offset == before.o.table.At(before.i).End() &&
		t.o.table.At(i).Offset == t.o.table.At(i-1).End()
}

// errElsewhere means that the cache has not what the index says.
var errElsewhere = errors.New("not in the cache any more")
