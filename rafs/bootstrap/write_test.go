package bootstrap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"strings"
	"testing"

	erofs "github.com/erofs/go-erofs"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"holdfast/rafs"
	"holdfast/rafs/tree"
)

func TestOnDiskStructureSizes(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want int
	}{
		{"erofs_super_block", binary.Size(superBlock{}), superSize},
		{"RafsV6SuperBlockExt", binary.Size(extSuperBlock{}), extSuperSize},
		{"erofs_deviceslot", binary.Size(deviceSlot{}), deviceSlotSize},
		{"RafsV6Blob", binary.Size(blobEntry{}), blobEntrySize},
		{"superblocks end at the device slots", extSuperOffset + extSuperSize, devtSlotOffset * deviceSlotSize},
	} {
		if c.got != c.want {
			t.Errorf("%s: %d bytes, want %d", c.name, c.got, c.want)
		}
	}
}

func TestInodesSurviveTheirOnDiskForm(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := inode{
			format: formatExtended, xattrCount: rapid.Uint16().Draw(t, "x"), mode: rapid.Uint16().Draw(t, "mode"), size: rapid.Uint64().Draw(t, "size"),
			union: rapid.Uint32().Draw(t, "union"), ino: rapid.Uint32().Draw(t, "ino"), uid: rapid.Uint32().Draw(t, "uid"), gid: rapid.Uint32().Draw(t, "gid"),
			mtime: rapid.Int64().Draw(t, "mtime"), mtimeNsec: rapid.Uint32().Draw(t, "nsec"), nlink: rapid.Uint32().Draw(t, "nlink"),
		}
		var b [inodeExtendedSize]byte
		want.put(b[:])
		if got := getExtended(b[:]); got != want {
			t.Fatalf("%+v came back as %+v", want, got)
		}
	})
}

func TestRandomTreesComeBackAsTheyWere(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		img := drawImage(t)
		data, err := Write(img)
		if err != nil {
			t.Fatal(err)
		}
		got, err := readImage(data)
		if err != nil {
			t.Fatal(err)
		}
		if d := diff(img, got); d != "" {
			t.Fatalf("-written +read:\n%s", d)
		}
	})
}

func TestBytesDoNotDependOnTheOrderEntriesWereAdded(t *testing.T) {
	shuffled := func(seed uint64) []byte {
		img := smallImage(t)
		rnd := rand.New(rand.NewPCG(seed, 0))
		var rebuild func(n *tree.Node) *tree.Node
		rebuild = func(n *tree.Node) *tree.Node {
			out := &tree.Node{Name: n.Name, Inode: n.Inode}
			children := append([]*tree.Node(nil), n.Children()...)
			rnd.Shuffle(len(children), func(i, j int) { children[i], children[j] = children[j], children[i] })
			for _, c := range children {
				if err := out.Put(rebuild(c)); err != nil {
					t.Fatal(err)
				}
			}
			return out
		}
		img.Root = rebuild(img.Root)
		return write(t, img)
	}
	if !bytes.Equal(shuffled(1), shuffled(2)) {
		t.Fatal("two orders gave different bytes")
	}
}

func TestRandomTreesPassFsck(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		img := drawImage(rt)
		_ = img.Root.Walk(func(_ string, n *tree.Node) error {
			for i := range n.Inode.Chunks {
				n.Inode.Chunks[i].Index &= 0xffff // fsck.erofs 1.5 takes the bits above for a part of the device's number
			}
			return nil
		})
		fsck(t, files(t, t.TempDir(), write(t, img), objects(img)))
	})
}

// The last inode of one of these ends with a block.
func TestFsckReadsBehindTheLastInode(t *testing.T) {
	ended := 0
	for name := 3; name < 20; name++ {
		img := &Image{Root: tree.NewRoot(), ChunkSize: rafs.DefaultChunkSize, Codec: rafs.CodecZstd}
		for i := range blockSize / inodeExtendedSize {
			if err := img.Root.Put(&tree.Node{Name: fmt.Sprintf("%0*d", name, i), Inode: &tree.Inode{Mode: tree.ModeFifo}}); err != nil {
				t.Fatal(err)
			}
			p, err := makePlan(img)
			if err != nil {
				t.Fatal(err)
			}
			if last := p.inodes[len(p.inodes)-1]; (last.off+inodeExtendedSize)%blockSize == 0 {
				ended++
				fsck(t, files(t, t.TempDir(), write(t, img), nil))
			}
		}
	}
	if ended == 0 {
		t.Error("no inode ended with a block")
	}
}

func TestRandomTreesReadByGoErofs(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		img := drawImage(rt)
		var opts []erofs.OpenOpt
		for _, o := range objects(img) {
			opts = append(opts, erofs.WithExtraDevices(o))
		}
		fsys, err := erofs.Open(bytes.NewReader(write(t, img)), opts...)
		if err != nil {
			rt.Fatal(err)
		}
		links := linkCounts(img.Root)
		_ = img.Root.Walk(func(path string, n *tree.Node) error {
			name := strings.TrimPrefix(path, "/")
			if path == "/" {
				name = "."
			}
			if !fs.ValidPath(name) {
				return nil // not UTF-8
			}
			compareGoErofs(rt, img, fsys, name, n, links[n.Inode])
			return nil
		})
	})
}

