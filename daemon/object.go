package daemon

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/fscache"
	"holdfast/rafs"
	"holdfast/rafs/source"
)

// An object is a cache object and where its bytes come from. A chunk of it is absent, on its way (one fetch has claimed
// it) or present (verified and written); nothing is allocated for a chunk but these two bits.
//
// Nothing blocks while mu is held, and no other lock is taken under it.
type object struct {
	key   fscache.Key
	table *rafs.Table
	print string        // fingerprint of the table
	slots chan struct{} // one for each fetch that a reader waits for

	completing sync.WaitGroup // finish calls under way; only who fetches, settles or has borrowed a source starts one

	denials denials
	asked   chan struct{} // closed when the kernel first asks for something of the object: from then on it can be written to
	once    sync.Once     // closes asked

	fetched   atomic.Int64 // bytes the sources gave
	copied    atomic.Int64 // bytes that were in other objects of the domain
	reflinked atomic.Int64 // of them, bytes that share their space on disk with those
	served    atomic.Int64 // bytes of requests answered OK
	vouched   atomic.Bool  // it is on record that all of it was synced

	number uint32 // in the domain's index, whose lock guards it; 0: not there yet

	mu       sync.Mutex
	present  bitset
	flying   bitset        // claimed by a fetch; disjoint from present
	given    bitset        // readers have asked for these, or may have: once told that they are there they copy them from the cache at any time
	missing  int           // chunks not present
	epoch    int           // counts reset calls: what was written before one says nothing about the file after it
	changes  int           // counts what changed present
	finished bool          // complete, and the engine was told or is being told
	durable  bool          // all of it would outlive a power failure
	left     bool          // the engine was told: the kernel needs nobody for it
	unsynced error         // why it could not be told
	finding  chan struct{} // closed when it is known what the file holds that the kernel opened last; nil: it is
	waiters  []*waiter
	claims   []*claim // whose transfer is under way and nobody waits for
	lastRead time.Time

	retracted bool // chunks are missing that were there
	uses      []*use
	backoff   backoff
}

// A use is one mounted image's claim on an object, and the source it brings.
type use struct {
	src    source.Source
	local  bool // src is a local file
	stats  *sourceStats
	gate   *gate
	ctx    context.Context // ends when the image is unmounted; fetches through src run under it
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup // fetches through src
}

// A waiter is a reader that waits for chunks others fetch.
type waiter struct {
	want span
	wake chan error // room for one; nil: look again
}

func newObject(key fscache.Key, table *rafs.Table, print string, slots int) *object {
	return &object{
		key: key, table: table, print: print, slots: make(chan struct{}, slots),
		asked:   make(chan struct{}),
		present: newBitset(table.Len()), flying: newBitset(table.Len()), given: newBitset(table.Len()), missing: table.Len(),
	}
}

func (o *object) size() int64 { return int64(o.table.Size()) }

// span returns the chunks that [off, off+n) lies in, cut to the object's size.
func (o *object) span(off, n int64) span {
	if off < 0 || n <= 0 {
		return span{}
	}
	first, last := o.table.Range(uint64(off), uint64(n))
	return span{first, last}
}

// has reports whether all of s is present.
func (o *object) has(s span) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.present.all(s)
}

// give notes that a reader wants s, and reports whether all of it is present, and whether that was the last that the kernel had to ask about of an
// object that was synced before.
func (o *object) give(s span) (there, last bool) {
	now := time.Now()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.lastRead = now
	last = o.given.set(s) > 0 && o.durable && !o.left && o.allGiven()
	return o.present.all(s), last
}

// allGiven: mu is held.
func (o *object) allGiven() bool { return o.given.all(span{0, o.table.Len()}) }

// gave notes that another process may have given s to readers.
func (o *object) gave(s span) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.given.set(s)
}

// readLast is when a reader last wanted something of the object.
func (o *object) readLast() time.Time {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.lastRead
}

// absent reports whether a chunk of s is neither present nor on its way.
func (o *object) absent(s span) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.present.count(s)+o.flying.count(s) < s.last-s.first
}

