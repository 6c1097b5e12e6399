package convert

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"holdfast/rafs/oci"
	"holdfast/rafs/source"
)

// A layerReader reads one layer of a source: its tree, and its content into a blob.
type layerReader struct {
	layer         *layer
	chunks        *chunker
	read          *atomic.Int64 // bytes read of the source
	sparse        uint64        // bytes that the sparse files still to come may have
	skippedXattrs int
}

const (
	streamBuffer = 1 << 20
	// maxWindow is the largest window of a zstd stream: what zstd --long=27 makes, and more than the tool itself
	// decodes without being told to.
	maxWindow = 128 << 20
)

// readTarStream reads a layer from a tar that may be compressed, which its first bytes tell.
func (r *layerReader) readTarStream(ctx context.Context, in io.Reader) error {
	br := bufio.NewReaderSize(meter{in, r.read}, streamBuffer)
	head, err := br.Peek(4)
	if err != nil && err != io.EOF {
		return err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(br)
		if err != nil {
			return fmt.Errorf("uncompress gzip: %w", err)
		}
		defer z.Close()
		return r.readAhead(ctx, named{z, "gzip"})
	case isZstd(head):
		z, err := zstd.NewReader(br, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(2))
		if err != nil {
			return fmt.Errorf("uncompress zstd: %w", err)
		}
		defer z.Close() // ends its goroutines
		return r.readTar(ctx, named{z, "zstd"})
	}
	return r.readTar(ctx, br)
}

// isZstd reports whether b starts with the magic of a zstd frame or of a skippable frame (RFC 8878, 3.1).
func isZstd(b []byte) bool {
	return bytes.Equal(b, []byte{0x28, 0xb5, 0x2f, 0xfd}) || len(b) == 4 && b[0]&0xf0 == 0x50 && bytes.Equal(b[1:], []byte{0x2a, 0x4d, 0x18})
}

// readAhead reads a tar, which is expensive to read, in a goroutine of its own.
func (r *layerReader) readAhead(ctx context.Context, in io.Reader) error {
	a := newAhead(in)
	defer a.stop()
	return r.readTar(ctx, a)
}

// named says in errors what the reader decodes.
type named struct {
	r    io.Reader
	what string
}

func (n named) Read(p []byte) (int, error) {
	k, err := n.r.Read(p)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("uncompress %s: %w", n.what, err)
	}
	return k, err
}

// A meter adds what is read to a counter that others look at.
type meter struct {
	r io.Reader
	n *atomic.Int64
}

func (m meter) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	m.n.Add(int64(n))
	return n, err
}

// An ahead reads up to four buffers ahead of its reader.
type ahead struct {
	full  chan aheadPart
	empty chan []byte
	quit  chan struct{}
	cur   aheadPart
	pos   int
}

type aheadPart struct {
	b   []byte
	err error // after b
}

func newAhead(r io.Reader) *ahead {
	a := &ahead{full: make(chan aheadPart, 4), empty: make(chan []byte, 4), quit: make(chan struct{})}
	for range 4 {
		a.empty <- make([]byte, streamBuffer/4)
	}
	// Owned by the ahead: it ends after r's end or error, or when stop closes quit, and stop waits for it.
	go func() {
		defer close(a.full)
		for {
			var b []byte
			select {
			case b = <-a.empty:
			case <-a.quit:
				return
			}
			n, err := fill(r, b)
			a.full <- aheadPart{b[:n], err} // has room for every buffer
			if err != nil {
				return
			}
		}
	}()
	return a
}

// fill reads until b is full or r fails, with the error as r gives it.
func fill(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var k int
		k, err = r.Read(b[n:])
		n += k
	}
	return n, err
}

func (a *ahead) Read(p []byte) (int, error) {
	for a.pos == len(a.cur.b) {
		if a.cur.err != nil {
			return 0, a.cur.err
		}
		if a.cur.b != nil {
			a.empty <- a.cur.b[:cap(a.cur.b)]
		}
		a.cur, a.pos = <-a.full, 0
	}
	n := copy(p, a.cur.b[a.pos:])
	a.pos += n
	return n, nil
}

// stop ends the goroutine and waits for it.
func (a *ahead) stop() {
	close(a.quit)
	for range a.full {
	}
}

// A verifier reads a blob and turns its end into an error unless it has the digest that its manifest gives.
type verifier struct {
	r    io.Reader
	sum  hash.Hash
	want string // sha256, hex
}

func (v *verifier) Read(p []byte) (int, error) {
	n, err := v.r.Read(p)
	v.sum.Write(p[:n])
	if err != io.EOF {
		return n, err
	}
	if got := hex.EncodeToString(v.sum.Sum(nil)); got != v.want {
		return n, fmt.Errorf("%w: its digest is sha256:%s: fetch the image again", oci.ErrFormat, got)
	}
	return n, io.EOF
}

// readBlob reads a layer from a blob of an image, and checks its digest.
func (r *layerReader) readBlob(ctx context.Context, src source.Source, want string) error {
	raw := &resumer{ctx: ctx, src: src}
	defer raw.Close()
	v := &verifier{r: raw, sum: sha256.New(), want: want}
	err := r.readTarStream(ctx, v)
	if ctx.Err() != nil || errors.Is(err, oci.ErrFormat) {
		return err
	}
	// Damage is the better explanation of whatever it led to.
	if _, end := io.Copy(io.Discard, v); end != nil && (err == nil || errors.Is(end, oci.ErrFormat)) {
		return end
	}
	return err
}

// maxTries is how often a blob is asked for again at one offset.
const maxTries = 5

// A resumer reads a blob from its start to its end, and goes on where it was when the source fails for a while.
type resumer struct {
	ctx   context.Context // of the one call that this reader serves
	src   source.Source
	cur   io.ReadCloser
	off   int64
	tries int // without a byte
}

func (s *resumer) Read(p []byte) (int, error) {
	for {
		if s.off == s.src.Size() {
			return 0, io.EOF
		}
		n, err := s.read(p)
		s.off += int64(n)
		if n > 0 {
			s.tries = 0
			return n, nil
		}
		if err == nil {
			continue
		}
		s.Close()
		if s.tries++; source.IsPermanent(err) || s.ctx.Err() != nil || s.tries == maxTries {
			return 0, fmt.Errorf("read at offset %d: %w", s.off, err)
		}
		if err := pause(s.ctx, 250*time.Millisecond<<s.tries); err != nil {
			return 0, err
		}
	}
}

func (s *resumer) read(p []byte) (int, error) {
	if s.cur == nil {
		r, err := s.src.ReadRange(s.ctx, s.off, s.src.Size()-s.off)
		if err != nil {
			return 0, err
		}
		s.cur = r
	}
	n, err := s.cur.Read(p)
	if err == io.EOF && s.off+int64(n) < s.src.Size() {
		err = source.ErrShort
	}
	return n, err
}

// Close closes the current answer.
func (s *resumer) Close() error {
	if s.cur == nil {
		return nil
	}
	err := s.cur.Close()
	s.cur = nil
	return err
}

// pause waits for d, or until ctx is cancelled, which is an error.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
