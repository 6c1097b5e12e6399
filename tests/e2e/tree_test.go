package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A file is what a tree must show at a path: enough to compare with lstat, readlink, listxattr and the content.
type file struct {
	hdr     *tar.Header
	content []byte
	links   int    // how many names the inode has
	peer    string // hard links: the path of the first name
}

// A model is a file tree by path ("." is the root).
type model map[string]*file

// randomTree makes a tree with every inode type from seed.
func randomTree(seed uint64) model {
	r := rand.New(rand.NewPCG(seed, 1))
	m := model{".": {hdr: header(r, ".", tar.TypeDir), links: 1}}
	dirs := []string{"."}
	n := 20 + r.IntN(60)
	shared := randomBytes(r, 100_000, 4) // content that several files have in common
	for i := range n {
		p := path.Join(dirs[r.IntN(len(dirs))], randomName(r, i))
		switch k := r.IntN(20); {
		case k < 4:
			m[p] = &file{hdr: header(r, p, tar.TypeDir), links: 1}
			dirs = append(dirs, p)
		case k < 6:
			f := &file{hdr: header(r, p, tar.TypeSymlink), links: 1}
			f.hdr.Linkname = strings.Repeat("../target", 1+r.IntN(400))
			m[p] = f
		case k == 6:
			m[p] = &file{hdr: header(r, p, tar.TypeFifo), links: 1}
		case k == 7:
			f := &file{hdr: header(r, p, []byte{tar.TypeChar, tar.TypeBlock}[r.IntN(2)]), links: 1}
			f.hdr.Devmajor, f.hdr.Devminor = int64(r.IntN(1<<11)+1), int64(r.IntN(1<<19))
			m[p] = f
		case k == 8:
			m.link(r, p)
		default:
			f := &file{hdr: header(r, p, tar.TypeReg), links: 1}
			f.content = randomContent(r, shared)
			f.hdr.Size = int64(len(f.content))
			m[p] = f
		}
	}
	return m
}

// link makes p another name of a file that is there, or an empty file if there is none.
func (m model) link(r *rand.Rand, p string) {
	var peers []string
	for q, f := range m {
		if f.peer == "" && f.hdr.Typeflag == tar.TypeReg {
			peers = append(peers, q)
		}
	}
	if len(peers) == 0 {
		m[p] = &file{hdr: header(r, p, tar.TypeReg), links: 1}
		return
	}
	sort.Strings(peers)
	peer := peers[r.IntN(len(peers))]
	hdr := *m[peer].hdr
	hdr.Typeflag, hdr.Linkname, hdr.Name, hdr.Size = tar.TypeLink, peer, p, 0
	m[p] = &file{hdr: &hdr, peer: peer}
	m[peer].links++
}

func header(r *rand.Rand, p string, kind byte) *tar.Header {
	h := &tar.Header{
		Typeflag: kind, Name: p, Mode: int64(r.IntN(0o10000)), Uid: r.IntN(1 << 17), Gid: r.IntN(70_000),
		ModTime: time.Unix(r.Int64N(1<<33), r.Int64N(1e9)), Format: tar.FormatPAX, PAXRecords: map[string]string{},
	}
	if r.IntN(3) == 0 && (kind == tar.TypeReg || kind == tar.TypeDir) {
		for i := range 1 + r.IntN(4) {
			h.PAXRecords[fmt.Sprintf("SCHILY.xattr.user.a%d", i)] = string(randomBytes(r, 1+r.IntN(300), 1)) + "."
		}
		h.PAXRecords["SCHILY.xattr.trusted.t"] = "trusted"
	}
	if kind == tar.TypeReg && r.IntN(6) == 0 {
		// vfs_cap_data revision 2: cap_net_raw permitted and effective.
		h.PAXRecords["SCHILY.xattr.security.capability"] = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	}
	return h
}

func randomName(r *rand.Rand, i int) string {
	name := fmt.Sprintf("%03d-%x", i, r.Uint32())
	switch r.IntN(10) {
	case 0:
		return name + strings.Repeat("n", 255-len(name))
	case 1:
		return name + " é\n\xff"
	}
	return name
}

func randomContent(r *rand.Rand, shared []byte) []byte {
	switch r.IntN(7) {
	case 0:
		return nil
	case 1:
		return randomBytes(r, 1+r.IntN(4096), 8)
	case 2:
		return shared[:1+r.IntN(len(shared)-1)]
	case 3: // sparse: data, a hole, data
		b := make([]byte, 200_000+r.IntN(100_000))
		copy(b, randomBytes(r, 5000, 4))
		copy(b[len(b)-7000:], randomBytes(r, 7000, 4))
		return b
	case 4:
		return randomBytes(r, 1<<20+r.IntN(3<<20), 2)
	case 5:
		return randomBytes(r, 4096*(1+r.IntN(40)), 8)
	}
	return randomBytes(r, 1+r.IntN(60_000), 3)
}

// randomBytes gives n bytes that carry the given number of random bits each, so that they compress more or less.
func randomBytes(r *rand.Rand, n, bits int) []byte {
	b := make([]byte, n)
	for i := 0; i < n; i += 8 {
		v := r.Uint64()
		for j := i; j < min(i+8, n); j++ {
			b[j] = byte(v) & (1<<bits - 1)
			v >>= 8
		}
	}
	return b
}

