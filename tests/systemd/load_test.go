package systemd

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/tests/registry"
)

// An image is a reference to an image in a registry behind a gate, and what its files are to show.
type image struct {
	ref   string
	gate  *gate
	files map[string][]byte
}

// fileSize is that of each file of an image, and of each chunk.
const fileSize = 1 << 20

// image makes an image of n files, f0 and on.
func (s *system) image(n int) image {
	s.t.Helper()
	reg, err := registry.Start(filepath.Join(s.dir, "registry"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { reg.Close() })
	im := image{files: map[string][]byte{}, gate: newGate(reg.Addr())}
	s.t.Cleanup(im.gate.close)
	tarball := filepath.Join(s.dir, "image.tar")
	if err := os.WriteFile(tarball, im.fill(n), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.must("holdfast", "convert", "tar:"+tarball, "docker://"+reg.Addr()+"/image:1")
	im.ref = "docker://" + im.gate.addr() + "/image:1"
	return im
}

// fill makes up n files that do not compress, and returns them as a tar.
func (im image) fill(n int) []byte {
	const seed = 7
	src := rand.NewChaCha8([32]byte{seed})
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := range n {
		name, content := fmt.Sprintf("f%d", i), make([]byte, fileSize)
		src.Read(content)
		im.files[name] = content
		w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: fileSize, Format: tar.FormatPAX}) // to memory, as all of it
		w.Write(content)
	}
	w.Close()
	return b.Bytes()
}

// mount mounts an image in the test's domain on a new directory and returns that.
func (s *system) mount(im image, flags ...string) string {
	s.t.Helper()
	dir, err := os.MkdirTemp(s.dir, "mnt-")
	if err != nil {
		s.t.Fatal(err)
	}
	s.must("holdfast", append(append([]string{"mount", "--domain=" + s.domain}, flags...), im.ref, dir)...)
	return dir
}

// mounts lists the EROFS mounts of the test.
func (s *system) mounts() []string {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		s.t.Fatal(err)
	}
	var dirs []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], s.dir+"/") && strings.Contains(line, " - erofs ") {
			dirs = append(dirs, f[4])
		}
	}
	return dirs
}

// A reading is readers of an image's files, one for each file.
type reading struct {
	s    *system
	errs chan error
	n    int
}

// read starts a reader for each of the named files, or for all, of an image that is mounted on dir.
func (s *system) read(im image, dir string, names ...string) *reading {
	if len(names) == 0 {
		for name := range im.files {
			names = append(names, name)
		}
	}
	r := &reading{s: s, errs: make(chan error, len(names)), n: len(names)}
	for _, name := range names {
		go func() { r.errs <- im.check(dir, name) }() // ends when the file is read; wait waits
	}
	return r
}

// wait waits for the readers, and fails the test if one of them was told anything but the right bytes.
func (r *reading) wait() {
	r.s.t.Helper()
	deadline := time.After(patience)
	for range r.n {
		select {
		case err := <-r.errs:
			if err != nil {
				r.s.t.Error(err)
			}
		case <-deadline:
			r.s.t.Fatalf("a reader still waits after %v", patience)
		}
	}
}

// whileWaiting has readers of files that nobody has read wait for the registry while it does something, and then for their bytes.
func (s *system) whileWaiting(im image, dir string, do func(), names ...string) {
	s.t.Helper()
	im.gate.shut()
	r := s.read(im, dir, names...)
	func() {
		defer im.gate.open() // also when do ends the test: the cleanup reads
		s.until("readers wait for the daemon", func() bool {
			st, err := s.status()
			return err == nil && st.Pending > 0
		})
		do()
	}()
	r.wait()
}

// check reads a file and compares it.
func (im image) check(dir, name string) error {
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	got, err := io.ReadAll(f)
	want := im.files[name]
	if err == nil && !bytes.Equal(got, want) {
		at := 0
		for at < min(len(got), len(want)) && got[at] == want[at] {
			at++
		}
		err = fmt.Errorf("%s: wrong bytes, the first at %d of %d", name, at, len(want))
	}
	return err
}

// dropCaches makes the kernel ask again for what is not in the cache files.
func dropCaches(t *testing.T) {
	t.Helper()
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
}
