package blob

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/pierrec/lz4/v4"

	"holdfast/rafs"
	"holdfast/rafs/tree"
)

// Options say how a [Writer] writes.
type Options struct {
	Blob      int    // 1 + index in the image's list of blobs: ChunkRef.Blob of the chunks stored here
	ChunkSize uint32 // bytes, a power of two, rafs.MinChunkSize to rafs.MaxChunkSize
	Codec     rafs.Codec
	Digest    rafs.DigestAlgo
	Workers   int    // goroutines that compress; 0: as many as the machine has processors
	Dedup     *Dedup // nil: chunks are only compared with those of this blob
}

// Stats are a Writer's counts so far.
type Stats struct {
	Bytes        uint64 // of chunks, deduplicated ones included
	Stored       uint64 // of chunk data in the blob
	Chunks       uint64 // stored in the blob
	Deduplicated uint64 // chunks that were already stored
}

// A Writer writes one blob. Buffer, Add, Flush, Info, Finish and Close are for one goroutine, Stats for any.
//
// Chunks travel in batches: Buffer and Add fill one, a worker hashes and compresses its chunks, and one goroutine commits
// the batches in the order they were filled. Memory is bounded by the number of batches, Workers + 3, of 1 MiB or one
// chunk, and as much again for what they are compressed to.
type Writer struct {
	o       Options
	out     *bufio.Writer
	sum     hash.Hash // of everything written to out
	batches int
	free    chan *batch
	work    chan *batch
	order   chan *batch
	done    sync.WaitGroup // workers and the committing goroutine
	cur     *batch         // being filled; nil: take one from free
	closed  bool
	sealed  *seal              // set by Info
	zeros   func() rafs.Digest // of a whole chunk of zeros

	// Of the committing goroutine; others may look when it is idle, after Flush.
	rows   []rafs.Chunk
	stored uint64 // bytes of chunk data
	size   uint64 // bytes of object, a multiple of rafs.BlockSize

	failed atomic.Pointer[error] // the first error of the committing goroutine

	bytes, storedNow, chunks, deduplicated atomic.Uint64
}

// A batch is a number of neighbouring chunks and the memory they lie in.
type batch struct {
	in     []byte
	used   int // bytes of in taken by pieces
	lent   int // bytes after those, given out by Buffer
	out    []byte
	pieces []piece
	ready  chan struct{} // capacity 1: the worker is done with it
}

type piece struct {
	p      []byte
	ref    *tree.ChunkRef
	digest rafs.Digest
	stored []byte // nil: a chunk known to be stored already
}

const (
	batchSize = 1 << 20
	outBuffer = 256 << 10
)

// ErrClosed is returned by a Writer's methods after Finish or Close.
var ErrClosed = errors.New("blob writer is closed")

// NewWriter returns a Writer that writes to out, which must not be written to by others, and starts its goroutines. They
// end with Finish or Close, one of which must be called.
func NewWriter(out io.Writer, o Options) (*Writer, error) {
	if o.ChunkSize < rafs.MinChunkSize || o.ChunkSize > rafs.MaxChunkSize || o.ChunkSize&(o.ChunkSize-1) != 0 {
		return nil, fmt.Errorf("write blob: chunk size %d: want a power of two from %d to %d", o.ChunkSize, rafs.MinChunkSize, rafs.MaxChunkSize)
	}
	if o.Digest != rafs.Blake3 && o.Digest != rafs.SHA256 {
		return nil, fmt.Errorf("write blob: unknown digest algorithm %s", o.Digest)
	}
	if o.Blob < 1 || o.Blob > rafs.MaxBlobs {
		return nil, fmt.Errorf("write blob: number %d: an image has at most %d blobs, counted from 1", o.Blob, rafs.MaxBlobs)
	}
	if o.Workers <= 0 {
		o.Workers = runtime.GOMAXPROCS(0)
	}
	if o.Dedup == nil {
		o.Dedup = NewDedup(nil, 0)
	}
	n := o.Workers + 3 // one being filled, one being committed, one waiting
	w := &Writer{
		o: o, sum: sha256.New(), batches: n,
		free: make(chan *batch, n), work: make(chan *batch, n), order: make(chan *batch, n),
	}
	w.zeros = sync.OnceValue(func() rafs.Digest { return o.Digest.Sum(make([]byte, o.ChunkSize)) })
	w.out = bufio.NewWriterSize(io.MultiWriter(w.sum, out), outBuffer)
	compressors := make([]compressor, o.Workers)
	for i := range compressors {
		var err error
		if compressors[i], err = newCompressor(o.Codec, o.ChunkSize); err != nil {
			return nil, fmt.Errorf("write blob: %w", err)
		}
	}
	for range n {
		w.free <- &batch{ready: make(chan struct{}, 1)}
	}
	// Owned by the Writer; they end when stop closes their channels, and stop waits for them.
	for _, c := range compressors {
		w.done.Go(func() { w.compress(c) })
	}
	w.done.Go(w.commit)
	return w, nil
}

// Buffer returns n bytes, at most one chunk, for the next Add to take. They need not be used; a second call gives the
// same bytes again.
func (w *Writer) Buffer(n int) []byte {
	n = max(0, min(n, int(w.o.ChunkSize)))
	if w.cur != nil && n > len(w.cur.in)-w.cur.used {
		w.dispatch()
	}
	if w.cur == nil {
		w.cur = <-w.free
		if w.cur.in == nil {
			w.cur.in = make([]byte, max(batchSize, int(w.o.ChunkSize)))
		}
	}
	b := w.cur
	b.lent = n
	return b.in[b.used : b.used+n : b.used+n]
}