// claim takes for the caller the chunks of want that are absent, and, when nothing else is missing of want, those of the
// ahead bytes from the first of them (so that a reader never has its answer held up by reading ahead while it waits for
// another's fetch). Whoever claims hands every chunk to mark or to abandon.
func (o *object) claim(want span, ahead uint64) (c claimed) {
	o.mu.Lock()
	defer o.mu.Unlock()
	c.epoch = o.epoch
	reach := want
	if !o.flying.any(want) {
		reach.last = max(want.last, o.window(want, ahead))
	}
	for i := reach.first; i < reach.last; i++ {
		if o.present.has(i) || o.flying.has(i) {
			continue
		}
		if n := len(c.spans); n > 0 && c.spans[n-1].last == i {
			c.spans[n-1].last++
		} else {
			c.spans = append(c.spans, span{i, i + 1})
		}
	}
	for _, s := range c.spans {
		o.flying.set(s)
	}
	if n := len(c.spans); n > 0 {
		c.wanted = make(chan struct{})
		o.claims = append(o.claims, &claim{span{c.spans[0].first, c.spans[n-1].last}, c.wanted})
	}
	return c
}

// claimed is what one call of claim took, in order.
type claimed struct {
	spans  []span
	epoch  int
	wanted chan struct{} // closed when a reader waits for a chunk of it; to be given to landed
}

// A claim is what reaches the claimer when somebody waits for it.
type claim struct {
	span
	wanted chan struct{}
}

// hurry tells the claimers of s that a reader waits. mu is held.
func (o *object) hurry(s span) {
	o.claims = slices.DeleteFunc(o.claims, func(c *claim) bool {
		if !c.overlaps(s) {
			return false
		}
		close(c.wanted)
		return true
	})
}

// landed ends a claim, when all its chunks were marked or abandoned.
func (o *object) landed(wanted chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.claims = slices.DeleteFunc(o.claims, func(c *claim) bool { return c.wanted == wanted })
}

// behind returns what is to be read ahead of a reader of want, after it.
func (o *object) behind(want span, ahead uint64) span {
	o.mu.Lock()
	defer o.mu.Unlock()
	return span{want.last, o.window(want, ahead)}
}

// window returns the first chunk that starts ahead bytes or more after the first missing chunk of want.
func (o *object) window(want span, ahead uint64) int {
	for i := want.first; i < want.last; i++ {
		if !o.present.has(i) {
			_, last := o.table.Range(o.table.At(i).Offset, ahead)
			return last
		}
	}
	return want.last
}

// mark makes claimed chunks present and wakes who waited for them. It reports whether want is present now, and whether
// this made the object complete (to one caller only). Chunks claimed before a reset stay absent.
func (o *object) mark(s span, epoch int, want span) (ready, complete bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.flying.clear(s)
	if epoch == o.epoch {
		if n := o.present.set(s); n > 0 {
			o.missing -= n
			o.changes++
		}
		o.backoff.reset()
	}
	o.wake(s, nil)
	if o.missing == 0 {
		o.retracted = false
	}
	complete = o.missing == 0 && !o.finished
	if complete {
		o.finished = true
	}
	return o.present.all(want), complete
}

// abandon gives up claimed chunks; those who waited for them are told why and try for themselves.
func (o *object) abandon(s span, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.flying.clear(s)
	o.wake(s, err)
}

// wake wakes the waiters that s concerns: all of them with an error, else those with nothing left to wait for.
func (o *object) wake(s span, err error) {
	kept := o.waiters[:0]
	for _, w := range o.waiters {
		if !w.want.overlaps(s) || err == nil && o.flying.any(w.want) {
			kept = append(kept, w)
			continue
		}
		w.wake <- err
	}
	clear(o.waiters[len(kept):])
	o.waiters = kept
}

// await waits until nothing of want is on its way, or a fetch of it failed, whose error it returns; or until ctx is done,
// whose cause it returns.
func (o *object) await(ctx context.Context, want span) error {
	o.mu.Lock()
	if !o.flying.any(want) {
		o.mu.Unlock()
		return nil
	}
	w := &waiter{want: want, wake: make(chan error, 1)}
	o.waiters = append(o.waiters, w)
	o.hurry(want)
	o.mu.Unlock()
	select {
	case err := <-w.wake:
		return err
	case <-ctx.Done():
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for i, v := range o.waiters {
		if v == w {
			o.waiters = append(o.waiters[:i], o.waiters[i+1:]...)
			break
		}
	}
	return context.Cause(ctx)
}

// reset forgets what is present: the kernel has opened the object anew, perhaps with another file behind it. It returns
// the new epoch, for mark.
func (o *object) reset() (epoch int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.epoch++
	o.changes++
	o.present.clear(span{0, o.table.Len()})
	o.missing = o.table.Len()
	o.finished, o.durable, o.left, o.unsynced = false, false, false, nil
	return o.epoch
}

// find says that what the file holds that the kernel is about to open will be known when found is called.
func (o *object) find() (found func()) {
	c := make(chan struct{})
	o.mu.Lock()
	o.finding = c
	o.mu.Unlock()
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.finding == c { // else the kernel has opened another one
			o.finding = nil
		}
		close(c)
	}
}

