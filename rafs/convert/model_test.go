package convert

import (
	"archive/tar"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"holdfast/rafs"
	"holdfast/rafs/tree"
)

// A flat is a simple model of a layer and of an image: every path with its inode, "" being the root.
type flat map[string]*flatInode

type flatInode struct {
	seen
	implied bool
}

func newFlat() flat {
	return flat{"": {seen: seen{Mode: tree.ModeDir | 0o755}, implied: true}}
}

func (f flat) isDir(p string) bool { return f[p] != nil && f[p].Mode&tree.ModeType == tree.ModeDir }

func (f flat) removeBelow(p string) {
	for q := range f {
		if q != p && (p == "" || strings.HasPrefix(q, p+"/")) {
			delete(f, q)
		}
	}
}

func parentOf(p string) string {
	if d := path.Dir(p); d != "." {
		return d
	}
	return ""
}

func (f flat) mkdirs(p string) {
	if f.isDir(p) {
		return
	}
	f.mkdirs(parentOf(p))
	f[p] = &flatInode{seen: seen{Mode: tree.ModeDir | 0o755}, implied: true}
}

func (f flat) put(p string, in *flatInode) {
	if p != "" {
		f.mkdirs(parentOf(p))
	}
	if in.Mode&tree.ModeType != tree.ModeDir {
		f.removeBelow(p)
	}
	f[p] = in
}

// over puts the layer f on the image lower.
func (f flat) over(lower flat) {
	paths := slices.Sorted(maps.Keys(f))
	marker := func(p string) bool {
		in := f[p]
		return strings.HasPrefix(path.Base(p), ".wh.") || in.Mode&tree.ModeType == tree.ModeChar && in.Major == 0 && in.Minor == 0
	}
	hide := func(p string) {
		lower.removeBelow(p)
		delete(lower, p)
	}
	for _, p := range paths {
		switch base := path.Base(p); {
		case base == ".wh..wh..opq", strings.Contains(f[p].Xattrs, "overlay.opaque=\"y\""):
			d := p
			if base == ".wh..wh..opq" {
				d = parentOf(p)
			}
			if !inMarker(p) {
				lower.removeBelow(d)
			}
		case marker(p) && strings.HasPrefix(base, ".wh."):
			hide(strings.TrimPrefix(parentOf(p)+"/"+strings.TrimPrefix(base, ".wh."), "/"))
		case marker(p):
			hide(p)
		}
	}
	for _, p := range paths {
		if marker(p) || inMarker(p) {
			continue
		}
		in := f[p]
		if in.implied && lower.isDir(p) {
			continue
		}
		c := in
		if strings.Contains(in.Xattrs, "overlay.opaque") {
			d := *in
			d.Xattrs = ""
			c = &d
		}
		lower.put(p, c)
	}
}

// inMarker reports whether p lies in a directory that is itself named as a whiteout.
func inMarker(p string) bool {
	return strings.HasPrefix(p, ".wh.") || strings.Contains(path.Dir(p), "/.wh.")
}

// describe returns the model as describe does of a tree.
func (f flat) describe() map[string]seen {
	out := make(map[string]seen)
	first := make(map[*flatInode]string)
	// In the order of a walk: parents first, children by name.
	paths := slices.SortedFunc(maps.Keys(f), func(a, b string) int {
		return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/"))
	})
	for _, p := range paths {
		s := f[p].seen
		if l, ok := first[f[p]]; ok {
			s.Links = l
		} else {
			first[f[p]] = "/" + p
		}
		out["/"+p] = s
	}
	return out
}

// drawContent draws a file's content, made of few different blocks so that chunks repeat and holes occur.
func drawContent(t *rapid.T) string {
	blocks := rapid.SliceOfN(rapid.SampledFrom([]byte("\x00ab")), 0, 5).Draw(t, "blocks")
	var s strings.Builder
	for _, b := range blocks {
		s.WriteString(strings.Repeat(string(rune(b)), rafs.MinChunkSize))
	}
	s.WriteString(rapid.StringN(0, 20, -1).Draw(t, "tail"))
	return s.String()
}

var names = []string{"a", "b", "c", "dir", "\xff\xfe", "name with spaces"}

func drawPath(t *rapid.T) string {
	return strings.Join(rapid.SliceOfN(rapid.SampledFrom(names), 1, 3).Draw(t, "path"), "/")
}

