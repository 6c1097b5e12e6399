package convert

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/rafs"
	"holdfast/rafs/tree"
)

// makeTree makes a directory with a file of every type that this user can make, and returns what must be seen of it.
func makeTree(t *testing.T) (root string, want map[string]seen) {
	t.Helper()
	root = filepath.Join(t.TempDir(), "tree")
	if err := os.MkdirAll(filepath.Join(root, "dir", "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	content := strings.Repeat("0123456789abcdef", 1000)
	writeFile(t, filepath.Join(root, "dir", "file"), []byte(content))
	writeFile(t, filepath.Join(root, "dir", ".wh.file"), nil)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Chmod(filepath.Join(root, "dir", "file"), 0o4755|os.ModeSetuid))
	must(os.Link(filepath.Join(root, "dir", "file"), filepath.Join(root, "hard")))
	must(os.Symlink("dir/file", filepath.Join(root, "sym")))
	must(unix.Mkfifo(filepath.Join(root, "fifo"), 0o640))
	must(unix.Chmod(filepath.Join(root, "fifo"), 0o640))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(root, "sock"), Net: "unix"})
	must(err)
	l.SetUnlinkOnClose(false)
	must(l.Close())
	must(unix.Setxattr(filepath.Join(root, "dir"), "user.key", []byte("value\x00with NUL"), 0))
	must(unix.Lchown(filepath.Join(root, "sym"), 12, 34))
	when := unix.Timespec{Sec: 1234567890, Nsec: 987654321}
	must(filepath.WalkDir(root, func(p string, _ os.DirEntry, err error) error {
		if err == nil {
			err = unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{when, when}, unix.AT_SYMLINK_NOFOLLOW)
		}
		return err
	}))
	want = make(map[string]seen)
	add := func(p string, mode uint32, change func(*seen)) {
		s := seen{Mode: mode, Mtime: when.Sec, Nsec: uint32(when.Nsec), UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
		if change != nil {
			change(&s)
		}
		want[p] = s
	}
	add("/", tree.ModeDir|0o755, nil)
	add("/dir", tree.ModeDir|0o755, func(s *seen) { s.Xattrs = `user.key="value\x00with NUL" ` })
	add("/dir/sub", tree.ModeDir|0o755, nil)
	add("/dir/.wh.file", tree.ModeFile|0o644, nil)
	add("/dir/file", tree.ModeFile|0o4755, func(s *seen) { s.Content = content })
	add("/hard", tree.ModeFile|0o4755, func(s *seen) { s.Content = content; s.Links = "/dir/file" })
	add("/sym", tree.ModeLink|0o777, func(s *seen) { s.Target = "dir/file"; s.UID = 12; s.GID = 34 })
	add("/fifo", tree.ModeFifo|0o640, nil)
	fi, err := os.Lstat(filepath.Join(root, "sock"))
	must(err)
	add("/sock", tree.ModeSocket|uint32(fi.Mode().Perm()), nil)
	return root, want
}

func TestDirectoryIsConvertedAsItIs(t *testing.T) {
	root, want := makeTree(t)
	got := convertTo(t, t.TempDir(), "dir:"+root, Options{ChunkSize: rafs.MinChunkSize, Codec: rafs.CodecLZ4})
	diff(t, got.files, want)
	alias := filepath.Join(t.TempDir(), "alias")
	if err := os.Symlink(root, alias); err != nil {
		t.Fatal(err)
	}
	diff(t, convertTo(t, t.TempDir(), "dir:"+alias, Options{}).files, want)
}