// found waits until it is known what the object's file holds.
func (o *object) found(ctx context.Context) error {
	for {
		o.mu.Lock()
		c := o.finding
		o.mu.Unlock()
		if c == nil {
			return nil
		}
		select {
		case <-c:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// synced takes note of how a sync ended that was begun when the object was complete, at a count of changes, and reports whether the engine is to be
// told. It is not while there is a chunk that no reader was told of, if that may be culled: then the give that is the last finds the object
// durable. What was culled or reset meanwhile is not complete, and what was fetched again since was not synced.
func (o *object) synced(changes int, err error, culls bool) (leave bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.missing != 0 || o.changes != changes {
		return false
	}
	if err == nil && (!culls || o.allGiven()) {
		return true
	}
	o.durable, o.unsynced = err == nil, err
	return false
}

// ended takes note of how telling the engine ended. From synced on nothing of the object was culled: it was finished and not durable.
func (o *object) ended(changes int, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.changes == changes {
		o.durable, o.left, o.unsynced = err == nil, err == nil, err
	}
}

// kept reports whether all of the object would outlive a power failure, or why that cannot be had.
func (o *object) kept() (bool, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.durable, o.unsynced
}

// trouble is why the object's source is being left alone for a while; nil if it is not.
func (o *object) trouble() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.backoff.err
}

// current is the epoch, for mark.
func (o *object) current() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.epoch
}

// busyOrAsked reports whether something of the object is on its way, or, unless that is of no concern, whether the kernel may ask for something of it.
func (o *object) busyOrAsked(mayBeAsked bool) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.flying.any(span{0, o.table.Len()}) || !o.left && !mayBeAsked
}

// failed notes that a fetch begun at began failed, and how long the source is to be left alone: atLeast if it asked for that,
// otherwise atMost.
func (o *object) failed(began time.Time, atLeast, atMost time.Duration, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.backoff.err = err
	o.backoff.failed(began, time.Now(), atLeast, atMost)
}

// attach adds a source. It returns the use, to be given to detach.
func (o *object) attach(ctx context.Context, src source.Source, stats *sourceStats, g *gate) *use {
	_, local := src.(*source.File)
	u := &use{src: src, local: local, stats: stats, gate: g}
	u.ctx, u.cancel = context.WithCancelCause(ctx)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.uses = append(o.uses, u)
	return u
}

// detach takes a source away, stops what reads from it and waits for that.
func (o *object) detach(u *use) {
	o.mu.Lock()
	for i, v := range o.uses {
		if v == u {
			o.uses = append(o.uses[:i:i], o.uses[i+1:]...)
			break
		}
	}
	o.mu.Unlock()
	u.cancel(errUnmounted)
	u.wg.Wait()
}

// sources is how many there are: any of them may fill the object.
func (o *object) sources() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.uses)
}

// demote has the next fetch use another source than u, which failed, if there is one.
func (o *object) demote(u *use) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if n := len(o.uses); n > 1 && o.uses[0] == u {
		o.uses = append(slices.Clone(o.uses[1:]), u)
	}
}

// borrow returns a source to fetch through, nil when no mounted image has the object; the caller calls u.wg.Done after.
func (o *object) borrow() *use {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.uses) == 0 {
		return nil
	}
	u := o.uses[0]
	u.wg.Add(1)
	return u
}

// busy closes the gates of all mounted images with the object until the returned function is called.
func (o *object) busy() (done func()) {
	o.mu.Lock()
	uses := slices.Clone(o.uses)
	o.mu.Unlock()
	for _, u := range uses {
		u.gate.enter()
	}
	return func() {
		for _, u := range uses {
			u.gate.leave()
		}
	}
}

// presentBytes is how much of the object is present, and how much is on its way, in bytes.
func (o *object) presentBytes() (present, flying int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := range o.table.Len() {
		c := o.table.At(i)
		n := int64(c.End() - c.Offset)
		if o.present.has(i) {
			present += n
		} else if o.flying.has(i) {
			flying += n
		}
	}
	return present, flying
}
