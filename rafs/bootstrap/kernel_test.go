package bootstrap

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"holdfast/rafs"
	"holdfast/rafs/tree"
)

// mountErofs mounts a bootstrap file with its objects as devices. mount(2) and not mount(8), which would make a loop
// device of the bootstrap. It skips where the answer of mount(2) says that the kernel cannot do that.
func mountErofs(t testing.TB, paths []string) (dir string, umount func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mount(2) needs root")
	}
	dir = filepath.Join(filepath.Dir(paths[0]), "mnt")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	var options []string
	for _, p := range paths[1:] {
		options = append(options, "device="+p)
	}
	switch err := unix.Mount(paths[0], dir, "erofs", unix.MS_RDONLY, strings.Join(options, ",")); {
	case errors.Is(err, unix.ENODEV):
		t.Skip("the kernel has no erofs: mount(2) answers ENODEV")
	case errors.Is(err, unix.ENOTBLK):
		t.Skip("the kernel's erofs mounts no files: mount(2) answers ENOTBLK")
	case err != nil:
		t.Fatalf("mount: %v", err)
	}
	mounted := true
	umount = func() {
		if mounted {
			mounted = false
			if err := unix.Unmount(dir, 0); err != nil {
				t.Errorf("umount %s: %v", dir, err)
				_ = unix.Unmount(dir, unix.MNT_DETACH)
			}
		}
	}
	t.Cleanup(umount)
	return dir, umount
}

// mountImage writes an image and its objects and mounts them.
func mountImage(t testing.TB, img *Image) (dir string, umount func()) {
	t.Helper()
	return mountErofs(t, files(t, t.TempDir(), write(t, img), objects(img)))
}

// statFacts is what stat(2) must say.
type statFacts struct {
	Mode, UID, GID uint32
	Size           int64
	Rdev           uint64
	Mtime, Nsec    int64
	Nlink          uint64
	Xattrs         map[string]string
}

// compareMounted compares everything below dir with an image's tree, content included.
func compareMounted(t fataler, img *Image, dir string) {
	t.Helper()
	links := linkCounts(img.Root)
	inodes := make(map[*tree.Inode]uint64)
	err := img.Root.Walk(func(path string, n *tree.Node) error {
		at, ino := filepath.Join(dir, path), n.Inode
		var st unix.Stat_t
		if err := unix.Lstat(at, &st); err != nil {
			return fmt.Errorf("lstat %q: %w", path, err)
		}
		if first, ok := inodes[ino]; ok && first != st.Ino {
			return fmt.Errorf("%q: inode %d, its hard link has %d", path, st.Ino, first)
		}
		inodes[ino] = st.Ino
		want := statFacts{ino.Mode, ino.UID, ino.GID, st.Size, 0, ino.Mtime, int64(ino.MtimeNsec), uint64(links[ino]), map[string]string{}}
		for _, x := range ino.Xattrs {
			want.Xattrs[x.Name] = string(x.Value)
		}
		switch ino.Mode & tree.ModeType {
		case tree.ModeFile:
			want.Size = int64(ino.Size)
		case tree.ModeLink:
			want.Size = int64(len(ino.Target))
		case tree.ModeChar, tree.ModeBlock:
			want.Rdev = unix.Mkdev(ino.Major, ino.Minor)
		}
		xattrs, err := listXattrs(at)
		if err != nil {
			return fmt.Errorf("xattrs of %q: %w", path, err)
		}
		got := statFacts{st.Mode, st.Uid, st.Gid, st.Size, st.Rdev, st.Mtim.Sec, st.Mtim.Nsec, st.Nlink, xattrs}
		if d := cmp.Diff(want, got); d != "" {
			return fmt.Errorf("%q: -tree +kernel:\n%s", path, d)
		}
		return compareData(t, img, at, n)
	})
	if err != nil {
		t.Fatalf("%v", err)
	}
}

