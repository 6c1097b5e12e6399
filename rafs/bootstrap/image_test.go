package bootstrap

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"holdfast/rafs"
	"holdfast/rafs/tree"
)

// object is the data of blob number n of a test: each aligned 8 bytes hold the blob's number and their own offset, and
// zeros fill the last block.
type object struct {
	n    int
	size int64
}

func (o object) end() int64 { return int64(rafs.AlignUp(uint64(o.size))) }

func (o object) ReadAt(p []byte, off int64) (int, error) {
	if off >= o.end() {
		return 0, io.EOF
	}
	var err error
	if int64(len(p)) > o.end()-off {
		p, err = p[:o.end()-off], io.EOF
	}
	clear(p)
	for i := range p {
		at := off + int64(i)
		if at >= o.size {
			break
		}
		var word [8]byte
		binary.LittleEndian.PutUint64(word[:], uint64(at&^7)|uint64(o.n)<<56)
		p[i] = word[at&7]
	}
	return len(p), err
}

func objects(img *Image) []object {
	out := make([]object, len(img.Blobs))
	for i, b := range img.Blobs {
		out[i] = object{i + 1, int64(b.Size)}
	}
	return out
}

// fataler is what *testing.T and *rapid.T have in common.
type fataler interface {
	Helper()
	Fatalf(format string, args ...any)
}

// contentAt is what bytes [off, off+n) of a file must be.
func contentAt(t fataler, img *Image, ino *tree.Inode, off, n uint64) []byte {
	t.Helper()
	out := make([]byte, n)
	for done := uint64(0); done < n; {
		chunk := uint64(ino.ChunkSize)
		c, in := ino.Chunks[(off+done)/chunk], (off+done)%chunk
		part := min(chunk-in, n-done)
		if c.Blob != 0 {
			o := object{c.Blob, int64(img.Blobs[c.Blob-1].Size)}
			if got, _ := o.ReadAt(out[done:done+part], int64(c.Offset+in)); got != int(part) {
				t.Fatalf("chunk at %d is outside blob %d", c.Offset, c.Blob)
			}
		}
		done += part
	}
	return out
}

func testBlob(n int, size uint64, chunkSize uint32) rafs.BlobInfo {
	return rafs.BlobInfo{
		ID: fmt.Sprintf("%064x", n), ChunkSize: chunkSize, ChunkCount: 77, Codec: rafs.CodecZstd, Features: 1 | featureInlinedDigest,
		StoredSize: 1 + size/2, Size: size, CICodec: rafs.CodecZstd, CIOffset: 5, CIStored: 6, CISize: 7, TOCSize: 8,
		TOCDigest: rafs.Digest{9}, MetaSize: 10, MetaDigest: rafs.Digest{11},
	}
}

// smallImage has one of everything; tests of damage change its bytes.
func smallImage(t testing.TB) *Image {
	img := &Image{Root: tree.NewRoot(), ChunkSize: 4096, Codec: rafs.CodecZstd, Prefetch: []string{"/file", "/dir"}}
	img.Blobs = []rafs.BlobInfo{testBlob(1, 1<<20, 4096), testBlob(2, 3000, 4096)}
	file := &tree.Inode{Mode: tree.ModeFile | 0o644, Size: 10000, ChunkSize: 4096, Mtime: 1, MtimeNsec: 2, Chunks: []tree.ChunkRef{
		{Blob: 1, Index: 0x123456, Offset: 8192}, tree.Hole, {Blob: 2, Index: 1, Offset: 0}}}
	file.SetXattr("user.x", []byte("value"))
	file.SetXattr("trusted.y", []byte("other"))
	mk(t, img.Root, "file", file)
	dir := mk(t, img.Root, "dir", &tree.Inode{Mode: tree.ModeDir | 0o755})
	mk(t, dir, "hard", file)
	mk(t, dir, "sub", &tree.Inode{Mode: tree.ModeDir | 0o700})
	mk(t, img.Root, "link", &tree.Inode{Mode: tree.ModeLink | 0o777, Target: "dir/hard"})
	mk(t, img.Root, "null", &tree.Inode{Mode: tree.ModeChar | 0o666, Major: 1, Minor: 3})
	mk(t, img.Root, "empty", &tree.Inode{Mode: tree.ModeFile | 0o600, ChunkSize: 4096})
	big := mk(t, img.Root, "many", &tree.Inode{Mode: tree.ModeDir | 0o755})
	for i := range 300 {
		mk(t, big, fmt.Sprintf("entry-%04d", i), &tree.Inode{Mode: tree.ModeFifo | 0o600})
	}
	return img
}

