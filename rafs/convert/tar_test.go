package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"holdfast/rafs"
	"holdfast/rafs/tree"
)

// convertTar converts a tar in memory, plain, and returns the paths of the image.
func convertTar(t *testing.T, b []byte) map[string]seen {
	t.Helper()
	tmp := t.TempDir()
	src := "tar:" + writeFile(t, filepath.Join(tmp, "x.tar"), b)
	return convertTo(t, tmp, src, Options{ChunkSize: rafs.MinChunkSize, Codec: rafs.CodecZstd}).files
}

// tarError converts a tar that must be refused.
func tarError(t *testing.T, b []byte) error {
	t.Helper()
	tmp := t.TempDir()
	out := filepath.Join(tmp, "out")
	_, err := Run(context.Background(), Options{Source: "tar:" + writeFile(t, filepath.Join(tmp, "x.tar"), b), Dest: "oci:" + out + ":x"})
	if err == nil {
		t.Fatal("the tar was accepted")
	}
	if _, err := os.Stat(out); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("the failed conversion left %s behind: %v", out, err)
	}
	return err
}

func wantError(t *testing.T, err, is error, texts ...string) {
	t.Helper()
	if is != nil && !errors.Is(err, is) {
		t.Errorf("error %q is not %q", err, is)
	}
	for _, s := range texts {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("error %q does not say %q", err, s)
		}
	}
}

func TestEveryInodeTypeOfATarIsInTheImage(t *testing.T) {
	acl := "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x04\x00\x04\x00\xff\xff\xff\xff\x20\x00\x04\x00\xff\xff\xff\xff"
	got := convertTar(t, makeTar(t,
		dir("./"),
		reg("./file", "content").with("security.capability", "\x01\x00\x00\x02\x00\x00").with("system.posix_acl_access", acl).with("user.empty", "").with("trusted.t", "v").with("system.nfs4_acl", "gone"),
		reg("./empty", ""),
		link("./second", "file"),
		symlink("./symlink", "../../outside"),
		dev("./char", tar.TypeChar, 5, 1), dev("./block", tar.TypeBlock, 259, 70000), dev("./zero", tar.TypeChar, 0, 0),
		dev("./fifo", tar.TypeFifo, 0, 0),
		dir("./dir"),
		reg("./dir/.wh.x", ""),
		reg("./"+strings.Repeat("n", 255), "long name"),
		reg("./\xff\xfe not utf-8", "bytes"),
	))
	e, ns := epoch.Unix(), uint32(epoch.Nanosecond())
	entry := func(mode uint32) seen { return seen{Mode: mode, Mtime: e, Nsec: ns} }
	file := entry(tree.ModeFile | 0o644)
	with := func(s seen, fn func(*seen)) seen { fn(&s); return s }
	first := with(file, func(s *seen) {
		s.Content = "content"
		s.Xattrs = fmt.Sprintf("security.capability=%q system.posix_acl_access=%q trusted.t=\"v\" user.empty=\"\" ", "\x01\x00\x00\x02\x00\x00", acl)
	})
	diff(t, got, map[string]seen{
		"/":        entry(tree.ModeDir | 0o755),
		"/file":    first,
		"/second":  with(first, func(s *seen) { s.Links = "/file" }),
		"/empty":   file,
		"/symlink": with(entry(tree.ModeLink|0o777), func(s *seen) { s.Target = "../../outside" }),
		"/char":    with(entry(tree.ModeChar|0o600), func(s *seen) { s.Major, s.Minor = 5, 1 }),
		"/block":   with(entry(tree.ModeBlock|0o600), func(s *seen) { s.Major, s.Minor = 259, 70000 }),
		"/zero":    entry(tree.ModeChar | 0o600),
		"/fifo":    entry(tree.ModeFifo | 0o600),
		"/dir":     entry(tree.ModeDir | 0o755),
		// A tar alone has no layers below: a whiteout is a file.
		"/dir/.wh.x":                   file,
		"/" + strings.Repeat("n", 255): with(file, func(s *seen) { s.Content = "long name" }),
		"/\xff\xfe not utf-8":          with(file, func(s *seen) { s.Content = "bytes" }),
	})
}

