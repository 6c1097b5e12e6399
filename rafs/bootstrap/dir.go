package bootstrap

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"holdfast/rafs/tree"
)

// A dirent is an entry of a directory to be written; "." and ".." are among them. child is nil for "..".
type dirent struct {
	name  string
	child *tree.Node
}

// listing appends the entries of the directory n to buf, in the order of their names' bytes: the kernel's lookup is a
// binary search over all of them, so "." and ".." come after names like "!" (fs/erofs/namei.c, erofs_namei).
func listing(buf []dirent, n *tree.Node) []dirent {
	special := []dirent{{".", n}, {"..", nil}}
	for _, c := range n.Children() {
		for len(special) > 0 && special[0].name < c.Name {
			buf = append(buf, special[0])
			special = special[1:]
		}
		buf = append(buf, dirent{c.Name, c})
	}
	return append(buf, special...)
}

// dirBlock returns how many of the entries go into the next directory block, and the bytes they take there.
func dirBlock(entries []dirent) (n, used int) {
	for ; n < len(entries); n++ {
		need := direntSize + len(entries[n].name)
		if used+need > blockSize {
			break
		}
		used += need
	}
	return n, used
}

// dirSize is the size of a directory's data: whole blocks and what the last one uses.
func dirSize(entries []dirent) uint64 {
	var size uint64
	for len(entries) > 0 {
		n, used := dirBlock(entries)
		entries = entries[n:]
		if len(entries) > 0 {
			used = blockSize
		}
		size += uint64(used)
	}
	return size
}

// putDirBlock writes one directory block to b; nid and mode give the inode that an entry leads to.
func putDirBlock(b []byte, entries []dirent, inodeOf func(dirent) (nid uint64, mode uint32)) {
	le := binary.LittleEndian
	name := len(entries) * direntSize
	for i, e := range entries {
		nid, mode := inodeOf(e)
		d := b[i*direntSize:]
		le.PutUint64(d, nid)
		le.PutUint16(d[8:], uint16(name))
		d[10] = fileType(mode)
		name += copy(b[name:], e.name)
	}
}

// A rawDirent is an entry as a directory block has it.
type rawDirent struct {
	nid   uint64
	ftype uint8
	name  []byte // in the block
}

// parseDirBlock calls fn for each entry of a directory block, "." and ".." included, in the block's order. Names are
// bounded as in erofs_fill_dentries (fs/erofs/dir.c): the last one ends at a NUL or at the end of the block. Errors say
// what is wrong with which entry; the caller says where the block is.
func parseDirBlock(b []byte, fn func(rawDirent) error) error {
	if len(b) < direntSize {
		return fmt.Errorf("directory block of %d bytes has no room for an entry", len(b))
	}
	le := binary.LittleEndian
	start := int(le.Uint16(b[8:]))
	if start < direntSize || start%direntSize != 0 || start > len(b) {
		return fmt.Errorf("entry 0 has its name at %d, not after a whole number of entries", start)
	}
	count := start / direntSize
	off := start
	for i := range count {
		d := b[i*direntSize:]
		end := len(b)
		if i+1 < count {
			end = int(le.Uint16(b[(i+1)*direntSize+8:]))
		}
		if end <= off || end > len(b) {
			return fmt.Errorf("entry %d has its name from %d to %d in a block of %d bytes", i, off, end, len(b))
		}
		name := b[off:end]
		if i+1 == count {
			if k := bytes.IndexByte(name, 0); k >= 0 {
				name = name[:k]
			}
		}
		if err := fn(rawDirent{le.Uint64(d), d[10], name}); err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
		off = end
	}
	return nil
}
