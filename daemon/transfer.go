package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/rafs"
	"holdfast/rafs/source"
)

// maxBatch is how many bytes of small chunks are decoded and written together. A larger chunk is a batch of its own.
const maxBatch = 128 << 10

// quickBytes is how much of a local blob is read and decoded in less time than another goroutine takes to wake up.
const quickBytes = 32 << 10

// errWrite marks failures of the cache, as opposed to the source.
var errWrite = errors.New("write to the cache")

// A transfer carries claimed chunks from a source to the cache.
type transfer struct {
	*filler
	o      *object
	epoch  int
	turn   *turn           // of the reader the transfer was begun for; nil for a prefetch
	demand *demand         // of the reader who waits; nil when there is none, or it was answered
	want   span            // the demand's, also afterwards
	wanted <-chan struct{} // closed when a reader waits for what is claimed
	from   map[int]place   // where the cache has chunks of it
	in     stream
}

// run lands spans in order, and returns those that it did not.
func (t *transfer) run(ctx context.Context, spans []span) (rest []span, err error) {
	for len(spans) > 0 {
		s := &spans[0]
		for !s.empty() {
			if t.demand == nil {
				t.turn.pass()
				t.yield(ctx)
			}
			b := t.batch(*s)
			if err := t.land(ctx, b); err != nil {
				return spans, err
			}
			s.first = b.last
		}
		spans = spans[1:]
	}
	return nil, nil
}

// How long reading ahead holds back for each batch while readers miss elsewhere: for as long as the last miss is less than
// quiet ago, maxYields times quiet at the most, which leaves it 30 MB/s.
const (
	quiet     = time.Millisecond
	maxYields = 4
)