func mk(t testing.TB, dir *tree.Node, name string, ino *tree.Inode) *tree.Node {
	t.Helper()
	n := &tree.Node{Name: name, Inode: ino}
	if err := dir.Put(n); err != nil {
		t.Fatal(err)
	}
	return n
}

// flat is an entry of a tree in a form that can be compared.
type flat struct {
	tree.Inode
	LinkTo string // the first path with the same inode
}

func flatten(root *tree.Node) map[string]flat {
	out := make(map[string]flat)
	first := make(map[*tree.Inode]string)
	_ = root.Walk(func(path string, n *tree.Node) error {
		if to, ok := first[n.Inode]; ok {
			out[path] = flat{LinkTo: to}
			return nil
		}
		first[n.Inode] = path
		out[path] = flat{Inode: *n.Inode}
		return nil
	})
	return out
}

// diff compares two images.
func diff(want, got *Image) string {
	a, b := *want, *got
	a.Root, b.Root = nil, nil
	a.Chunks, b.Chunks = nil, nil
	if d := cmp.Diff(a, b); d != "" {
		return d
	}
	return cmp.Diff(flatten(want.Root), flatten(got.Root))
}

func readImage(data []byte) (*Image, error) {
	return Read(bytes.NewReader(data), int64(len(data)), "test.boot")
}