func TestEntriesComeInAnyOrder(t *testing.T) {
	got := convertTar(t, makeTar(t,
		reg("d/e/file", "deep"),                          // before its directories
		link("early", "later"), link("earlier", "early"), // before their target
		reg("later", "x"), reg("later", "last wins"),
		member{tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o700, Uid: 7, ModTime: epoch}, ""},
		reg("file", "in the way"), reg("file/below", "now a directory"),
		symlink("s", "/etc"), reg("s/passwd", "not followed"),
		dir("gone"), reg("gone/child", "x"), reg("gone", "a file now"),
		reg("/absolute", "a"), reg("up/../side", "s"), dir("twice//and/./dotted/"),
	))
	for p, want := range map[string]seen{
		"/d":                {Mode: tree.ModeDir | 0o700, UID: 7, Mtime: epoch.Unix(), Nsec: uint32(epoch.Nanosecond())},
		"/d/e":              {Mode: tree.ModeDir | 0o755},
		"/file":             {Mode: tree.ModeDir | 0o755},
		"/s":                {Mode: tree.ModeDir | 0o755},
		"/twice/and/dotted": {Mode: tree.ModeDir | 0o755, Mtime: epoch.Unix(), Nsec: uint32(epoch.Nanosecond())},
	} {
		if got[p] != want {
			t.Errorf("%s is %+v, want %+v", p, got[p], want)
		}
	}
	for p, want := range map[string]string{
		"/d/e/file": "deep", "/file/below": "now a directory", "/s/passwd": "not followed", "/gone": "a file now", "/absolute": "a", "/side": "s",
		"/early": "last wins", "/earlier": "last wins", "/later": "last wins",
	} {
		if got[p].Content != want {
			t.Errorf("%s holds %q, want %q", p, got[p].Content, want)
		}
	}
	for _, p := range []string{"/up", "/etc", "/gone/child"} {
		if _, ok := got[p]; ok {
			t.Errorf("%s is in the image", p)
		}
	}
	if got["/early"].Links != "/earlier" || got["/later"].Links != "/earlier" {
		t.Errorf("links: early %q, later %q", got["/early"].Links, got["/later"].Links)
	}
}

func TestCompressedTarsAreRecognisedByTheirFirstBytes(t *testing.T) {
	b := makeTar(t, reg("a", strings.Repeat("content ", 100000)), dir("b"))
	want := convertTar(t, b)
	if len(want) != 3 {
		t.Fatalf("%d paths", len(want))
	}
	diff(t, convertTar(t, gzipped(b)), want)
	diff(t, convertTar(t, append(gzipped(b[:1000]), gzipped(b[1000:])...)), want)
	diff(t, convertTar(t, zstded(b)), want)
	diff(t, convertTar(t, append([]byte{0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 'm', 'e', 't', 'a'}, zstded(b)...)), want)
}