// yield lets the processors serve misses first: what is read ahead may never be read, and a processor busy with it is one a
// reader waits for. As soon as a reader waits for this transfer it holds back no more.
func (t *transfer) yield(ctx context.Context) {
	for range maxYields {
		if t.sinceMiss() > quiet {
			return
		}
		timer := time.NewTimer(quiet)
		select {
		case <-t.wanted:
			timer.Stop()
			return
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

// A batch is a run of chunks that are adjacent in the blob and landed together, or one zero row.
type batch struct {
	span
	off, end   uint64 // in the object
	blob, size uint64 // where it is stored, and in how many bytes; 0 bytes for a zero row
	reach      uint64 // how far the stored bytes go on without a gap to the end of the claim: one range request
	plain      bool   // stored exactly as it lies in the object
}

// batch returns the first batch of s. It ends where the reader's range ends: nothing else keeps its answer waiting.
func (t *transfer) batch(s span) batch {
	c := t.o.table.At(s.first)
	b := batch{
		span: span{s.first, s.first + 1}, off: c.Offset, end: c.End(),
		blob: c.BlobOffset, size: uint64(c.Stored), plain: c.Codec == rafs.CodecNone,
	}
	if c.Zero() {
		return b
	}
	b.reach = b.blob + b.size
	for i, open := b.last, true; i < s.last; i++ {
		c := t.o.table.At(i)
		open = open && i != t.want.last && !c.Zero() && c.End()-b.off <= maxBatch
		if c.Zero() {
			continue
		}
		if c.BlobOffset != b.reach {
			break
		}
		b.reach += uint64(c.Stored)
		if open {
			b.plain = b.plain && c.Codec == rafs.CodecNone && c.Offset-b.off == b.size
			b.last, b.end, b.size = i+1, c.End(), b.size+uint64(c.Stored)
		}
	}
	return b
}

// land is the order in which a byte becomes visible (I3): it is verified, then written, then marked, and only then is who
// waits for it answered.
func (t *transfer) land(ctx context.Context, b batch) error {
	p := t.copied(b)
	copied := p != nil
	if !copied {
		var err error
		if p, err = t.verified(ctx, b); err != nil {
			return err
		}
	}
	defer p.free()
	if err := t.write(b, p.b); err != nil {
		return err
	}
	if copied {
		t.o.copied.Add(int64(b.end - b.off))
		t.count.copied.Add(int64(b.end - b.off))
	}
	ready, complete := t.o.mark(b.span, t.epoch, t.want)
	if ready && t.demand != nil {
		t.demand.ready()
		t.demand = nil
	}
	if complete {
		t.finish(t.o)
	}
	t.index.add(t.o, b.span)
	return nil
}

// verified fetches and decodes a batch and checks every digest. The result is padded with zeros to whole blocks.
func (t *transfer) verified(ctx context.Context, b batch) (*buffer, error) {
	if b.size == 0 {
		return zeros(), nil
	}
	out := getBuffer(int(b.end - b.off))
	stored := out
	if !b.plain {
		stored = getBuffer(int(b.size))
		defer stored.free()
	}
	if t.demand != nil && (b.size > quickBytes || !t.in.use.local) {
		t.turn.pass()
	}
	err := t.in.read(ctx, b, stored.b[:b.size])
	for i := b.first; err == nil && i < b.last; i++ {
		c := t.o.table.At(i)
		from := c.BlobOffset - b.blob
		dst := out.b[c.Offset-b.off : c.End()-b.off]
		err = t.decoder.Decode(c, t.o.table.Algo(), stored.b[from:from+uint64(c.Stored)], dst[:c.Size])
		clear(dst[c.Size:])
	}
	if err != nil {
		out.free()
		return nil, fmt.Errorf("object %s: %w", t.o.key, err)
	}
	return out, nil
}

// write writes a batch at its place; p is repeated where it is shorter (zeros).
func (t *transfer) write(b batch, p []byte) error {
	for off := b.off; off < b.end; off += uint64(len(p)) {
		p = p[:min(uint64(len(p)), b.end-off)]
		err := t.room.admit(t.o.key.Domain, int64(len(p)))
		if err == nil {
			if err = t.engine.WriteAt(t.o.key, p, int64(off)); noRoom(err) {
				t.room.full()
			}
		}
		if err != nil {
			return fmt.Errorf("%w: object %s, %d bytes at %d: %w", errWrite, t.o.key, len(p), off, err)
		}
	}
	return nil
}

// finish tells the engine that the object is complete, in a goroutine of its own, for fsync takes its time: filler's
// background waits for it, and so does whoever makes the engine forget the object: the engine knows it by its key, under
// which another may be there next, and taking the mark off that one would show its holes (I1). A failed fsync is not tried again (what it lost cannot be known): the object stays as one that
// the kernel asks for, and the daemon answers.
//
// A successor waits with that until its predecessor has ended, which may cull parts of the object if the upgrade fails.
func (f *filler) finish(o *object) {
	if f.unsettled.Load() {
		return // settle comes back to it
	}
	o.completing.Add(1)
	changes := o.changed()
	f.background.Go(func() {
		defer o.completing.Done()
		err := f.engine.Sync(o.key)
		if o.synced(changes, err, f.cullsParts) {
			err = f.engine.Complete(o.key)
			o.ended(changes, err)
		}
		if err != nil && !errors.Is(err, fscache.ErrUnknown) { // unmounted meanwhile
			f.log.Error("object is complete but cannot be left to the kernel", zap.Stringer("object", o.key), zap.Error(err))
		}
	})
}

// A stream is a range of a blob that is being read.
type stream struct {
	use *use
	o   *object
	r   io.ReadCloser
	at  uint64 // offset in the blob of the next byte of r
}

// read fills p, which is b's size, with b's stored bytes: from the open range if it goes on there, else from a new one
// as far as b reaches.
func (s *stream) read(ctx context.Context, b batch, p []byte) error {
	if s.r == nil || s.at != b.blob {
		s.close()
		s.use.stats.requests.Add(1)
		r, err := s.use.src.ReadRange(ctx, int64(b.blob), int64(b.reach-b.blob))
		if err != nil {
			return err
		}
		s.r, s.at = r, b.blob
	}
	n, err := io.ReadFull(s.r, p)
	s.at += uint64(n)
	s.o.fetched.Add(int64(n))
	s.use.stats.fetched.Add(int64(n))
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		err = fmt.Errorf("read %s: it ends at offset %d: %w", s.use.src, s.at, source.ErrShort)
	}
	return err
}

func (s *stream) close() {
	if s.r != nil {
		s.r.Close() // reading only: nothing to lose
		s.r = nil
	}
}