func write(t testing.TB, img *Image) []byte {
	t.Helper()
	data, err := Write(img)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// drawImage makes a random image. What it makes is also what a Linux file system can hold, so that the kernel shows all of it.
func drawImage(t *rapid.T) *Image {
	img := &Image{
		Root: tree.NewRoot(), ChunkSize: 4096 << rapid.IntRange(0, 4).Draw(t, "chunkbits"),
		Codec: rafs.Codec(rapid.IntRange(0, 3).Draw(t, "codec")), Digest: rafs.DigestAlgo(rapid.IntRange(0, 1).Draw(t, "digest")),
	}
	for i := range rapid.IntRange(0, 5).Draw(t, "blobs") {
		img.Blobs = append(img.Blobs, testBlob(i+1, uint64(rapid.IntRange(1, 1<<19).Draw(t, "size")), img.ChunkSize))
	}
	drawCommon(t, img.Root.Inode)
	dirs, depth := []*tree.Node{img.Root}, []int{0}
	var others []*tree.Inode
	for range rapid.IntRange(0, 60).Draw(t, "entries") {
		k := rapid.IntRange(0, len(dirs)-1).Draw(t, "parent")
		n := &tree.Node{Name: drawName(t)}
		if dirs[k].Child(n.Name) != nil {
			continue
		}
		if len(others) > 0 && rapid.IntRange(0, 9).Draw(t, "hardlink") == 0 {
			n.Inode = others[rapid.IntRange(0, len(others)-1).Draw(t, "to")]
		} else {
			n.Inode = drawInode(t, img, depth[k] < 12)
			if n.Inode.IsDir() {
				dirs, depth = append(dirs, n), append(depth, depth[k]+1)
			} else {
				others = append(others, n.Inode)
			}
		}
		if err := dirs[k].Put(n); err != nil {
			t.Fatal(err)
		}
	}
	_ = img.Root.Walk(func(path string, n *tree.Node) error {
		// A hard link is named by its first path when it is read back.
		if to := flatten(img.Root)[path].LinkTo; to == "" && rapid.IntRange(0, 15).Draw(t, "prefetch") == 0 {
			img.Prefetch = append(img.Prefetch, path)
		}
		return nil
	})
	return img
}

func drawName(t *rapid.T) string {
	chars := rapid.OneOf(rapid.SampledFrom([]byte("ab!.-~\xff\x01 ")), rapid.ByteRange('0', 'z'))
	length := rapid.OneOf(rapid.IntRange(1, 12), rapid.SampledFrom([]int{254, 255})).Draw(t, "namelen")
	name := string(rapid.SliceOfN(chars, length, length).Draw(t, "name"))
	if name == "." || name == ".." {
		return "dots"
	}
	return strings.ReplaceAll(name, "/", "_")
}

func drawCommon(t *rapid.T, ino *tree.Inode) {
	ino.Mode = ino.Mode&tree.ModeType | uint32(rapid.IntRange(0, 0o7777).Draw(t, "perm"))
	ino.UID, ino.GID = rapid.Uint32Max(1<<32-2).Draw(t, "uid"), rapid.Uint32Max(1<<32-2).Draw(t, "gid")
	ino.Mtime = rapid.Int64Range(-1<<33, 1<<34).Draw(t, "mtime")
	ino.MtimeNsec = rapid.Uint32Max(999999999).Draw(t, "nsec")
	if rapid.IntRange(0, 2).Draw(t, "xattrs") != 0 {
		return
	}
	spaces := []string{"trusted.", "security."}
	if ino.IsDir() || ino.IsFile() {
		spaces = append(spaces, "user.")
	}
	for range rapid.IntRange(1, 6).Draw(t, "nxattrs") {
		name := rapid.SampledFrom(spaces).Draw(t, "space") + rapid.StringMatching("hf[a-z.]{0,30}z").Draw(t, "xname")
		size := rapid.OneOf(rapid.IntRange(0, 30), rapid.IntRange(0, 5000)).Draw(t, "xsize")
		ino.SetXattr(name, bytes.Repeat([]byte{byte(size)}, size))
	}
	if ino.IsLink() {
		return
	}
	acl := []byte("\x02\x00\x00\x00" + // version; entries: tag, permissions, id
		"\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xe8\x03\x00\x00" + "\x04\x00\x05\x00\xff\xff\xff\xff" +
		"\x10\x00\x05\x00\xff\xff\xff\xff" + "\x20\x00\x05\x00\xff\xff\xff\xff")
	if rapid.Bool().Draw(t, "acl") {
		ino.SetXattr("system.posix_acl_access", acl)
	}
	if ino.IsDir() && rapid.Bool().Draw(t, "default acl") {
		ino.SetXattr("system.posix_acl_default", acl)
	}
	if ino.IsFile() {
		ino.SetXattr("security.capability", []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	}
}

func drawInode(t *rapid.T, img *Image, dirAllowed bool) *tree.Inode {
	types := []uint32{tree.ModeFile, tree.ModeFile, tree.ModeLink, tree.ModeChar, tree.ModeBlock, tree.ModeFifo, tree.ModeSocket}
	if dirAllowed {
		types = append(types, tree.ModeDir, tree.ModeDir)
	}
	ino := &tree.Inode{Mode: rapid.SampledFrom(types).Draw(t, "type")}
	drawCommon(t, ino)
	switch ino.Mode & tree.ModeType {
	case tree.ModeFile:
		ino.ChunkSize = img.ChunkSize
		drawChunks(t, img, ino)
	case tree.ModeLink:
		n := rapid.OneOf(rapid.IntRange(1, 50), rapid.IntRange(1, MaxTarget)).Draw(t, "target")
		ino.Target = strings.Repeat("t/", n)[:n]
	case tree.ModeChar, tree.ModeBlock:
		ino.Major, ino.Minor = rapid.Uint32Max(maxMajor).Draw(t, "major"), rapid.Uint32Max(maxMinor).Draw(t, "minor")
	}
	return ino
}

func drawChunks(t *rapid.T, img *Image, ino *tree.Inode) {
	chunk := uint64(img.ChunkSize)
	for range rapid.IntRange(0, 6).Draw(t, "chunks") {
		ref := tree.Hole
		if len(img.Blobs) > 0 && rapid.IntRange(0, 3).Draw(t, "hole") != 0 {
			ref.Blob = rapid.IntRange(1, len(img.Blobs)).Draw(t, "blob")
			ref.Index = rapid.Uint32Max(rafs.MaxChunks-1).Draw(t, "index")
			room := rafs.AlignUp(img.Blobs[ref.Blob-1].Size)
			if room < chunk {
				ref = tree.Hole
			} else {
				ref.Offset = rapid.Uint64Max((room-chunk)/4096).Draw(t, "offset") * 4096
			}
		}
		ino.Chunks = append(ino.Chunks, ref)
	}
	if n := uint64(len(ino.Chunks)); n > 0 {
		ino.Size = n*chunk - rapid.Uint64Max(chunk-1).Draw(t, "short")
	}
}

// files writes a bootstrap and its objects to a directory and returns their paths, the bootstrap's first.
func files(t testing.TB, dir string, data []byte, objs []object) []string {
	t.Helper()
	paths := []string{filepath.Join(dir, "boot")}
	if err := os.WriteFile(paths[0], data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, o := range objs {
		path := filepath.Join(dir, fmt.Sprint("blob", o.n))
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(f, io.NewSectionReader(o, 0, o.end())); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
	}
	return paths
}

// fsck runs fsck.erofs, which reads all metadata and all data.
func fsck(t testing.TB, paths []string) {
	t.Helper()
	tool, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Skip("fsck.erofs is not installed (Debian: erofs-utils)")
	}
	args := []string{"--extract"}
	for _, p := range paths[1:] {
		args = append(args, "--device="+p)
	}
	out, err := exec.Command(tool, append(args, paths[0])...).CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("<E>")) {
		t.Fatalf("fsck.erofs: %v\n%s", err, out)
	}
}