func compareData(t fataler, img *Image, at string, n *tree.Node) error {
	switch ino := n.Inode; {
	case ino.IsFile():
		return compareFile(t, img, at, ino)
	case ino.IsLink():
		if got, err := os.Readlink(at); err != nil || got != ino.Target {
			return fmt.Errorf("%q: target %q, want %q (%v)", at, got, ino.Target, err)
		}
	case ino.IsDir():
		entries, err := os.ReadDir(at)
		if err != nil {
			return err
		}
		children := n.Children()
		if len(entries) != len(children) {
			return fmt.Errorf("%q: %d entries, want %d", at, len(entries), len(children))
		}
		for i, e := range entries { // both sorted by name
			if e.Name() != children[i].Name {
				return fmt.Errorf("%q: entry %q, want %q", at, e.Name(), children[i].Name)
			}
		}
	}
	return nil
}

// compareFile compares a file's content; of holes only the first and last 4 KiB of each chunk.
func compareFile(t fataler, img *Image, at string, ino *tree.Inode) error {
	f, err := os.Open(at)
	if err != nil {
		return err
	}
	defer f.Close()
	check := func(off, n uint64) error {
		got := make([]byte, n)
		if k, err := f.ReadAt(got, int64(off)); k != len(got) {
			return fmt.Errorf("%q: %d bytes at %d: %w", at, n, off, err)
		}
		if !bytes.Equal(got, contentAt(t, img, ino, off, n)) {
			return fmt.Errorf("%q: content at %d, %d bytes, differs", at, off, n)
		}
		return nil
	}
	for i, c := range ino.Chunks {
		off := uint64(i) * uint64(ino.ChunkSize)
		n := min(uint64(ino.ChunkSize), ino.Size-off)
		if c.Blob != 0 {
			if err := check(off, n); err != nil {
				return err
			}
			continue
		}
		edge := min(n, 4096)
		if err := errors.Join(check(off, edge), check(off+n-edge, edge)); err != nil {
			return err
		}
	}
	return nil
}

func listXattrs(path string) (map[string]string, error) {
	names := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, names)
	if err != nil {
		return nil, err
	}
	out := make(map[string]string)
	for _, name := range strings.Split(string(names[:n]), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 64<<10)
		k, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		out[name] = string(value[:k])
	}
	return out, nil
}

func TestKernelShowsRandomTrees(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		img := drawImage(rt)
		dir, umount := mountImage(t, img)
		defer umount()
		compareMounted(rt, img, dir)
	})
}

func TestKernelShowsSmallImage(t *testing.T) {
	img := smallImage(t)
	dir, _ := mountImage(t, img)
	compareMounted(t, img, dir)
}

func TestKernelFindsEachOf100000EntriesOfADirectory(t *testing.T) {
	img := &Image{Root: tree.NewRoot(), ChunkSize: 4096}
	big := mk(t, img.Root, "big", &tree.Inode{Mode: tree.ModeDir | 0o755})
	for i := range 100_000 {
		mk(t, big, fmt.Sprintf("%x-entry", i*2654435761%(1<<32)), &tree.Inode{Mode: tree.ModeFile | 0o644, ChunkSize: 4096, UID: uint32(i)})
	}
	data := write(t, img)
	got, err := readImage(data)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Root.Child("big").Children()) != 100_000 {
		t.Fatalf("%d entries were read back", len(got.Root.Child("big").Children()))
	}
	paths := files(t, t.TempDir(), data, nil)
	fsck(t, paths)
	dir, _ := mountErofs(t, paths)
	compareMounted(t, img, dir)
}

func TestKernelShowsNamesOf255BytesInEveryBlock(t *testing.T) {
	img := &Image{Root: tree.NewRoot(), ChunkSize: 4096}
	for i := range 200 {
		name := strings.Repeat(string(rune('a'+i%26)), 252) + fmt.Sprintf("%03d", i)
		mk(t, img.Root, name, &tree.Inode{Mode: tree.ModeLink | 0o777, Target: strings.Repeat("x", 1+i*20)})
	}
	paths := files(t, t.TempDir(), write(t, img), nil)
	dir, _ := mountErofs(t, paths)
	compareMounted(t, img, dir)
	fsck(t, paths)
}

