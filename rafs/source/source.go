package source

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// A Source holds one blob and gives out ranges of it. All methods may be called from any goroutine.
type Source interface {
	// ReadRange starts reading the n bytes at off (both > 0 resp. >= 0, inside Size). The reader yields exactly n bytes
	// and then io.EOF, or an error: [ErrShort] when the source ends early or answers another range; errors for which
	// trying again is pointless satisfy [IsPermanent]. The caller closes the reader; cancelling ctx unblocks it.
	// Nothing is retried here: the one who calls owns retries.
	ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error)
	// Size is the blob's length in bytes.
	Size() int64
	// String names the source for logs and errors; it holds no credentials.
	String() string
	// Close frees what the source holds. Readers must have been closed before.
	Close() error
}

// ErrShort means that a source gave fewer bytes, more bytes or another range than it was asked for.
var ErrShort = errors.New("wrong range")

type permanentError struct{ err error }

func (e *permanentError) Error() string { return e.err.Error() }
func (e *permanentError) Unwrap() error { return e.err }

// Permanent marks err as one that trying again will not mend (not found, not allowed, not a range server).
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return &permanentError{err}
}

// IsPermanent reports whether err was marked with [Permanent].
func IsPermanent(err error) bool {
	var p *permanentError
	return errors.As(err, &p)
}

// CheckRange returns a permanent error unless [off, off+n) lies inside a blob of size bytes and n > 0.
func CheckRange(name string, off, n, size int64) error {
	if off < 0 || n <= 0 || off > size || n > size-off {
		return Permanent(fmt.Errorf("read %s: range [%d, +%d) is outside its %d bytes: %w", name, off, n, size, ErrShort))
	}
	return nil
}
