package e2e

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// wantRefusal fails the test unless err is a command's failure, told in one line that has all of says.
func wantRefusal(t *testing.T, err error, says ...string) {
	t.Helper()
	if err == nil {
		t.Error("no error")
		return
	}
	for _, s := range append(says, "exit status 1: holdfast ") {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("the error does not say %q: %v", s, err)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("more than a line: %v", err)
	}
}

// A registry that answers wrongly while an image is being mounted.
func TestMountThroughAFaultyRegistrySaysWhatIsWrongAndLeavesNothing(t *testing.T) {
	f := newFaulty(t, 2)
	dir := filepath.Join(f.Dir, "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	garbage := changed(func(h http.Header, body []byte) []byte { return sized(h, []byte("<html>not here</html>")) })
	for _, tt := range []struct {
		name, path string
		do         fault
		says       string
	}{
		{"manifest flipped", "/manifests/", changed(flippedBit), "fetch manifest sha256:"},
		{"manifest short", "/manifests/", changed(shortInPieces), "fetch manifest sha256:"},
		{"manifest is a page", "/manifests/", garbage, "manifest"},
		{"manifest endless", "/manifests/", endless, "too large: over 4194304 bytes"},
		{"manifest missing", "/manifests/", code(404), "is it still there"},
		{"handshake 401", "/v2/", code(401, "WWW-Authenticate", `Basic realm="x"`), "docker login"},
		{"handshake 500", "/v2/", code(500), "500"},
		{"too many requests", "/manifests/", code(429, "Retry-After", "60"), "it asks to wait 1m0s"},
		{"blobs short", "/blobs/", changed(shortWithLength), "the answer has"},
		{"blobs flipped", "/blobs/", changed(flippedBit), "fetch the image again"},
		{"blobs endless", "/blobs/", endless, "the answer goes on after the range"},
		{"blobs missing", "/blobs/", code(404), "is it still there"},
		{"chunk information flipped", "/blobs/sha256:" + f.blob, changed(flippedBit), "damaged blob metadata"},
		{"chunk information of another range", "/blobs/sha256:" + f.blob, changed(wrongRange), "the answer is for"},
		{"chunk information with a 503", "/blobs/sha256:" + f.blob, code(503), "503 Service Unavailable"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f.fail(tt.path, tt.do)
			defer f.heal()
			_, err := f.Run("mount", f.image, dir)
			wantRefusal(t, err, f.addr()+"/faulty", tt.says)
			if s, err := f.Status(); err != nil || len(s.Mounts) > 0 || len(f.Mounts()) > 0 {
				t.Errorf("left behind: %+v, %q, %v", s, f.Mounts(), err)
			}
		})
	}
	f.must("mount", f.image, dir)
	f.tree.compare(t, dir)
}

// A damaged is an image whose parts a test changes: a bootstrap and a directory of blobs.
type damagedImage struct{ dir, boot, blobs, blob string }

func (d damagedImage) ref() string { return "rafs:" + d.boot + "," + d.blobs }