func TestDirectoryThatFillsItsBlockIsNotInline(t *testing.T) {
	img := &Image{Root: tree.NewRoot(), ChunkSize: 4096}
	for i := range 20 { // 27 bytes for "." and "..", 18 times 200, 234, 235: a block
		length := 188
		if i >= 18 {
			length = 222 + i - 18
		}
		name := strings.Repeat(string(rune('a'+i)), length)
		mk(t, img.Root, name, &tree.Inode{Mode: tree.ModeFifo | 0o644})
	}
	s := newSpecimen(t, img)
	if size := s.placed("/").size; size != blockSize {
		t.Fatalf("the directory has %d bytes", size)
	}
	if _, err := readImage(s.b); err != nil {
		t.Fatal(err)
	}
	dir, _ := mountErofs(t, files(t, t.TempDir(), s.b, nil))
	compareMounted(t, img, dir)
}

func TestKernelShowsSparseFileOver4GiB(t *testing.T) {
	img := &Image{Root: tree.NewRoot(), ChunkSize: 1 << 20, Blobs: []rafs.BlobInfo{testBlob(1, 4<<20, 1<<20)}}
	big := &tree.Inode{Mode: tree.ModeFile | 0o644, Size: 5<<30 + 12345, ChunkSize: 1 << 20, Chunks: make([]tree.ChunkRef, 5<<10+1)}
	for i, k := range []int{0, 1, 4095, 4096, 5 << 10} {
		big.Chunks[k] = tree.ChunkRef{Blob: 1, Offset: uint64(i%3) << 20, Index: uint32(i)}
	}
	mk(t, img.Root, "big", big)
	data := write(t, img)
	got, err := readImage(data)
	if err != nil {
		t.Fatal(err)
	}
	if d := diff(img, got); d != "" {
		t.Fatalf("-written +read:\n%s", d)
	}
	dir, _ := mountErofs(t, files(t, t.TempDir(), data, objects(img)))
	compareMounted(t, img, dir)
}

func TestKernelShowsLargeXattrsAcrossBlocks(t *testing.T) {
	img := &Image{Root: tree.NewRoot(), ChunkSize: 4096, Blobs: []rafs.BlobInfo{testBlob(1, 1<<20, 4096)}}
	for i, mode := range []uint32{tree.ModeFile, tree.ModeDir, tree.ModeLink, tree.ModeChar} {
		ino := &tree.Inode{Mode: mode | 0o644}
		switch mode {
		case tree.ModeFile:
			ino.Size, ino.ChunkSize, ino.Chunks = 4096, 4096, []tree.ChunkRef{{Blob: 1}}
		case tree.ModeLink:
			ino.Target = "a"
		}
		for k, size := range []int{65535, 4000, 1, 0, 65535, 60001} {
			ino.SetXattr(fmt.Sprintf("trusted.%d", k), bytes.Repeat([]byte{byte(i + 1)}, size))
		}
		mk(t, img.Root, fmt.Sprint("x", i), ino)
	}
	paths := files(t, t.TempDir(), write(t, img), objects(img))
	dir, _ := mountErofs(t, paths)
	compareMounted(t, img, dir)
	fsck(t, paths)
}

func TestKernelTakes254Blobs(t *testing.T) {
	img := &Image{Root: tree.NewRoot(), ChunkSize: 4096}
	for i := range rafs.MaxBlobs {
		img.Blobs = append(img.Blobs, testBlob(i+1, 4096, 4096))
		mk(t, img.Root, fmt.Sprint("f", i), &tree.Inode{Mode: tree.ModeFile | 0o644, Size: 4096, ChunkSize: 4096, Chunks: []tree.ChunkRef{{Blob: i + 1, Index: 1<<24 - 1}}})
	}
	t.Chdir(t.TempDir()) // mount(2) takes 4096 bytes of options: short paths
	paths := files(t, ".", write(t, img), objects(img))
	if n := len(strings.Join(paths, ",device=")); n > 4000 {
		t.Logf("%d bytes of options", n)
	}
	dir, _ := mountErofs(t, paths)
	compareMounted(t, img, dir)
}
