package source

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func writeBlob(t *testing.T, p []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "blob")
	if err := os.WriteFile(path, p, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// pattern is n bytes that differ at every offset a test is likely to confuse.
func pattern(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i*7 + i>>8)
	}
	return p
}

func readRange(ctx context.Context, s Source, off, n int64) ([]byte, error) {
	r, err := s.ReadRange(ctx, off, n)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

func TestFileGivesExactlyTheRange(t *testing.T) {
	data := pattern(10000)
	s := NewFile(writeBlob(t, data), int64(len(data)))
	defer s.Close()
	for _, r := range [][2]int64{{0, 1}, {0, 10000}, {9999, 1}, {4096, 4096}} {
		got, err := readRange(t.Context(), s, r[0], r[1])
		if err != nil || !bytes.Equal(got, data[r[0]:r[0]+r[1]]) {
			t.Errorf("range %v: %d bytes, %v", r, len(got), err)
		}
	}
}

func TestRangeOutsideTheBlobIsRefused(t *testing.T) {
	s := NewFile(writeBlob(t, pattern(100)), 100)
	defer s.Close()
	for _, r := range [][2]int64{{0, 0}, {-1, 5}, {100, 1}, {0, 101}, {1, 1<<63 - 1}, {50, -1}} {
		if _, err := s.ReadRange(t.Context(), r[0], r[1]); !IsPermanent(err) || !errors.Is(err, ErrShort) {
			t.Errorf("range %v: %v", r, err)
		}
	}
}

func TestFileOfAnotherSizeIsRefused(t *testing.T) {
	path := writeBlob(t, pattern(100))
	s := NewFile(path, 101)
	defer s.Close()
	_, err := s.ReadRange(t.Context(), 0, 10)
	if !IsPermanent(err) || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v", err)
	}
}

func TestMissingFileIsNamed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "gone")
	s := NewFile(path, 1)
	if _, err := s.ReadRange(t.Context(), 0, 1); !IsPermanent(err) || !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v", err)
	}
	if _, err := OpenFile(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("OpenFile: %v", err)
	}
	if _, err := OpenFile(t.TempDir()); !IsPermanent(err) {
		t.Errorf("OpenFile of a directory: %v", err)
	}
}

func TestFileCutShortWhileOpenSaysWhere(t *testing.T) {
	path := writeBlob(t, pattern(10000))
	s, err := OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := os.Truncate(path, 5000); err != nil {
		t.Fatal(err)
	}
	got, err := readRange(t.Context(), s, 4000, 2000)
	if len(got) != 1000 || !errors.Is(err, ErrShort) || !strings.Contains(err.Error(), "5000") {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestFileClosedOrCancelledGivesErrors(t *testing.T) {
	s := NewFile(writeBlob(t, pattern(100)), 100)
	ctx, cancel := context.WithCancel(t.Context())
	r, err := s.ReadRange(ctx, 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := r.Read(make([]byte, 10)); !errors.Is(err, context.Canceled) {
		t.Errorf("read after cancel: %v", err)
	}
	s.Close()
	if _, err := s.ReadRange(t.Context(), 0, 100); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

func TestRangesOfAFileShareOneDescriptor(t *testing.T) {
	s := NewFile(writeBlob(t, pattern(100)), 100)
	defer s.Close()
	before := countFDs()
	for range 50 {
		r, err := s.ReadRange(t.Context(), 0, 100)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
	}
	if n := countFDs() - before; n > 1 {
		t.Errorf("50 readers hold %d descriptors", n)
	}
}