// writeTar writes the model as a tar, parents first, links after what they link to.
func (m model) writeTar(t *testing.T, name string) {
	t.Helper()
	out, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	w := tar.NewWriter(out)
	paths := m.paths()
	for _, links := range []bool{false, true} {
		for _, p := range paths {
			f := m[p]
			if (f.hdr.Typeflag == tar.TypeLink) != links {
				continue
			}
			h := *f.hdr
			h.Name = "./" + p
			if h.Typeflag == tar.TypeLink {
				h.Linkname = "./" + h.Linkname
				h.PAXRecords = nil
			}
			if err := w.WriteHeader(&h); err != nil {
				t.Fatalf("tar header of %q: %v", p, err)
			}
			if _, err := w.Write(f.content); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

func (m model) paths() []string {
	out := make([]string, 0, len(m))
	for p := range m {
		out = append(out, p)
	}
	sort.Strings(out)
	return out
}

// compare fails the test wherever what the kernel shows below dir is not the model.
func (m model) compare(t *testing.T, dir string) {
	t.Helper()
	seen := 0
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		f := m[rel]
		if f == nil {
			t.Errorf("%q is in the mount and not in the tree", rel)
			return nil
		}
		seen++
		m.compareOne(t, p, rel, f)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen != len(m) {
		t.Errorf("the mount shows %d of %d files", seen, len(m))
	}
}

func (m model) compareOne(t *testing.T, p, rel string, f *file) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		t.Errorf("%q: %v", rel, err)
		return
	}
	first := f
	if f.peer != "" {
		first = m[f.peer]
		var peer unix.Stat_t
		if err := unix.Lstat(filepath.Join(strings.TrimSuffix(p, rel), f.peer), &peer); err != nil || peer.Ino != st.Ino {
			t.Errorf("%q is not the inode of %q: %d and %d (%v)", rel, f.peer, st.Ino, peer.Ino, err)
		}
	}
	h := first.hdr
	mode := uint32(h.Mode) | map[byte]uint32{tar.TypeReg: unix.S_IFREG, tar.TypeDir: unix.S_IFDIR, tar.TypeSymlink: unix.S_IFLNK,
		tar.TypeFifo: unix.S_IFIFO, tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK}[h.Typeflag]
	if st.Mode != mode || int(st.Uid) != h.Uid || int(st.Gid) != h.Gid {
		t.Errorf("%q: mode %o uid %d gid %d, want %o %d %d", rel, st.Mode, st.Uid, st.Gid, mode, h.Uid, h.Gid)
	}
	if st.Mtim.Nano() != h.ModTime.UnixNano() {
		t.Errorf("%q: mtime %d, want %d", rel, st.Mtim.Nano(), h.ModTime.UnixNano())
	}
	if h.Typeflag != tar.TypeDir && int(st.Nlink) != first.links {
		t.Errorf("%q: %d links, want %d", rel, st.Nlink, first.links)
	}
	switch h.Typeflag {
	case tar.TypeReg:
		if st.Size != int64(len(first.content)) {
			t.Errorf("%q: %d bytes, want %d", rel, st.Size, len(first.content))
		}
		got, err := readFile(p)
		if err != nil || sha256.Sum256(got) != sha256.Sum256(first.content) {
			t.Errorf("%q: read %d bytes, %v: first difference at %d", rel, len(got), err, difference(got, first.content))
		}
	case tar.TypeSymlink:
		if got, err := os.Readlink(p); err != nil || got != h.Linkname {
			t.Errorf("%q: link to %.40q..., %v, want %.40q...", rel, got, err, h.Linkname)
		}
	case tar.TypeChar, tar.TypeBlock:
		if got := unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)); st.Rdev != got {
			t.Errorf("%q: device %x, want %x", rel, st.Rdev, got)
		}
	}
	compareXattrs(t, p, rel, h)
}

func compareXattrs(t *testing.T, p, rel string, h *tar.Header) {
	t.Helper()
	list := make([]byte, 64<<10)
	n, err := unix.Llistxattr(p, list)
	if err != nil {
		t.Errorf("%q: list xattrs: %v", rel, err)
		return
	}
	got := 0
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		got++
		value := make([]byte, 64<<10)
		k, err := unix.Lgetxattr(p, name, value)
		want, ok := h.PAXRecords["SCHILY.xattr."+name]
		if err != nil || !ok || string(value[:k]) != want {
			t.Errorf("%q: xattr %s is %.40q (%v), want %.40q", rel, name, value[:max(k, 0)], err, want)
		}
	}
	if got != len(h.PAXRecords) {
		t.Errorf("%q: %d xattrs, want %d", rel, got, len(h.PAXRecords))
	}
}

func readFile(p string) ([]byte, error) {
	f, err := os.Open(p)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var b bytes.Buffer
	_, err = io.Copy(&b, f)
	return b.Bytes(), err
}

func difference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// bigFiles is a tree of n files f0, f1, ... of 1 MiB that does not compress.
func bigFiles(n int) model {
	r := rand.New(rand.NewPCG(7, 7))
	m := model{".": {hdr: header(r, ".", tar.TypeDir), links: 1}}
	for i := range n {
		name := fmt.Sprintf("f%d", i)
		f := &file{hdr: header(r, name, tar.TypeReg), links: 1, content: randomBytes(r, 1<<20, 8)}
		f.hdr.Size = 1 << 20
		m[name] = f
	}
	return m
}
