package convert

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"holdfast/rafs/tree"
)

// Markers of whiteouts: files of OCI layers (OCI image specification 1.1, layer.md, "Whiteouts"), and device numbers and
// attributes of overlayfs (Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories").
const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh." // of AUFS: files that are no part of the image, but for the next
	whiteoutOpaque = ".wh..wh..opq"
)

var opaqueXattrs = []string{"trusted.overlay.opaque", "user.overlay.opaque"}

// hides reports whether the entry of a layer hides an entry of the layers below, and which.
func hides(n *tree.Node) (name string, is bool) {
	if n.Inode.Mode&tree.ModeType == tree.ModeChar && n.Inode.Major == 0 && n.Inode.Minor == 0 {
		return n.Name, true
	}
	if strings.HasPrefix(n.Name, whiteoutMeta) {
		return "", true
	}
	return strings.CutPrefix(n.Name, whiteoutPrefix)
}

// opaque reports whether a directory of a layer hides all entries of the same directory in the layers below.
func opaque(n *tree.Node) bool {
	if n.Child(whiteoutOpaque) != nil {
		return true
	}
	for _, name := range opaqueXattrs {
		if v, ok := n.Inode.Xattr(name); ok && bytes.Equal(v, []byte("y")) {
			return true
		}
	}
	return false
}

// merge puts the layer l on top of root. Whiteouts hide what is in root, never an entry of their own layer, and are gone
// afterwards. A directory takes its inode from the highest layer that describes it.
func merge(root *tree.Node, l *layer) error { return l.mergeDir(root, l.root, "/") }

func (l *layer) mergeDir(dst, src *tree.Node, path string) error {
	if !l.implied[src.Inode] {
		dst.Inode = withoutOpaque(src.Inode)
	}
	if opaque(src) {
		dst.Clear()
	}
	var visible []*tree.Node
	for _, c := range src.Children() {
		name, is := hides(c)
		switch {
		case !is:
			visible = append(visible, c)
		case strings.HasPrefix(c.Name, whiteoutPrefix) && (name == "." || name == ".." || c.Name == whiteoutPrefix):
			return fmt.Errorf("merge layers: whiteout %.256q hides no possible name", path+c.Name)
		default:
			dst.Remove(name)
		}
	}
	for _, c := range visible {
		if !c.Inode.IsDir() {
			if err := dst.Put(&tree.Node{Name: c.Name, Inode: c.Inode}); err != nil {
				return fmt.Errorf("merge layers: %s: %w", path, err)
			}
			continue
		}
		d := dst.Child(c.Name)
		if d == nil || !d.Inode.IsDir() {
			d = &tree.Node{Name: c.Name, Inode: c.Inode}
			if err := dst.Put(d); err != nil {
				return fmt.Errorf("merge layers: %s: %w", path, err)
			}
		}
		if err := l.mergeDir(d, c, path+c.Name+"/"); err != nil {
			return err
		}
	}
	return nil
}

// withoutOpaque returns in, or a copy of it without the attributes that merging has used up.
func withoutOpaque(in *tree.Inode) *tree.Inode {
	used := func(x tree.Xattr) bool { return slices.Contains(opaqueXattrs, x.Name) }
	if !slices.ContainsFunc(in.Xattrs, used) {
		return in
	}
	c := *in
	c.Xattrs = slices.DeleteFunc(slices.Clone(in.Xattrs), used)
	return &c
}
