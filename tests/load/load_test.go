package load

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// plainCopy writes the files of an image to a directory: the readers cannot tell it from a mount.
func plainCopy(t *testing.T, i Image) string {
	t.Helper()
	dir := t.TempDir()
	for _, f := range i.List() {
		b := make([]byte, f.Size)
		f.Fill(b, 0)
		if err := os.WriteFile(filepath.Join(dir, f.Path), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestReadersAndCompareSeeEachWrongByte(t *testing.T) {
	image := Image{Layers: 2, Files: 3, Size: 20_000}
	for _, tt := range []struct {
		name  string
		spoil func(path string) error
		says  string
	}{
		{"nothing", func(string) error { return nil }, ""},
		{"one byte", func(p string) error { return poke(p, 9_999, "?") }, "wrong bytes"},
		{"a page of zeros", func(p string) error { return poke(p, 4096, strings.Repeat("\x00", 4096)) }, "O1"},
		{"zeros to the end", func(p string) error { return poke(p, 16384, strings.Repeat("\x00", 3616)) }, "zeros"},
		{"another file's bytes", func(p string) error { return os.Rename(filepath.Join(filepath.Dir(p), "l1-f0"), p) }, "O1"},
		{"a short file", func(p string) error { return os.Truncate(p, 5000) }, "O"},
		{"no file", os.Remove, "O2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := plainCopy(t, image)
			if err := tt.spoil(filepath.Join(dir, "l0-f0")); err != nil {
				t.Fatal(err)
			}
			r := Start(Config{Dir: dir, Image: image, Readers: 3, Bound: 10 * time.Second})
			for r.Fresh() > 0 {
				time.Sleep(time.Millisecond)
			}
			for what, err := range map[string]error{"readers": r.Stop(), "compare": image.Compare(dir)} {
				if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
					t.Errorf("%s: %v, want one that says %q", what, err, tt.says)
				}
			}
		})
	}
}

func TestReadersTellOfAReadThatDoesNotComeBack(t *testing.T) {
	dir := t.TempDir()
	image := Image{Layers: 1, Files: 1, Size: PageSize}
	// Opening a FIFO that nobody writes to does not come back.
	name := filepath.Join(dir, image.List()[0].Path)
	if err := unix.Mkfifo(name, 0o600); err != nil {
		t.Fatal(err)
	}
	r := Start(Config{Dir: dir, Image: image, Readers: 1, Bound: 200 * time.Millisecond})
	select {
	case <-r.Failed():
	case <-time.After(20 * time.Second):
		t.Error("nothing told")
	}
	err := r.Stop()
	if err == nil || !strings.Contains(err.Error(), "O3: read "+name) {
		t.Errorf("%v", err)
	}
	w, err := os.OpenFile(name, os.O_RDWR, 0) // lets the reader go
	if err != nil {
		t.Fatal(err)
	}
	r.wg.Wait()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

func poke(path string, off int64, s string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt([]byte(s), off)
	return err
}