// linkCounts is the number of names of each inode as stat(2) counts them.
func linkCounts(root *tree.Node) map[*tree.Inode]int {
	out := make(map[*tree.Inode]int)
	_ = root.Walk(func(_ string, n *tree.Node) error {
		out[n.Inode]++
		for _, c := range n.Children() {
			if c.Inode.IsDir() {
				out[n.Inode]++
			}
		}
		if n.Inode.IsDir() {
			out[n.Inode]++
		}
		return nil
	})
	return out
}

func compareGoErofs(t *rapid.T, img *Image, fsys fs.FS, name string, n *tree.Node, nlink int) {
	info, err := fs.Lstat(fsys, name)
	if err != nil {
		t.Fatalf("%q: %v", name, err)
	}
	st, ino := info.Sys().(*erofs.Stat), n.Inode
	type facts struct {
		UID, GID, Rdev, Nsec uint32
		Mtime                int64
		Nlink                int
		Perm                 fs.FileMode
		Xattrs               map[string]string
	}
	want := facts{ino.UID, ino.GID, encodeDev(ino.Major, ino.Minor), ino.MtimeNsec, ino.Mtime, nlink, fs.FileMode(ino.Mode & 0o777), map[string]string{}}
	for _, x := range ino.Xattrs {
		want.Xattrs[x.Name] = string(x.Value)
	}
	got := facts{st.UID, st.GID, st.Rdev, st.MtimeNs, int64(st.Mtime), st.Nlink, st.Mode.Perm(), map[string]string{}}
	for name, value := range st.Xattrs {
		got.Xattrs[strings.TrimSuffix(name, ".")] = value // go-erofs 0.3.1 gives ACLs' names a "." at the end
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Fatalf("%q: -tree +go-erofs:\n%s", name, d)
	}
	switch {
	case ino.IsFile():
		data, err := fs.ReadFile(fsys, name)
		if err != nil || !bytes.Equal(data, contentAt(t, img, ino, 0, ino.Size)) {
			t.Fatalf("%q: content differs (%v)", name, err)
		}
	case ino.IsLink():
		if target, err := fs.ReadLink(fsys, name); err != nil || target != ino.Target {
			t.Fatalf("%q: target %q, want %q (%v)", name, target, ino.Target, err)
		}
	case ino.IsDir():
		entries, err := fs.ReadDir(fsys, name)
		if err != nil || len(entries) != len(n.Children()) {
			t.Fatalf("%q: %d entries, want %d (%v)", name, len(entries), len(n.Children()), err)
		}
	}
}

