package plain

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// sparse makes a file of 16 blocks, of which some were written.
func sparse(t *testing.T, blocks ...int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(16 * fscache.BlockSize); err != nil {
		t.Fatal(err)
	}
	for _, b := range blocks {
		if _, err := f.WriteAt(make([]byte, fscache.BlockSize), b*fscache.BlockSize); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func stamp(t *testing.T, path string) string {
	t.Helper()
	f, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, err := f.Stamp()
	if err := errors.Join(err, f.Sync()); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestExtentsAreWhatWasWrittenZerosOrNot(t *testing.T) {
	f, err := Open(sparse(t, 1, 2, 15))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const b = fscache.BlockSize
	for size, want := range map[int64][]fscache.Extent{
		16 * b: {{Off: b, Len: 2 * b}, {Off: 15 * b, Len: b}},
		2 * b:  {{Off: b, Len: b}},
		32 * b: {{Off: b, Len: 2 * b}, {Off: 15 * b, Len: b}}, // a file that ends before it should
		b:      nil,
	} {
		if got, err := f.Extents(size); err != nil || !slices.Equal(got, want) {
			t.Errorf("of %d bytes: %v, %v, want %v", size, got, err, want)
		}
	}
}

func TestStampChangesWithWhateverIsDoneToTheContentAndWithNothingElse(t *testing.T) {
	path := sparse(t, 0, 1)
	open := func(t *testing.T) *os.File {
		t.Helper()
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	first := stamp(t, path)
	f := open(t)
	if _, err := f.ReadAt(make([]byte, 10), 0); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if got := stamp(t, path); got != first {
		t.Errorf("after a read it is %s, was %s", got, first)
	}
	// In an order in which each change is to be seen beside the one before.
	for name, change := range map[string]func(f *os.File) error{
		"written": func(f *os.File) error { _, err := f.WriteAt([]byte{0}, 0); return err },
		"punched": func(f *os.File) error {
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096)
		},
		"truncated": func(f *os.File) error { return f.Truncate(16*fscache.BlockSize - 1) },
		"replaced": func(f *os.File) error {
			p, err := os.ReadFile(path)
			return errors.Join(err, os.Remove(path), os.WriteFile(path, p, 0o600))
		},
		"set back": func(f *os.File) error {
			fi, err := f.Stat()
			_, err2 := f.WriteAt([]byte{1}, 0)
			return errors.Join(err, err2, os.Chtimes(path, fi.ModTime(), fi.ModTime()))
		},
	} {
		before := stamp(t, path)
		f := open(t)
		if err := change(f); err != nil {
			t.Fatal(name, err)
		}
		f.Close()
		if after := stamp(t, path); after == before {
			t.Errorf("%s: the stamp is still %s", name, after)
		}
	}
}

func TestOnlyRegularFilesAreOpened(t *testing.T) {
	dir := t.TempDir()
	link, fifo := filepath.Join(dir, "link"), filepath.Join(dir, "fifo")
	if err := errors.Join(os.Symlink(sparse(t), link), unix.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{link, fifo, dir} {
		if f, err := Open(path); err == nil {
			f.Close()
			t.Errorf("%s was opened", path)
		}
	}
	if _, err := Open(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of no file: %v", err)
	}
}

func TestFileThatCannotBeSealedIsAnErrorThatSaysWhatIsMissing(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	how, err := Seal(sparse(t, 0))
	switch {
	case err == nil && !strings.HasPrefix(how, "fs-verity sha256:"):
		t.Errorf("sealed by %q", how)
	case err != nil && (!strings.Contains(err.Error(), "feature verity") || !strings.Contains(err.Error(), "veritysetup")):
		t.Errorf("%v", err)
	}
}