// edit changes a file.
func edit(t *testing.T, path string, change func(b []byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, change(b), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func flipAt(off int) func([]byte) []byte {
	return func(b []byte) []byte {
		if off < 0 {
			off += len(b)
		}
		b[off] ^= 0xff
		return b
	}
}

func cut(n int) func([]byte) []byte { return func(b []byte) []byte { return b[:n] } }

func TestDamagedImageIsRefusedByCheckInspectAndMountAlike(t *testing.T) {
	h := newHost(t)
	layout := filepath.Join(h.Dir, "layout")
	tarball := filepath.Join(h.Dir, "t.tar")
	chunkFiles(3).writeTar(t, tarball)
	h.must("convert", "--chunk-size", "64KiB", "tar:"+tarball, "oci:"+layout+":1")
	mnt := h.mount("oci:"+layout+":1", "--prefetch=off")
	saved, err := filepath.Glob(filepath.Join(h.Dir, "root/images/*/image.boot"))
	if err != nil || len(saved) != 1 {
		t.Fatalf("saved bootstraps: %q, %v", saved, err)
	}
	h.must("umount", mnt)
	id, blob := largest(t, filepath.Join(layout, "blobs/sha256"))
	boot, err := os.ReadFile(saved[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		damage func(t *testing.T, d damagedImage)
		says   []string
	}{
		{"bootstrap missing", func(t *testing.T, d damagedImage) { os.Remove(d.boot) }, []string{"image.boot", "no such file"}},
		{"bootstrap empty", func(t *testing.T, d damagedImage) { edit(t, d.boot, cut(0)) }, []string{"image.boot", "size of 0 bytes"}},
		{"bootstrap cut", func(t *testing.T, d damagedImage) { edit(t, d.boot, cut(len(boot)-1)) }, []string{"image.boot", "is it complete"}},
		{"bootstrap is a directory", func(t *testing.T, d damagedImage) { os.Remove(d.boot); os.Mkdir(d.boot, 0o755) }, []string{"image.boot", "not a regular file"}},
		{"bootstrap without magic", func(t *testing.T, d damagedImage) { edit(t, d.boot, flipAt(1024)) }, []string{"image.boot", "offset 1024", "magic"}},
		{"compressed EROFS", func(t *testing.T, d damagedImage) { edit(t, d.boot, flipAt(1024+80)) }, []string{"image.boot", "compressed EROFS"}},
		{"tarfs", func(t *testing.T, d damagedImage) {
			edit(t, d.boot, func(b []byte) []byte { b[1024+12] = 9; return b })
		}, []string{"image.boot", "tarfs"}},
		{"blob table elsewhere", func(t *testing.T, d damagedImage) { edit(t, d.boot, flipAt(1152+12)) }, []string{"image.boot", "blob table"}},
		{"blob missing", func(t *testing.T, d damagedImage) { os.Remove(d.blob) }, []string{id, "rafs:BOOTSTRAP,BLOBDIR"}},
		{"blob empty", func(t *testing.T, d damagedImage) { edit(t, d.blob, cut(0)) }, []string{id}},
		{"blob cut", func(t *testing.T, d damagedImage) { edit(t, d.blob, cut(len(blob)/2)) }, []string{id}},
		{"blob is a directory", func(t *testing.T, d damagedImage) { os.Remove(d.blob); os.Mkdir(d.blob, 0o755) }, []string{id}},
		{"table of contents changed", func(t *testing.T, d damagedImage) { edit(t, d.blob, flipAt(-700)) }, []string{id, "table of contents"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			d := damagedImage{dir: dir, boot: filepath.Join(dir, "image.boot"), blobs: dir, blob: filepath.Join(dir, id)}
			for path, b := range map[string][]byte{d.boot: boot, d.blob: blob} {
				if err := os.WriteFile(path, b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			tt.damage(t, d)
			for _, command := range [][]string{{"check", d.ref()}, {"inspect", d.ref()}, {"mount", d.ref(), mnt}} {
				_, err := h.Run(command...)
				wantRefusal(t, err, tt.says...)
			}
		})
	}
	h.must("mount", "oci:"+layout+":1", mnt)
	chunkFiles(3).compare(t, mnt)
}

// exitStatus is a command's exit code, -1 if a signal ended it.
func exitStatus(err error) int {
	var e *exec.ExitError
	if errors.As(err, &e) {
		return e.ExitCode()
	}
	return 0
}

// Opening a FIFO waits for a writer, and nobody writes to this one.
func TestAFIFOIsNoImageAndNobodyWaitsForIt(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"check", "rafs:" + fifo}, {"inspect", "rafs:" + fifo},
		{"convert", "tar:" + fifo, "oci:" + dir + "/out:1"}, {"convert", "oci:" + fifo, "oci:" + dir + "/out:1"},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		out, err := exec.CommandContext(ctx, bin, args...).CombinedOutput()
		if cancel(); exitStatus(err) != 1 || !strings.Contains(string(out), fifo) {
			t.Errorf("%q: %v: %s", args, err, out)
		}
	}
}

// Damage to a chunk is found when it is read: that file is EIO, the others are served, and mending the blob mends the mount.
func TestDamagedChunkIsEIOUntilItIsMended(t *testing.T) {
	h := newHost(t, "--read-deadline", "1s", "--read-ahead", "4KiB")
	layout := filepath.Join(h.Dir, "layout")
	tarball := filepath.Join(h.Dir, "t.tar")
	tree := chunkFiles(3)
	tree.writeTar(t, tarball)
	h.must("convert", "--chunk-size", "64KiB", "tar:"+tarball, "oci:"+layout+":1")
	id, blob := largest(t, filepath.Join(layout, "blobs/sha256"))
	bad := bytes.Index(blob, tree["f1"].content[:64]) + 1000
	path := filepath.Join(layout, "blobs/sha256", id)
	edit(t, path, flipAt(bad))

	_, err := h.Run("check", "oci:"+layout+":1")
	wantRefusal(t, err, id, "blob offset", "digest mismatch", "fetch or convert it again")
	mnt := h.mount("oci:"+layout+":1", "--prefetch=off")
	before := h.counts()
	if got, err := readFile(filepath.Join(mnt, "f1")); err == nil || !strings.Contains(err.Error(), "input/output error") {
		t.Errorf("the damaged file: %d bytes, %v", len(got), err)
	}
	if after := h.counts(); after.Mismatches == before.Mismatches || after.Refused == before.Refused {
		t.Errorf("status counted %+v, and before %+v", after, before)
	}
	for _, p := range []string{"f0", "f2"} {
		if got, err := readFile(filepath.Join(mnt, p)); err != nil || !bytes.Equal(got, tree[p].content) {
			t.Errorf("%s: %d bytes, %v", p, len(got), err)
		}
	}
	edit(t, path, flipAt(bad))
	deadline := time.Now().Add(20 * time.Second)
	for {
		got, err := readFile(filepath.Join(mnt, "f1"))
		if err == nil {
			if !bytes.Equal(got, tree["f1"].content) {
				t.Errorf("f1: wrong at %d", difference(got, tree["f1"].content))
			}
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the blob is mended, and the file still gives %v", err)
		}
	}
}

func TestSameImageInTwoDomainsSharesNothingAndEachIsServed(t *testing.T) {
	f := newFaulty(t, 4)
	one, two := f.mount(f.image, "--prefetch=off", "--domain", "a"), f.mount(f.image, "--prefetch=off", "--domain", "b")
	f.tree.compare(t, one)
	f.fail("/blobs/", code(404)) // what the other domain has is none of this one's
	if f.read(two, "f0") == nil {
		t.Error("the second domain was served from the first one's cache")
	}
	f.heal()
	f.must("umount", one)
	f.readAgain(two, "f0")
	f.tree.compare(t, two)
	f.must("umount", two)
	f.checkCache()
}
