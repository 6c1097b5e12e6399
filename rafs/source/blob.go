package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
)

// A blob is a Source: one blob of a Repository.
type blob struct {
	repo   *Repository
	digest string
	size   int64

	// location is where the registry last redirected to, outside itself: asked first, which saves a round trip, and
	// forgotten when it no longer answers, for such addresses are often signed and short-lived.
	location atomic.Pointer[string]
}

// Blob returns the blob with a digest ("sha256:<hex>") and a size in bytes. Nothing is asked of the registry.
func (r *Repository) Blob(digest string, size int64) Source {
	return &blob{repo: r, digest: digest, size: size}
}

func (b *blob) Size() int64    { return b.size }
func (b *blob) String() string { return b.repo.String() + "@" + b.digest }
func (b *blob) Close() error   { return nil } // the connections are the Repository's

// ReadRange asks for the range in one request, which may be redirected.
func (b *blob) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	if err := CheckRange(b.String(), off, n, b.size); err != nil {
		return nil, err
	}
	place := func(err error) error {
		return fmt.Errorf("read %s, bytes %d to %d: %w", b, off, off+n-1, err)
	}
	resp, err := b.ask(ctx, off, n)
	if err != nil {
		return nil, place(err)
	}
	if err := b.check(resp, off, n); err != nil {
		resp.Body.Close()
		return nil, place(err)
	}
	whole := resp.StatusCode == http.StatusOK // goes on behind the range, as it should
	return &rangeReader{body: resp.Body, left: n, exact: whole || resp.ContentLength == n, place: place}, nil
}

// ask sends the request: to where the registry last redirected, if it did and that still works, else to the registry.
func (b *blob) ask(ctx context.Context, off, n int64) (*http.Response, error) {
	header := http.Header{
		"Range":           {fmt.Sprintf("bytes=%d-%d", off, off+n-1)},
		"Accept-Encoding": {"identity"},
	}
	if loc := b.location.Load(); loc != nil {
		resp, err := fetch(ctx, b.repo.direct, *loc, header)
		if err == nil && (resp.StatusCode < 400 || resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= 500) {
			return resp, nil
		}
		b.location.CompareAndSwap(loc, nil)
		if err != nil {
			return nil, err
		}
		resp.Body.Close()
	}
	resp, err := b.repo.get(ctx, "/blobs/"+b.digest, header)
	if err != nil {
		return nil, err
	}
	if u := resp.Request.URL; resp.StatusCode == http.StatusPartialContent && u.Host != b.repo.repo.RegistryStr() {
		loc := u.String()
		b.location.Store(&loc)
	}
	return resp, nil
}

// check reports whether the answer's status and headers promise the n bytes at off.
func (b *blob) check(resp *http.Response, off, n int64) error {
	if e := resp.Header.Get("Content-Encoding"); e != "" && e != "identity" && resp.StatusCode < 300 {
		return Permanent(fmt.Errorf("the answer is encoded (%s), so its range is not one of the blob: %w", printable(e), ErrShort))
	}
	switch resp.StatusCode {
	case http.StatusPartialContent:
		if !rangeIs(resp.Header.Get("Content-Range"), off, n, b.size) {
			return fmt.Errorf("the answer is for %q of %d: %w", printable(resp.Header.Get("Content-Range")), b.size, ErrShort)
		}
		if resp.ContentLength >= 0 && resp.ContentLength != n {
			return fmt.Errorf("the answer has %d bytes: %w", resp.ContentLength, ErrShort)
		}
	case http.StatusOK: // the whole blob: a server may do so, and what comes first is what was wanted only at offset 0
		if resp.ContentLength >= 0 && resp.ContentLength != b.size {
			return fmt.Errorf("the whole blob has %d bytes there, the image says %d: %w", resp.ContentLength, b.size, ErrShort)
		}
		if off != 0 {
			return Permanent(errors.New("the registry answers range requests with the whole blob: it cannot serve lazily loaded images, use another registry or a mirror of it"))
		}
	default:
		err := statusError(resp)
		if resp.StatusCode == http.StatusRequestedRangeNotSatisfiable {
			return Permanent(errors.Join(err, ErrShort))
		}
		return err
	}
	return nil
}

// rangeIs reports whether a Content-Range header (RFC 9110, 14.4: "bytes first-last/total", total may be "*") is for
// exactly the n bytes at off of a blob of size bytes.
func rangeIs(h string, off, n, size int64) bool {
	unit, rest, _ := strings.Cut(h, " ")
	span, total, ok := strings.Cut(rest, "/")
	first, last, ok2 := strings.Cut(span, "-")
	if !ok || !ok2 || !strings.EqualFold(unit, "bytes") {
		return false
	}
	return first == strconv.FormatInt(off, 10) && last == strconv.FormatInt(off+n-1, 10) &&
		(total == "*" || total == strconv.FormatInt(size, 10))
}

// A rangeReader cuts an answer's body at the length asked for.
type rangeReader struct {
	body  io.ReadCloser
	left  int64
	exact bool // no need to look whether the body ends there
	done  error
	place func(error) error
}

func (r *rangeReader) Read(p []byte) (int, error) {
	if r.done != nil {
		return 0, r.done
	}
	if r.left == 0 {
		r.done = r.end()
		return 0, r.done
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := r.body.Read(p[:min(int64(len(p)), r.left)])
	r.left -= int64(n)
	if err == nil || r.left == 0 {
		return n, nil
	}
	if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) {
		r.done = r.place(fmt.Errorf("the answer ended %d bytes early: %w", r.left, ErrShort))
	} else {
		r.done = r.place(clean(err))
	}
	return n, r.done
}

// end is what the reader returns after the last byte: io.EOF, or an error if the body of an answer without a length
// goes on.
func (r *rangeReader) end() error {
	if r.exact {
		return io.EOF
	}
	var one [1]byte
	for range 100 {
		n, err := r.body.Read(one[:])
		switch {
		case n > 0:
			return r.place(fmt.Errorf("the answer goes on after the range: %w", ErrShort))
		case err == io.EOF:
			return io.EOF
		case err != nil:
			return r.place(clean(err))
		}
	}
	return r.place(io.ErrNoProgress)
}

func (r *rangeReader) Close() error { return r.body.Close() }
