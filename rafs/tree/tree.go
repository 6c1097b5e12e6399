package tree

import (
	"errors"
	"fmt"
	"sort"
	"strings"
)

// File type bits of [Inode.Mode], as in stat(2).
const (
	ModeType   = 0o170000
	ModeSocket = 0o140000
	ModeLink   = 0o120000
	ModeFile   = 0o100000
	ModeBlock  = 0o060000
	ModeDir    = 0o040000
	ModeChar   = 0o020000
	ModeFifo   = 0o010000
)

// MaxName is the longest name of an entry, in bytes (EROFS_NAME_LEN, fs/erofs/erofs_fs.h).
const MaxName = 255

// A ChunkRef is one chunk-sized piece of a regular file.
type ChunkRef struct {
	Blob   int    // 1 + index in the image's list of blobs; 0: a hole
	Index  uint32 // row in the blob's own chunk array
	Offset uint64 // in the blob's object, a multiple of 4096
}

// Hole is the reference of a piece that is all zeros and stored nowhere. Images made by holdfast have none: where a read
// spans a hole and data behind it, EROFS over fscache gives zeros for both (fs/erofs/fscache.c,
// erofs_fscache_data_read_slice, seen in 6.12: what is left of the read is zeroed without regard to the extent's end).
// Zeros are a chunk of their own, stored once.
var Hole = ChunkRef{}

// An Xattr is one extended attribute, with its full name ("user.x").
type Xattr struct {
	Name  string
	Value []byte
}

// An Inode is a file of any type. Entries that are hard links of each other share it.
type Inode struct {
	Mode      uint32 // type and permission bits as in stat(2)
	UID, GID  uint32
	Major     uint32 // of device nodes
	Minor     uint32
	Mtime     int64 // seconds
	MtimeNsec uint32
	Size      uint64     // bytes, regular files only
	ChunkSize uint32     // bytes a ChunkRef stands for, a power of two; regular files only
	Chunks    []ChunkRef // ceil(Size / ChunkSize) of them
	Target    string     // of symbolic links
	Xattrs    []Xattr    // sorted by Name, without duplicates (SetXattr keeps it so)
}

// IsDir, IsFile and IsLink report the inode's type.
func (i *Inode) IsDir() bool  { return i.Mode&ModeType == ModeDir }
func (i *Inode) IsFile() bool { return i.Mode&ModeType == ModeFile }
func (i *Inode) IsLink() bool { return i.Mode&ModeType == ModeLink }

// Xattr returns the value of the attribute called name.
func (i *Inode) Xattr(name string) ([]byte, bool) {
	n := sort.Search(len(i.Xattrs), func(k int) bool { return i.Xattrs[k].Name >= name })
	if n < len(i.Xattrs) && i.Xattrs[n].Name == name {
		return i.Xattrs[n].Value, true
	}
	return nil, false
}

// SetXattr sets an attribute, replacing one of the same name.
func (i *Inode) SetXattr(name string, value []byte) {
	n := sort.Search(len(i.Xattrs), func(k int) bool { return i.Xattrs[k].Name >= name })
	if n < len(i.Xattrs) && i.Xattrs[n].Name == name {
		i.Xattrs[n].Value = value
		return
	}
	i.Xattrs = append(i.Xattrs, Xattr{})
	copy(i.Xattrs[n+1:], i.Xattrs[n:])
	i.Xattrs[n] = Xattr{name, value}
}

// A Node is an entry: a name and the inode it leads to. The root has no name.
type Node struct {
	Name  string
	Inode *Inode

	children map[string]*Node // of directories
	sorted   []*Node          // children by name; nil when stale
}

// NewRoot returns an empty root directory with mode 0755.
func NewRoot() *Node { return &Node{Inode: &Inode{Mode: ModeDir | 0o755}} }

// ErrName is wrapped by errors about names that an entry cannot have.
var ErrName = errors.New("invalid entry name")

// CheckName reports whether name can be an entry's name.
func CheckName(name string) error {
	switch {
	case name == "" || name == "." || name == "..":
		return fmt.Errorf("%w %q", ErrName, name)
	case len(name) > MaxName:
		return fmt.Errorf("%w: %.32q and so on has %d bytes, at most %d are possible", ErrName, name, len(name), MaxName)
	case strings.ContainsAny(name, "/\x00"):
		return fmt.Errorf("%w %q: '/' or NUL in it", ErrName, name)
	}
	return nil
}

// Child returns the entry called name of a directory, or nil.
func (n *Node) Child(name string) *Node { return n.children[name] }

// Put adds c to the directory n, replacing an entry of the same name.
func (n *Node) Put(c *Node) error {
	if err := CheckName(c.Name); err != nil {
		return err
	}
	if n.children == nil {
		n.children = make(map[string]*Node)
	}
	n.children[c.Name] = c
	n.sorted = nil
	return nil
}

// Remove deletes the entry called name, if there is one.
func (n *Node) Remove(name string) {
	delete(n.children, name)
	n.sorted = nil
}

// Clear deletes all entries of a directory.
func (n *Node) Clear() { n.children, n.sorted = nil, nil }

// Children returns the entries of a directory in the order of their names' bytes. The slice is shared: do not change it.
func (n *Node) Children() []*Node {
	if n.sorted == nil && len(n.children) > 0 {
		n.sorted = make([]*Node, 0, len(n.children))
		for _, c := range n.children {
			n.sorted = append(n.sorted, c)
		}
		sort.Slice(n.sorted, func(i, j int) bool { return n.sorted[i].Name < n.sorted[j].Name })
	}
	return n.sorted
}

// Walk calls fn for n and everything below it, parents first, in name order. path is "/" for n and "/a/b" below.
func (n *Node) Walk(fn func(path string, n *Node) error) error { return n.walk("/", fn) }

func (n *Node) walk(path string, fn func(string, *Node) error) error {
	if err := fn(path, n); err != nil {
		return err
	}
	for _, c := range n.Children() {
		if err := c.walk(strings.TrimSuffix(path, "/")+"/"+c.Name, fn); err != nil {
			return err
		}
	}
	return nil
}

// Lookup returns the entry at an absolute path: "/" for n itself, "/a/b" below. Symbolic links are not followed.
func (n *Node) Lookup(path string) (*Node, error) {
	rest, ok := strings.CutPrefix(path, "/")
	if !ok {
		return nil, fmt.Errorf("path %.256q does not start with '/'", path)
	}
	at := n
	for rest != "" {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		if at = at.Child(name); at == nil {
			return nil, fmt.Errorf("path %.256q: no entry %.256q", path, name)
		}
	}
	return at, nil
}