// Add appends the chunk p, 1 byte to a chunk size long: all or the first bytes of what Buffer last returned. p belongs
// to the Writer from now on. *ref is set by the time Flush returns: to the chunk in this blob, to an equal chunk written
// earlier to this or another blob. Zeros are stored like anything else, once: see tree.Hole for why no hole is made of
// them. An error of the output is returned by this or a later call.
func (w *Writer) Add(p []byte, ref *tree.ChunkRef) error {
	if err := w.usable(); err != nil {
		return err
	}
	b := w.cur
	if len(p) == 0 || b == nil || len(p) > b.lent || &p[0] != &b.in[b.used] {
		return errors.New("write blob: the chunk is empty or not what Buffer returned last")
	}
	b.pieces = append(b.pieces, piece{p: p, ref: ref})
	b.used += len(p)
	b.lent = 0
	w.bytes.Add(uint64(len(p)))
	return nil
}

func (w *Writer) usable() error {
	if w.closed {
		return ErrClosed
	}
	if w.sealed != nil {
		return errors.New("write blob: chunks cannot be added once Info or Finish was called")
	}
	return w.err()
}

func (w *Writer) err() error {
	if p := w.failed.Load(); p != nil {
		return *p
	}
	return nil
}

// dispatch hands the batch being filled to the workers. Neither channel can be full: both have room for every batch.
func (w *Writer) dispatch() {
	b := w.cur
	w.cur = nil
	w.order <- b
	w.work <- b
}

// Flush waits until every chunk added is committed and its reference set.
func (w *Writer) Flush() error {
	if w.closed {
		return ErrClosed
	}
	w.flush()
	return w.err()
}

func (w *Writer) flush() {
	if w.cur != nil {
		w.dispatch()
	}
	all := make([]*batch, w.batches)
	for i := range all {
		all[i] = <-w.free
	}
	for _, b := range all {
		w.free <- b
	}
}

// Close ends the Writer's goroutines. After Finish it does nothing; before, it gives the blob up.
func (w *Writer) Close() error {
	if !w.closed {
		w.flush()
		w.stop()
	}
	return nil
}

func (w *Writer) stop() {
	w.closed = true
	close(w.work)
	close(w.order)
	w.done.Wait()
}

// Stats returns the counts so far.
func (w *Writer) Stats() Stats {
	return Stats{
		Bytes:        w.bytes.Load(),
		Stored:       w.storedNow.Load(),
		Chunks:       w.chunks.Load(),
		Deduplicated: w.deduplicated.Load(),
	}
}

// compress is one worker. Whether a chunk is stored is for commit to say; but what is stored already stays so, so that
// finding it here spares compressing and changes nothing else.
func (w *Writer) compress(c compressor) {
	for b := range w.work {
		if b.out == nil && w.o.Codec != rafs.CodecNone {
			// What is stored is never longer than its chunk, so that there is always room to try the next.
			b.out = make([]byte, 0, len(b.in)+lz4.CompressBlockBound(int(w.o.ChunkSize)))
		}
		for i := range b.pieces {
			p := &b.pieces[i]
			p.digest = w.digest(p.p)
			if _, ok := w.o.Dedup.find(dedupKey{p.digest, uint32(len(p.p))}); !ok {
				b.out, p.stored = c(b.out, p.p)
			}
		}
		b.ready <- struct{}{}
	}
}

// digest returns p's digest. That of a whole chunk of zeros is computed once: sparse files have many.
func (w *Writer) digest(p []byte) rafs.Digest {
	if len(p) == int(w.o.ChunkSize) && allZero(p) {
		return w.zeros()
	}
	return w.o.Digest.Sum(p)
}

// commit writes the batches in the order they were filled. After an error it only recycles them, so that Buffer and
// Flush never wait for ever.
func (w *Writer) commit() {
	for b := range w.order {
		<-b.ready
		for i := range b.pieces {
			if w.err() != nil {
				break
			}
			if err := w.commitPiece(&b.pieces[i]); err != nil {
				err = fmt.Errorf("write blob: chunk %d at offset %d: %w", len(w.rows), w.stored, err)
				w.failed.Store(&err)
			}
		}
		clear(b.pieces)
		*b = batch{in: b.in, out: b.out[:0], pieces: b.pieces[:0], ready: b.ready}
		w.free <- b
	}
}

func (w *Writer) commitPiece(p *piece) error {
	key := dedupKey{p.digest, uint32(len(p.p))}
	if ref, ok := w.o.Dedup.find(key); ok {
		*p.ref = ref
		w.deduplicated.Add(1)
		return nil
	}
	c := rafs.Chunk{Offset: w.size, BlobOffset: w.stored, Size: uint32(len(p.p)), Stored: uint32(len(p.stored)), Digest: p.digest}
	if len(w.rows) >= rafs.MaxChunks || c.End() > rafs.MaxObjectSize || w.stored+uint64(c.Stored) >= rafs.MaxStoredSize {
		return fmt.Errorf("the layer does not fit into one blob (at most %d chunks, %d bytes stored): use larger chunks or split it", rafs.MaxChunks, uint64(rafs.MaxStoredSize))
	}
	if _, err := w.out.Write(p.stored); err != nil {
		return err
	}
	ref := tree.ChunkRef{Blob: w.o.Blob, Index: uint32(len(w.rows)), Offset: c.Offset}
	w.o.Dedup.add(key, ref)
	*p.ref = ref
	w.rows = append(w.rows, c)
	w.stored += uint64(c.Stored)
	w.size = c.End()
	w.chunks.Add(1)
	w.storedNow.Add(uint64(c.Stored))
	return nil
}