func TestWriteNamesTheFileItCannotWrite(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(img *Image, ino *tree.Inode)
		want   string
	}{
		{"unknown name space", func(_ *Image, i *tree.Inode) { i.SetXattr("foo.bar", nil) }, `"/dir/bad": xattr "foo.bar" is in no name space`},
		{"name space alone", func(_ *Image, i *tree.Inode) { i.SetXattr("user.", nil) }, `xattr "user." is in no name space`},
		{"more than an ACL's name", func(_ *Image, i *tree.Inode) { i.SetXattr("system.posix_acl_accessx", nil) }, "is in no name space"},
		{"long xattr name", func(_ *Image, i *tree.Inode) { i.SetXattr("user."+strings.Repeat("x", 256), nil) }, "is over 255 bytes long"},
		{"large xattr", func(_ *Image, i *tree.Inode) { i.SetXattr("user.x", make([]byte, 65536)) }, "has 65536 bytes"},
		{"xattrs too large together", func(_ *Image, i *tree.Inode) {
			for k := range 5 {
				i.SetXattr(fmt.Sprint("user.", k), make([]byte, 65000))
			}
		}, "xattrs take over"},
		{"xattrs out of order", func(_ *Image, i *tree.Inode) { i.Xattrs = []tree.Xattr{{Name: "user.b"}, {Name: "user.a"}} }, "out of order"},
		{"no type", func(_ *Image, i *tree.Inode) { i.Mode = 0o644 }, "no known file type"},
		{"wide mode", func(_ *Image, i *tree.Inode) { i.Mode |= 1 << 16 }, "mode 0"},
		{"nanoseconds", func(_ *Image, i *tree.Inode) { i.MtimeNsec = 1e9 }, "1000000000 nanoseconds"},
		{"device number", func(_ *Image, i *tree.Inode) { i.Mode, i.Major = tree.ModeBlock, 4096 }, "device number 4096:0"},
		{"no target", func(_ *Image, i *tree.Inode) { i.Mode = tree.ModeLink }, "link target of 0 bytes"},
		{"long target", func(_ *Image, i *tree.Inode) { i.Mode, i.Target = tree.ModeLink, strings.Repeat("x", 4096) }, "link target of 4096 bytes"},
		{"NUL in target", func(_ *Image, i *tree.Inode) { i.Mode, i.Target = tree.ModeLink, "a\x00b" }, "NUL"},
		{"missing chunks", func(_ *Image, i *tree.Inode) { i.Size = 5 }, "0 chunks for 5 bytes"},
		{"chunk size", func(_ *Image, i *tree.Inode) { i.ChunkSize = 5000 }, "chunk size 5000"},
		{"huge size", func(_ *Image, i *tree.Inode) { i.Size = 1 << 63 }, "size 9223372036854775808"},
		{"blob that is not there", func(_ *Image, i *tree.Inode) { i.Size, i.Chunks = 5, []tree.ChunkRef{{Blob: 3}} }, "in blob 3 of 2"},
		{"outside the blob", func(_ *Image, i *tree.Inode) { i.Size, i.Chunks = 5, []tree.ChunkRef{{Blob: 2, Offset: 4096}} }, "5 bytes at 4096 of blob"},
		{"not on a block boundary", func(_ *Image, i *tree.Inode) { i.Size, i.Chunks = 5, []tree.ChunkRef{{Blob: 1, Offset: 100}} }, "not at a multiple"},
		{"chunk index", func(_ *Image, i *tree.Inode) { i.Size, i.Chunks = 5, []tree.ChunkRef{{Blob: 1, Index: 1 << 24}} }, "chunk 16777216 of blob"},
		{"directory with two names", func(img *Image, i *tree.Inode) { *i = tree.Inode{Mode: tree.ModeDir}; mk(t, img.Root, "again", i) }, "directory with a second name"},
		{"too many blobs", func(img *Image, _ *tree.Inode) { img.Blobs = make([]rafs.BlobInfo, 255) }, "255 blobs, at most 254"},
		{"blob id", func(img *Image, _ *tree.Inode) { img.Blobs[1].ID = "../x" }, `blob 1: blob id "../x"`},
		{"blob size", func(img *Image, _ *tree.Inode) { img.Blobs[0].Size = 1 << 44 }, "blob 0: "},
		{"blobs too large together", func(img *Image, _ *tree.Inode) { img.Blobs[0].Size, img.Blobs[1].Size = maxData-5, 1<<20 }, "blob 1: the blobs have over"},
		{"blob's chunk size", func(img *Image, _ *tree.Inode) { img.Blobs[0].ChunkSize = 8192 }, "its chunk size is 8192"},
		{"image's chunk size", func(img *Image, _ *tree.Inode) { img.ChunkSize = 2048 }, "chunk size 2048"},
		{"prefetch path", func(img *Image, _ *tree.Inode) { img.Prefetch = []string{"/dir/nope"} }, `prefetch list: path "/dir/nope": no entry "nope"`},
		{"relative prefetch path", func(img *Image, _ *tree.Inode) { img.Prefetch = []string{"dir"} }, "does not start with"},
		{"root is a file", func(img *Image, _ *tree.Inode) { img.Root.Inode.Mode = tree.ModeFile }, "root is not a directory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			img := smallImage(t)
			ino := &tree.Inode{Mode: tree.ModeFile | 0o644, ChunkSize: 4096}
			mk(t, img.Root.Child("dir"), "bad", ino)
			if _, err := Write(img); err != nil {
				t.Fatalf("before the change: %v", err)
			}
			c.change(img, ino)
			_, err := Write(img)
			if err == nil || !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want an error with %q", err, c.want)
			}
		})
	}
}

func TestDeepTreeIsRefusedByName(t *testing.T) {
	img := &Image{Root: tree.NewRoot(), ChunkSize: 4096}
	for at, i := img.Root, 0; i < 70; i++ {
		at = mk(t, at, strings.Repeat("d", 250), &tree.Inode{Mode: tree.ModeDir})
	}
	if _, err := Write(img); err == nil || !strings.Contains(err.Error(), "its path of") {
		t.Fatalf("got %v, want an error about the path", err)
	}
}

func BenchmarkWrite100kFiles(b *testing.B) {
	img := hundredThousandFiles(b)
	b.ReportAllocs()
	for b.Loop() {
		data, err := Write(img)
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(int64(len(data)))
	}
}

func BenchmarkRead100kFiles(b *testing.B) {
	data := write(b, hundredThousandFiles(b))
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := readImage(data); err != nil {
			b.Fatal(err)
		}
	}
}

// hundredThousandFiles is an image of 1000 directories with 100 files each.
func hundredThousandFiles(t testing.TB) *Image {
	img := &Image{Root: tree.NewRoot(), ChunkSize: rafs.DefaultChunkSize, Blobs: []rafs.BlobInfo{testBlob(1, 1<<40, rafs.DefaultChunkSize)}}
	for d := range 1000 {
		dir := mk(t, img.Root, fmt.Sprintf("directory-%d", d), &tree.Inode{Mode: tree.ModeDir | 0o755, Mtime: 1})
		for f := range 100 {
			k := uint64(d*100 + f)
			mk(t, dir, fmt.Sprintf("file-with-a-name-%d.txt", f), &tree.Inode{
				Mode: tree.ModeFile | 0o644, Size: 5000, ChunkSize: rafs.DefaultChunkSize, Mtime: 1, Chunks: []tree.ChunkRef{{Blob: 1, Index: uint32(k), Offset: 8192 * k}},
			})
		}
	}
	return img
}
