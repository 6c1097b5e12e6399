package bootstrap

import (
	"encoding/binary"
	"fmt"
	"io"
)

// A file is a bootstrap that is read, either wholly in memory or piece by piece.
type file struct {
	r    io.ReaderAt
	size uint64
	name string
	data []byte // all of it, when in memory
}

// at returns n bytes at off, which the caller must not change. what names them in errors.
func (f *file) at(off, n uint64, what string) ([]byte, error) {
	if off > f.size || n > f.size-off {
		return nil, f.damaged(off, "%s of %d bytes ends after the file (%d bytes)", what, n, f.size)
	}
	if f.data != nil {
		return f.data[off : off+n], nil
	}
	b := make([]byte, n)
	if got, err := f.r.ReadAt(b, int64(off)); got < len(b) {
		return nil, fmt.Errorf("bootstrap %s: read %s at offset %d: %w", f.name, what, off, unexpected(err))
	}
	return b, nil
}

// load reads the whole file into memory.
func (f *file) load() error {
	// The size may be wrong: see whether the last byte is there before allocating.
	var last [1]byte
	if n, err := f.r.ReadAt(last[:], int64(f.size-1)); n < 1 {
		return fmt.Errorf("bootstrap %s: read last byte of %d: %w", f.name, f.size, unexpected(err))
	}
	data, err := f.at(0, f.size, "whole file")
	f.data = data
	return err
}

// unexpected turns the end of a file where bytes were wanted into an error that says so.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// decode reads a fixed-size structure at off.
func (f *file) decode(off uint64, v any, what string) error {
	b, err := f.at(off, uint64(binary.Size(v)), what)
	if err != nil {
		return err
	}
	_, err = binary.Decode(b, binary.LittleEndian, v)
	return err
}

func (f *file) damaged(off uint64, format string, args ...any) error {
	return fmt.Errorf("bootstrap %s: offset %d: %w: %w", f.name, off, ErrDamaged, fmt.Errorf(format, args...))
}

func (f *file) unsupported(off uint64, format string, args ...any) error {
	return fmt.Errorf("bootstrap %s: offset %d: %w: %w", f.name, off, ErrUnsupported, fmt.Errorf(format, args...))
}
