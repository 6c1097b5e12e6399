package source

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"
)

// A File is a blob in a local file: a blob of an OCI image layout, or of a directory of blobs named by id.
type File struct {
	path string
	size int64

	mu     sync.Mutex // guards the fields below; held while the file is opened
	f      *os.File   // nil until the first range is read
	closed bool
}

// NewFile returns the blob in the file path, which must have size bytes. The file is opened when the first range of it
// is read, and that read's error tells when it is missing or of another size.
func NewFile(path string, size int64) *File { return &File{path: path, size: size} }

// OpenFile opens the blob in the file path, whatever its size.
func OpenFile(path string) (*File, error) {
	f, fi, err := OpenRegular(path)
	if err != nil {
		return nil, err
	}
	return &File{path: path, size: fi.Size(), f: f}, nil
}

// OpenRegular opens a regular file for reading; errors are permanent, unless it is this process that has no descriptor left. What else path may be is not opened: that of a FIFO would
// wait for a writer.
func OpenRegular(path string) (*os.File, os.FileInfo, error) {
	fi, err := os.Stat(path)
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		return nil, nil, Permanent(fmt.Errorf("open file: %w", err))
	}
	f, err := os.Open(path)
	if scarce(err) {
		return nil, nil, fmt.Errorf("open file: %w (raise LimitNOFILE=)", err)
	}
	if err != nil {
		return nil, nil, Permanent(fmt.Errorf("open file: %w", err))
	}
	if fi, err = f.Stat(); err != nil {
		f.Close()
		return nil, nil, Permanent(fmt.Errorf("open file: %w", err))
	}
	return f, fi, nil
}

// ReadFile reads a regular file of at most limit bytes. Errors are permanent as [OpenRegular]'s; that about a larger one wraps [ErrTooLarge].
func ReadFile(path string, limit int64) ([]byte, error) {
	f, fi, err := OpenRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi.Size() > limit {
		return nil, Permanent(fmt.Errorf("%w: %s has %d bytes, at most %d are possible", ErrTooLarge, path, fi.Size(), limit))
	}
	b := make([]byte, fi.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, Permanent(fmt.Errorf("read %s: %w", path, err))
	}
	return b, nil
}

// Size is the blob's length in bytes.
func (s *File) Size() int64 { return s.size }

// String is the file's path.
func (s *File) String() string { return s.path }

// file returns the open file, opening it if need be.
func (s *File) file() (*os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, Permanent(fmt.Errorf("read %s: %w", s.path, os.ErrClosed))
	}
	if s.f != nil {
		return s.f, nil
	}
	f, fi, err := OpenRegular(s.path)
	if err != nil {
		return nil, err
	}
	if fi.Size() != s.size {
		f.Close()
		return nil, Permanent(fmt.Errorf("open blob %s: it has %d bytes, the image says %d: is it complete? %w", s.path, fi.Size(), s.size, ErrShort))
	}
	s.f = f
	return f, nil
}

// ReadRange returns the n bytes at off. It opens nothing (but the file, the first time) and reads nothing by itself.
func (s *File) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	if err := CheckRange(s.path, off, n, s.size); err != nil {
		return nil, err
	}
	if err := context.Cause(ctx); err != nil {
		return nil, fmt.Errorf("read %s: %w", s.path, err)
	}
	f, err := s.file()
	if err != nil {
		return nil, err
	}
	return &section{ctx: ctx, f: f, off: off, left: n}, nil
}

// Close closes the file.
func (s *File) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.f == nil {
		return nil
	}
	f := s.f
	s.f = nil
	return f.Close()
}

// A section reads a part of a file with pread(2), so that any number of them share one descriptor.
type section struct {
	ctx  context.Context // of the one call that this reader is the answer to
	f    *os.File
	off  int64
	left int64
}

func (r *section) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	if err := context.Cause(r.ctx); err != nil {
		return 0, fmt.Errorf("read %s: %w", r.f.Name(), err)
	}
	p = p[:min(int64(len(p)), r.left)]
	n, err := r.f.ReadAt(p, r.off)
	r.off += int64(n)
	r.left -= int64(n)
	switch {
	case n == len(p):
		return n, nil
	case err == io.EOF:
		return n, fmt.Errorf("read %s: it ends at offset %d, %d bytes early: %w", r.f.Name(), r.off, r.left, ErrShort)
	}
	return n, fmt.Errorf("read blob: %w", err)
}

func (r *section) Close() error { return nil }