// drawMember draws an entry and adds it to the model of its layer.
func drawMember(t *rapid.T, layer, lower flat) (member, bool) {
	p := drawPath(t)
	in := &flatInode{seen: seen{
		Mode: uint32(rapid.IntRange(0, 0o7777).Draw(t, "mode")), UID: rapid.Uint32().Draw(t, "uid"), GID: rapid.Uint32Range(0, 3).Draw(t, "gid"),
		Mtime: rapid.Int64Range(-5, 1<<33).Draw(t, "mtime"), Nsec: rapid.Uint32Range(0, 999999999).Draw(t, "nsec"),
	}}
	m := member{Header: tar.Header{
		Name: p, Mode: int64(in.Mode), Uid: int(in.UID), Gid: int(in.GID), ModTime: time.Unix(in.Mtime, int64(in.Nsec)),
	}}
	switch rapid.SampledFrom([]string{"file", "file", "dir", "dir", "symlink", "link", "char", "block", "fifo", "whiteout", "opaque", "overlay whiteout", "overlay opaque"}).Draw(t, "kind") {
	case "file":
		m.Typeflag, in.Mode, m.body = tar.TypeReg, in.Mode|tree.ModeFile, drawContent(t)
		in.Content = m.body
	case "dir":
		m.Typeflag, in.Mode = tar.TypeDir, in.Mode|tree.ModeDir
		m.Name += rapid.SampledFrom([]string{"", "/"}).Draw(t, "slash")
	case "symlink":
		m.Typeflag, in.Mode, in.Target = tar.TypeSymlink, in.Mode|tree.ModeLink, rapid.SampledFrom([]string{"/etc", "../..", "a"}).Draw(t, "target")
		m.Linkname = in.Target
	case "link":
		target := drawPath(t)
		found := layer[target]
		if found == nil {
			found = lower[target]
		}
		if found == nil || found.Mode&tree.ModeType == tree.ModeDir || found.Mode == tree.ModeChar {
			return member{}, false
		}
		layer.put(p, found)
		m.Typeflag, m.Linkname = tar.TypeLink, target
		return m, true
	case "char", "block":
		m.Typeflag, in.Mode = tar.TypeBlock, in.Mode|tree.ModeBlock
		in.Major, in.Minor = rapid.Uint32Range(0, 4095).Draw(t, "major"), rapid.Uint32Range(1, 1<<20-1).Draw(t, "minor")
		m.Devmajor, m.Devminor = int64(in.Major), int64(in.Minor)
	case "fifo":
		m.Typeflag, in.Mode = tar.TypeFifo, in.Mode|tree.ModeFifo
	case "whiteout":
		m.Typeflag, in.Mode = tar.TypeReg, in.Mode|tree.ModeFile
		p = strings.TrimPrefix(parentOf(p)+"/.wh."+path.Base(p), "/")
	case "opaque":
		m.Typeflag, in.Mode = tar.TypeReg, in.Mode|tree.ModeFile
		p += "/.wh..wh..opq"
	case "overlay whiteout":
		m.Typeflag, in.Mode = tar.TypeChar, in.Mode|tree.ModeChar
	case "overlay opaque":
		m.Typeflag, in.Mode = tar.TypeDir, in.Mode|tree.ModeDir
		key := rapid.SampledFrom([]string{"trusted.overlay.opaque", "user.overlay.opaque"}).Draw(t, "key")
		in.Xattrs = key + "=\"y\" "
		m = m.with(key, "y")
	}
	if m.Typeflag != tar.TypeDir {
		m.Name = p
	}
	if in.Xattrs == "" && rapid.Bool().Draw(t, "xattr") {
		in.Xattrs = "security.capability=\"\\x00\\x01\" user.x=\"y\" "
		m = m.with("user.x", "y").with("security.capability", "\x00\x01").with("com.apple.x", "not for EROFS")
	}
	layer.put(p, in)
	return m, true
}

// TestRandomImagesConvertAsTheModelSays proves the rules for entries and for merging layers: random tars, as layers of an
// image and alone, converted, read back and compared with a model that knows nothing but a map of paths.
func TestRandomImagesConvertAsTheModelSays(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tmp, err := os.MkdirTemp("", "convert-test-")
		if err != nil {
			t.Fatalf("%v", err)
		}
		defer os.RemoveAll(tmp)
		image := newFlat()
		var layers [][]byte
		var models []map[string]seen
		for range rapid.IntRange(1, 3).Draw(t, "layers") {
			layer := newFlat()
			var members []member
			for range rapid.IntRange(0, 12).Draw(t, "entries") {
				if m, ok := drawMember(t, layer, image); ok {
					members = append(members, m)
				}
			}
			b := makeTar(t, members...)
			switch rapid.IntRange(0, 2).Draw(t, "compression") {
			case 1:
				b = gzipped(b)
			case 2:
				b = zstded(b)
			}
			layers = append(layers, b)
			models = append(models, layer.describe())
			layer.over(image)
		}
		o := Options{
			ChunkSize: rafs.MinChunkSize,
			Codec:     rapid.SampledFrom([]rafs.Codec{rafs.CodecNone, rafs.CodecLZ4, rafs.CodecZstd}).Draw(t, "codec"),
			Digest:    rapid.SampledFrom([]rafs.DigestAlgo{rafs.Blake3, rafs.SHA256}).Draw(t, "digest"),
			Workers:   rapid.IntRange(1, 3).Draw(t, "workers"),
		}
		src := ociLayout(t, filepath.Join(tmp, "in"), "x", ociImage(t, layers...))
		got := convertTo(t, tmp, "oci:"+src+":x", o)
		if d := cmp.Diff(image.describe(), got.files); d != "" {
			t.Fatalf("merged image differs (-want +got):\n%s", d)
		}
		single := filepath.Join(tmp, "single")
		if err := os.Mkdir(single, 0o755); err != nil {
			t.Fatalf("%v", err)
		}
		alone := convertTo(t, single, "tar:"+writeFile(t, filepath.Join(single, "x.tar"), layers[0]), o)
		if d := cmp.Diff(models[0], alone.files); d != "" {
			t.Fatalf("single tar differs (-want +got):\n%s", d)
		}
		for i, l := range alone.layers {
			if d := cmp.Diff(withoutContent(models[i]), l); d != "" {
				t.Fatalf("bootstrap in the blob differs (-want +got):\n%s", d)
			}
		}
	})
}

func withoutContent(m map[string]seen) map[string]seen {
	out := make(map[string]seen)
	for p, s := range m {
		s.Content = ""
		out[p] = s
	}
	return out
}