func TestDeviceNodesOfADirectoryKeepTheirNumbers(t *testing.T) {
	root := t.TempDir()
	err := unix.Mknod(filepath.Join(root, "b"), unix.S_IFBLK|0o600, int(unix.Mkdev(259, 70000)))
	if errors.Is(err, unix.EPERM) && os.Getuid() != 0 {
		t.Skipf("only root may make device nodes: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mknod(filepath.Join(root, "c"), unix.S_IFCHR|0o600, int(unix.Mkdev(5, 1))); err != nil {
		t.Fatal(err)
	}
	got := convertTo(t, t.TempDir(), "dir:"+root, Options{}).files
	if b := got["/b"]; b.Mode != tree.ModeBlock|0o600 || b.Major != 259 || b.Minor != 70000 {
		t.Errorf("block device is %+v", b)
	}
	if c := got["/c"]; c.Mode != tree.ModeChar|0o600 || c.Major != 5 || c.Minor != 1 {
		t.Errorf("character device is %+v", c)
	}
}

func TestDirectoryAndItsTarGiveTheSameImage(t *testing.T) {
	if _, err := exec.LookPath("tar"); err != nil {
		t.Skipf("GNU tar is not installed: %v", err)
	}
	root, want := makeTree(t)
	if err := os.Remove(filepath.Join(root, "sock")); err != nil { // no tar can hold it
		t.Fatal(err)
	}
	when := time.Unix(want["/"].Mtime, int64(want["/"].Nsec))
	if err := os.Chtimes(root, when, when); err != nil {
		t.Fatal(err)
	}
	x := filepath.Join(t.TempDir(), "x.tar")
	if b, err := exec.Command("tar", "--format=posix", "--xattrs", "--sort=name", "-C", root, "-cf", x, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	a, b := t.TempDir(), t.TempDir()
	delete(want, "/sock")
	diff(t, convertTo(t, a, "dir:"+root, Options{}).files, want)
	diff(t, convertTo(t, b, "tar:"+x, Options{}).files, want)
	if tagged(t, a+"/out", "latest").Digest != tagged(t, b+"/out", "latest").Digest {
		t.Error("the images have different digests")
	}
}

func TestHolesOfADirectorysFilesAreOneChunkOfZerosAndNotRead(t *testing.T) {
	root := t.TempDir()
	f, err := os.Create(filepath.Join(root, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	const size = 5<<30 + 17
	for _, off := range []int64{3<<20 + 5, 5 << 30} {
		if _, err := f.WriteAt([]byte("island"), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	res, err := Run(context.Background(), Options{Source: "dir:" + root, Dest: "oci:" + out + "/out:x", ChunkSize: rafs.MinChunkSize})
	if err != nil {
		t.Fatal(err)
	}
	if res.Totals.Read > 1<<20 {
		t.Errorf("%d bytes were read of a file with 12 bytes of data", res.Totals.Read)
	}
	img := openConvertedTree(t, out+"/out", "x")
	in := img.Root.Child("sparse").Inode
	if in.Size != size || len(in.Chunks) != 5<<18+1 {
		t.Fatalf("%d bytes, %d chunks", in.Size, len(in.Chunks))
	}
	for i, c := range in.Chunks {
		if data := i == 3<<8 || i == 5<<18; c == tree.Hole || (c != in.Chunks[0]) != data {
			t.Fatalf("chunk %d is %+v, the first, of zeros, is %+v", i, c, in.Chunks[0])
		}
	}
}

func TestFileThatShrinksWhileItIsReadIsAnError(t *testing.T) {
	root := t.TempDir()
	path := writeFile(t, filepath.Join(root, "f"), make([]byte, 1<<20))
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 10); err != nil {
		t.Fatal(err)
	}
	w := &dirWalk{r: &layerReader{layer: newLayer(nil)}}
	if err := w.file(context.Background(), &tree.Inode{Mode: tree.ModeFile}, path, info); !errors.Is(err, errChanged) {
		t.Errorf("error is %v", err)
	}
}

func TestMissingSourcesAreNamed(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing")
	for _, scheme := range []string{"dir:", "tar:", "oci:"} {
		_, err := Run(context.Background(), Options{Source: scheme + missing, Dest: "oci:" + missing + ".out:x"})
		if err == nil {
			t.Fatalf("%s was converted", scheme)
		}
		wantError(t, err, os.ErrNotExist, missing)
	}
}