func TestTarDialectsOfGNUTar(t *testing.T) {
	if _, err := exec.LookPath("tar"); err != nil {
		t.Skipf("GNU tar is not installed: %v", err)
	}
	src, tars := t.TempDir(), t.TempDir()
	long := filepath.Join(src, strings.Repeat("d", 120), strings.Repeat("e", 120))
	if err := os.MkdirAll(long, 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(long, "f"), []byte("deep"))
	if err := os.Symlink(strings.Repeat("../", 100)+"x", filepath.Join(src, "longlink")); err != nil {
		t.Fatal(err)
	}
	sparse, err := os.Create(filepath.Join(src, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{100 << 10, 5<<20 + 3} {
		if _, err := sparse.WriteAt([]byte("island"), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := sparse.Close(); err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"--format=gnu", "--format=posix", "--format=posix --sparse-version=0.0", "--format=posix --sparse-version=0.1", "--format=oldgnu"} {
		t.Run(format, func(t *testing.T) {
			out := filepath.Join(tars, "x.tar")
			args := append(strings.Fields(format), "--sparse", "-C", src, "-cf", out, ".")
			if b, err := exec.Command("tar", args...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, b)
			}
			if fi, err := os.Stat(out); err != nil || fi.Size() > 1<<20 {
				t.Fatalf("the tar is not sparse: %v %v", fi.Size(), err)
			}
			got := convertTo(t, t.TempDir(), "tar:"+out, Options{Codec: rafs.CodecZstd, ChunkSize: rafs.MinChunkSize}).files
			want := make([]byte, 5<<20+9)
			copy(want[100<<10:], "island")
			copy(want[5<<20+3:], "island")
			if got["/sparse"].Content != string(want) {
				t.Errorf("/sparse has other content, %d bytes", len(got["/sparse"].Content))
			}
			deep := strings.TrimPrefix(long, src) + "/f"
			if got[deep].Content != "deep" {
				t.Errorf("%.20s... is %+v", deep, got[deep])
			}
			if want := strings.Repeat("../", 100) + "x"; got["/longlink"].Target != want {
				t.Errorf("long target is %q", got["/longlink"].Target)
			}
		})
	}
}

func TestFixtureTars(t *testing.T) {
	for name, want := range map[string][]string{
		"all-entry-type.tar": {"/tar/dir1/dir3/hardlink1.txt", "/tar/dir1/dir3/xfile.txt", "/tar/dir2/symlink1.txt"},
		"all-entry-type-macos.tar": {"/tar/dir1/dir3/hardlink1.txt", "/tar/dir2/symlink1.txt",
			"/tar/dir1/dir3/this_is_really_a_very_long_name_to_test_tar_entry_type_" + strings.Repeat("a", 196) + ".txt"},
		"empty.tar": {"/"},
	} {
		t.Run(name, func(t *testing.T) {
			path := fixture(t, "nydus/tar/"+name)
			got := convertTo(t, t.TempDir(), "tar:"+path, Options{}).files
			for _, p := range want {
				if _, ok := got[p]; !ok {
					t.Errorf("%s is missing in %d paths", p, len(got))
				}
			}
			if name == "all-entry-type.tar" && got["/tar/dir2/hardlink3.txt"].Links != "/tar/dir1/dir3/hardlink1.txt" {
				t.Errorf("hardlink3.txt links to %q", got["/tar/dir2/hardlink3.txt"].Links)
			}
		})
	}
}

func TestBadTarsAreRefused(t *testing.T) {
	good := makeTar(t, reg("one", "x"), reg("two", strings.Repeat("y", 5000)))
	name := func(n string) []byte { return makeTar(t, reg("fine", ""), reg(n, "")) }
	for _, c := range []struct {
		name  string
		tar   []byte
		is    error
		texts []string
	}{
		{"cut inside a file", good[:len(good)-1024-4096], io.ErrUnexpectedEOF, []string{`"two"`, "complete"}},
		{"cut inside an extended header", good[:700], io.ErrUnexpectedEOF, []string{"offsets 0 and 700"}},
		{"cut inside a header", good[:1300], io.ErrUnexpectedEOF, []string{"offset"}},
		{"header checksum", append([]byte("XX"), good[2:]...), tar.ErrHeader, []string{"offsets 0 and 512"}},
		{"not a tar", bytes.Repeat([]byte("text "), 1000), tar.ErrHeader, nil},
		{"gzip cut", gzipped(good)[:60], io.ErrUnexpectedEOF, nil},
		{"gzip damaged", damaged(gzipped(good), 40), nil, []string{"gzip"}},
		{"gzip with a tail", append(gzipped(good), "tail"...), nil, []string{"gzip"}},
		{"zstd cut", zstded(good)[:60], io.ErrUnexpectedEOF, nil},
		{"zstd damaged", damaged(zstded(good), 40), nil, []string{"zstd"}},
		{"path out of the image", name("../x"), ErrPath, []string{`"../x"`, "leads out"}},
		{"path out of the image, inside", name("a/../../x"), ErrPath, []string{`"a/../../x"`}},
		{"name of 256 bytes", name(strings.Repeat("n", 256)), tree.ErrName, []string{"256 bytes"}},
		{"path too long", name(strings.Repeat("n/", 9000) + "f"), ErrPath, []string{"bytes"}},
		{"missing link target", makeTar(t, link("l", "nothing")), ErrLink, []string{`"l"`, `"nothing"`}},
		{"links in a circle", makeTar(t, link("a", "b"), link("b", "a")), ErrLink, nil},
		{"link to a directory", makeTar(t, dir("d"), link("l", "d")), ErrLink, []string{`"l"`, "directory"}},
		{"link target out of the image", makeTar(t, link("l", "../../etc/passwd")), ErrPath, []string{`"../../etc/passwd"`}},
		{"the root is a file", makeTar(t, reg(".", "x")), ErrPath, []string{"root"}},
		{"target too long", makeTar(t, symlink("s", strings.Repeat("t", 5000))), nil, []string{"/s", "5000 bytes"}},
		{"owner", makeTar(t, member{tar.Header{Name: "o", Uid: 1 << 33, Typeflag: tar.TypeReg}, ""}), nil, []string{`"o"`, "8589934592"}},
		{"device number", makeTar(t, dev("d", tar.TypeChar, 5000, 1)), nil, []string{"/d", "5000:1"}},
		{"entry type", rawType(t, 'M'), nil, []string{"type 'M'"}},
		{"huge file that is not there", rawSize(t, 1<<40), io.ErrUnexpectedEOF, []string{"complete"}},
		{"impossible file", rawSize(t, 1<<50), nil, []string{"limit"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			wantError(t, tarError(t, c.tar), c.is, append(c.texts, "x.tar")...)
		})
	}
}

// However many links come before what they lead to, each is looked at once: going over all of them again for each one found would
// take this test's time out.
func TestLongChainOfLinksBeforeTheirTargets(t *testing.T) {
	const n = 200_000
	l := newLayer(nil)
	for i := range n {
		if err := l.link(strconv.Itoa(i), strconv.Itoa(i+1)); err != nil {
			t.Fatal(err)
		}
	}
	target := &tree.Inode{Mode: tree.ModeFile}
	if err := l.put(strconv.Itoa(n), target); err != nil {
		t.Fatal(err)
	}
	if err := l.finish(); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if l.find(strconv.Itoa(i)) != target {
			t.Fatalf("link %d leads elsewhere", i)
		}
	}
}

func damaged(b []byte, at int) []byte {
	b = bytes.Clone(b)
	b[at] ^= 0xff
	return b
}

// rawHeader returns a tar with one header that the tar package would not write.
func rawHeader(t *testing.T, change func(h []byte)) []byte {
	t.Helper()
	return rawHeaderOf(makeTar(t, member{tar.Header{Name: "raw", Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0)}, ""}), change)
}

// rawHeaderOf changes the first header of a tar.
func rawHeaderOf(b []byte, change func(h []byte)) []byte {
	change(b[:512])
	copy(b[148:156], "        ")
	sum := 0
	for _, c := range b[:512] {
		sum += int(c)
	}
	copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

func rawType(t *testing.T, typ byte) []byte {
	return rawHeader(t, func(h []byte) { h[156] = typ })
}

func rawSize(t *testing.T, size int64) []byte {
	return rawHeader(t, func(h []byte) {
		h[124] = 0x80 // base-256
		for i := range 11 {
			h[135-i] = byte(size >> (8 * min(i, 7)))
			if i > 7 {
				h[135-i] = 0
			}
		}
	})
}
