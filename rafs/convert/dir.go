package convert

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	cfs "github.com/containerd/continuity/fs"
	"github.com/containerd/continuity/sysx"

	"holdfast/rafs/tree"
)

// A dirWalk reads a directory on disk into a layer.
type dirWalk struct {
	r     *layerReader
	links map[uint64][]seenLink // by inode number
}

// A seenLink is a file with several names. Inode numbers alone do not tell files apart where file systems are mounted
// below the directory.
type seenLink struct {
	info os.FileInfo
	in   *tree.Inode
}

// readDir reads a layer from the directory root, and from file systems mounted below it. It follows no symbolic links but
// root itself.
func (r *layerReader) readDir(ctx context.Context, root string) error {
	resolved, err := filepath.EvalSymlinks(root)
	if err != nil {
		return err
	}
	w := &dirWalk{r: r, links: make(map[uint64][]seenLink)}
	return filepath.WalkDir(resolved, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(resolved, path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if err := w.entry(ctx, path, rel, info); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		return nil
	})
}

func (w *dirWalk) entry(ctx context.Context, path, rel string, info os.FileInfo) error {
	p, err := cleanPath(rel)
	if err != nil {
		return err
	}
	ino, linked := cfs.GetLinkInfo(info)
	if linked {
		for _, s := range w.links[ino] {
			if os.SameFile(s.info, info) {
				return w.r.layer.put(p, s.in)
			}
		}
	}
	in, err := w.inode(path, info)
	if err != nil {
		return err
	}
	if in.IsFile() {
		if err := w.file(ctx, in, path, info); err != nil {
			return err
		}
	}
	if linked {
		w.links[ino] = append(w.links[ino], seenLink{info, in})
	}
	return w.r.layer.put(p, in)
}

// inode returns the inode of a file on disk, without its content.
func (w *dirWalk) inode(path string, info os.FileInfo) (*tree.Inode, error) {
	var target string
	if info.Mode()&os.ModeSymlink != 0 {
		var err error
		if target, err = os.Readlink(path); err != nil {
			return nil, err
		}
	}
	h, err := tar.FileInfoHeader(statInfo{info}, target)
	if err != nil {
		return nil, err
	}
	in, err := tarInode(h)
	if err != nil {
		return nil, err
	}
	if info.Mode()&os.ModeSocket != 0 {
		in.Mode ^= tree.ModeFifo ^ tree.ModeSocket
	}
	names, err := sysx.LListxattr(path)
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return nil, fmt.Errorf("list extended attributes: %w", err)
	}
	for _, name := range names {
		value, err := sysx.LGetxattr(path, name)
		if err != nil {
			return nil, fmt.Errorf("read extended attribute %s: %w", name, err)
		}
		if err := w.r.setXattr(in, name, value); err != nil {
			return nil, err
		}
	}
	return in, nil
}

// statInfo makes tar.FileInfoHeader do what is wanted of it here, which is to tell what stat(2) said: no names of users are
// looked up, and a socket, which no tar can hold, passes for a fifo.
type statInfo struct{ os.FileInfo }

func (statInfo) Uname() (string, error) { return "", nil }
func (statInfo) Gname() (string, error) { return "", nil }

func (s statInfo) Mode() os.FileMode {
	m := s.FileInfo.Mode()
	if m&os.ModeSocket != 0 {
		m ^= os.ModeSocket | os.ModeNamedPipe
	}
	return m
}

// file cuts a file's content into chunks, leaving out the holes that the file system tells of.
func (w *dirWalk) file(ctx context.Context, in *tree.Inode, path string, info os.FileInfo) error {
	if info.Size() == 0 {
		return w.r.chunks.add(ctx, in, 0, nil)
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	opened, err := f.Stat()
	if err != nil {
		return err
	}
	if !os.SameFile(info, opened) || opened.Size() != info.Size() {
		return errChanged
	}
	holes := holeFinder{f: f}
	size := info.Size()
	err = w.r.chunks.add(ctx, in, uint64(size), func(p []byte, off uint64) error {
		if holes.covers(int64(off), int64(len(p)), size) {
			clear(p)
			return nil
		}
		n, err := f.ReadAt(p, int64(off))
		w.r.read.Add(int64(n))
		if err == io.EOF && n < len(p) {
			return errChanged
		}
		if n == len(p) {
			err = nil
		}
		return err
	})
	if err != nil {
		return err
	}
	if opened, err = f.Stat(); err == nil && (opened.Size() != size || !opened.ModTime().Equal(info.ModTime())) {
		err = errChanged
	}
	return err
}

var errChanged = errors.New("the file changed while it was read: convert a directory that nothing writes to")

// Whence values of lseek(2), Linux 3.1 and later.
const (
	seekData = 3
	seekHole = 4
)

// A holeFinder knows the holes of a file, as far as its file system tells.
type holeFinder struct {
	f          *os.File
	start, end int64 // the next extent of data
	dense      bool  // there is no hole from start on, or none that can be found
}

// covers reports whether the n bytes at off are in a hole of a file of size bytes. Offsets must not decrease.
func (h *holeFinder) covers(off, n, size int64) bool {
	for !h.dense && off >= h.end {
		if !h.advance(off, size) {
			h.dense = true
		}
	}
	return off+n <= h.start
}

// advance finds the first extent of data at or after off.
func (h *holeFinder) advance(off, size int64) bool {
	hole, err := h.f.Seek(off, seekHole)
	if err != nil {
		return false // the file system cannot tell
	}
	if hole > off { // off is in data
		h.start, h.end = off, hole
		return true
	}
	data, err := h.f.Seek(off, seekData)
	if err != nil || data >= size { // no more data: lseek says ENXIO
		h.start, h.end = size, size
		return true
	}
	end, err := h.f.Seek(data, seekHole)
	if err != nil {
		return false
	}
	h.start, h.end = data, end
	return true
}
