package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"runtime"
	"sort"

	"golang.org/x/sync/errgroup"

	"holdfast/rafs"
	"holdfast/rafs/blob"
	"holdfast/rafs/source"
)

// checkBlob reads a blob file once from start to end, decodes its chunks as they come by, and compares the digest of the
// whole. At most two chunks a processor are in memory.
func (c *checker) checkBlob(ctx context.Context, n int) error {
	b := c.img.Blobs[n]
	dec, err := blob.NewDecoder()
	if err != nil {
		return err
	}
	s := &scan{checker: c, n: n, blob: b, dec: dec, hash: sha256.New(), workers: runtime.GOMAXPROCS(0)}
	s.buffers = make(chan []byte, s.workers)
	for range s.workers {
		s.buffers <- nil
	}
	err = s.run(ctx)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, errEnough):
		return err
	case s.lost != nil:
		return s.lost
	case source.IsPermanent(err), errors.Is(err, source.ErrShort), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return c.damage("blob file %s: %v", b.Source, err)
	case err != nil: // the network's fault, not the image's
		return err
	}
	if _, bare := c.img.store.(directory); bare {
		return nil // the id of such a blob need not be the file's digest (FORMATS.md 1.9)
	}
	c.report.LayerDigests++
	if got := hex.EncodeToString(s.hash.Sum(nil)); got != b.Info.ID {
		return c.damage("blob file %s: its content has sha256 %s", b.Source, got)
	}
	return nil
}

// A scan is the reading of one blob file.
type scan struct {
	*checker
	n       int // of the blob
	blob    *Blob
	dec     *blob.Decoder
	hash    hash.Hash
	workers int
	buffers chan []byte // one for each worker, made when first wanted
	lost    error       // guarded by mu: why keep failed
}

func (s *scan) run(ctx context.Context) error {
	size := s.blob.Source.Size()
	if size == 0 {
		return nil
	}
	file, err := s.blob.Source.ReadRange(ctx, 0, size)
	if err != nil {
		return err
	}
	defer file.Close()
	in := &counted{r: io.TeeReader(file, s.hash), checker: s.checker}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(s.workers)
	err = s.feed(ctx, in, g)
	if err == nil {
		_, err = io.Copy(io.Discard, in)
	}
	return errors.Join(err, g.Wait())
}

// feed cuts the stored chunks out of the file, in the order in which they lie in it, and hands them to workers.
func (s *scan) feed(ctx context.Context, in *counted, g *errgroup.Group) error {
	for _, row := range s.order() {
		c := s.blob.Table.At(row)
		buf := <-s.buffers
		need := int(c.Stored) + int(c.Size)
		if cap(buf) < need+blob.Slack {
			buf = make([]byte, need+blob.Slack)
		}
		buf = buf[:need]
		stored := buf[:c.Stored]
		if err := s.read(ctx, in, c, stored); err != nil {
			s.buffers <- buf
			return err
		}
		g.Go(func() error {
			defer func() { s.buffers <- buf }()
			err := s.dec.Decode(c, s.blob.Table.Algo(), stored, buf[c.Stored:])
			if err != nil {
				return s.damage("blob file %s: chunk %d: %v", s.blob.Source, row, err)
			}
			if s.keep != nil {
				err = s.keep(s.n, c.Offset, buf[c.Stored:])
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			if err != nil {
				s.lost = err
				return err
			}
			s.report.Chunks++
			s.report.ChunkBytes += uint64(c.Size)
			return nil
		})
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

// order returns the rows with stored bytes by their place in the file.
func (s *scan) order() []int {
	t := s.blob.Table
	rows := make([]int, 0, t.Len())
	for i := range t.Len() {
		if !t.At(i).Zero() {
			rows = append(rows, i)
		}
	}
	sort.SliceStable(rows, func(i, j int) bool { return t.At(rows[i]).BlobOffset < t.At(rows[j]).BlobOffset })
	return rows
}

// read fills p with the stored bytes of c: from the stream, or, if they overlap with those of the row before, anew.
func (s *scan) read(ctx context.Context, in *counted, c rafs.Chunk, p []byte) error {
	at := func(err error) error {
		return fmt.Errorf("chunk at object offset %d, %d bytes at blob offset %d: %w", c.Offset, c.Stored, c.BlobOffset, err)
	}
	if c.BlobOffset < in.off {
		r, err := s.blob.Source.ReadRange(ctx, int64(c.BlobOffset), int64(c.Stored))
		if err != nil {
			return at(err)
		}
		defer r.Close()
		if _, err = io.ReadFull(r, p); err != nil {
			return at(err)
		}
		return nil
	}
	if _, err := io.CopyN(io.Discard, in, int64(c.BlobOffset-in.off)); err != nil {
		return at(err)
	}
	if _, err := io.ReadFull(in, p); err != nil {
		return at(err)
	}
	return nil
}

// A counted reader knows how far it is.
type counted struct {
	*checker
	r   io.Reader
	off uint64
}

func (r *counted) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.off += uint64(n)
	r.advance(uint64(n))
	return n, err
}
