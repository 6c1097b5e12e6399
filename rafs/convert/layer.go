package convert

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"holdfast/rafs/bootstrap"
	"holdfast/rafs/tree"
)

// maxTreeMemory bounds what the entries of one layer may take in memory, in bytes: about four million files.
const maxTreeMemory = 4 << 30

// What an entry takes without its strings until its image is written (measured): node, inode, map slots, and a directory's map.
const (
	entryMemory     = 1 << 10
	directoryMemory = 5 << 9
)

// Errors about entries; the errors that wrap them name the entry.
var (
	// ErrPath means that an entry's path leads out of the image or is too long.
	ErrPath = errors.New("unusable path")
	// ErrLink means that a hard link's target does not exist or is a directory.
	ErrLink = errors.New("unusable hard link")
)

// A layer is the file tree of one layer while its entries are read, in any order. The later entry wins: whatever stands in
// its way, a file or a symbolic link where a directory is needed included, is replaced, and no symbolic link is ever
// followed. A directory that comes again keeps its entries. Whiteouts are entries like all others: merge gives them their
// meaning.
type layer struct {
	root    *tree.Node
	lower   *tree.Node           // the layers below, merged: hard links may lead there; nil: none
	implied map[*tree.Inode]bool // directories that are only there because something lies in them
	waiting []hardLink           // not found so far
	memory  int                  // of maxTreeMemory
}

type hardLink struct{ path, target string }

func newLayer(lower *tree.Node) *layer {
	l := &layer{root: tree.NewRoot(), lower: lower, implied: make(map[*tree.Inode]bool)}
	l.implied[l.root.Inode] = true
	return l
}

// cleanPath returns a path of an archive relative to the root, "" for the root itself, without ".", ".." and doubled or
// outer slashes.
func cleanPath(p string) (string, error) {
	if p == "" {
		return "", fmt.Errorf("%w: it is empty", ErrPath)
	}
	c := path.Clean(strings.TrimLeft(p, "/"))
	switch {
	case c == ".":
		return "", nil
	case c == "..", strings.HasPrefix(c, "../"):
		return "", fmt.Errorf("%w: it leads out of the image", ErrPath)
	case len(c) >= bootstrap.MaxPath:
		return "", fmt.Errorf("%w: it has %d bytes, at most %d are possible", ErrPath, len(c), bootstrap.MaxPath-1)
	}
	return c, nil
}

// put makes in the inode at a clean path.
func (l *layer) put(p string, in *tree.Inode) error {
	if err := l.account(entryMemory + len(p) + len(in.Target)); err != nil {
		return err
	}
	if p == "" {
		if !in.IsDir() {
			return fmt.Errorf("%w: the root of an image must be a directory", ErrPath)
		}
		delete(l.implied, l.root.Inode)
		l.root.Inode = in
		return nil
	}
	dir, name, err := l.parent(p)
	if err != nil {
		return err
	}
	if old := dir.Child(name); old != nil && old.Inode.IsDir() && in.IsDir() {
		delete(l.implied, old.Inode)
		old.Inode = in
		return nil
	}
	return dir.Put(&tree.Node{Name: name, Inode: in})
}

// account takes n bytes of the memory that a layer's entries may use.
func (l *layer) account(n int) error {
	l.memory += n
	if l.memory > maxTreeMemory {
		return fmt.Errorf("the names and attributes of the layer's entries take over %d MiB of memory", maxTreeMemory>>20)
	}
	return nil
}

// parent returns the directory that a clean path other than the root's lies in, made if need be, and its last part.
func (l *layer) parent(p string) (*tree.Node, string, error) {
	dir := l.root
	for {
		name, rest, more := strings.Cut(p, "/")
		if !more {
			return dir, name, nil
		}
		c := dir.Child(name)
		if c == nil || !c.Inode.IsDir() {
			if err := l.account(directoryMemory + len(name)); err != nil {
				return nil, "", err
			}
			c = &tree.Node{Name: name, Inode: &tree.Inode{Mode: tree.ModeDir | 0o755}}
			if err := dir.Put(c); err != nil {
				return nil, "", err
			}
			l.implied[c.Inode] = true
		}
		dir, p = c, rest
	}
}

// link makes the entry p a hard link to target, both clean paths. The target is looked for in this layer and then in those
// below; one that is not there yet is looked for again by finish.
func (l *layer) link(p, target string) error {
	in := l.find(target)
	switch {
	case in == nil:
		l.waiting = append(l.waiting, hardLink{p, target})
		return l.account(entryMemory + len(p) + len(target))
	case in.IsDir():
		return fmt.Errorf("%w: its target %.256q is a directory", ErrLink, target)
	case p == "":
		return fmt.Errorf("%w: the root of an image cannot be one", ErrLink)
	}
	return l.put(p, in)
}

func (l *layer) find(p string) *tree.Inode {
	if n := lookup(l.root, p); n != nil {
		return n.Inode
	}
	if n := lookup(l.lower, p); n != nil {
		return n.Inode
	}
	return nil
}

// lookup returns the entry at a clean path below root, or nil. It follows no symbolic links.
func lookup(root *tree.Node, p string) *tree.Node {
	n := root
	for p != "" && n != nil {
		var name string
		name, p, _ = strings.Cut(p, "/")
		n = n.Child(name)
	}
	return n
}

// finish resolves the hard links that came before their targets, each once: a target may be another of them.
func (l *layer) finish() error {
	waiting := l.waiting
	l.waiting = nil
	var ready []hardLink
	after := make(map[string][]hardLink) // by the target that is not there yet
	for _, h := range waiting {
		if l.find(h.target) == nil {
			after[h.target] = append(after[h.target], h)
		} else {
			ready = append(ready, h)
		}
	}
	for len(ready) > 0 {
		h := ready[0]
		if err := l.link(h.path, h.target); err != nil {
			return fmt.Errorf("entry %.256q: %w", h.path, err)
		}
		ready = append(ready[1:], after[h.path]...)
		delete(after, h.path)
	}
	for _, h := range waiting {
		if after[h.target] != nil {
			l.waiting = append(l.waiting, h)
		}
	}
	if len(l.waiting) > 0 { // also where another link has taken a target's place away
		h := l.waiting[0]
		return fmt.Errorf("entry %.256q: %w: its target %.256q is neither in this layer nor in one below", h.path, ErrLink, h.target)
	}
	return nil
}
