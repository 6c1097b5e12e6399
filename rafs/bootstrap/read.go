package bootstrap

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"strings"

	"holdfast/rafs"
	"holdfast/rafs/tree"
)

// Read reads a bootstrap of size bytes and checks all of it. name is for errors. It holds the file and the whole tree
// in memory. Files whose chunk size is raised have it in Inode.ChunkSize and references as they are stored (the Index
// is that of the first of the chunks); above 2 GiB, which Inode.ChunkSize cannot hold, they are cut into parts of 2 GiB.
func Read(r io.ReaderAt, size int64, name string) (*Image, error) {
	h, err := openHeader(r, size, name)
	if err != nil {
		return nil, err
	}
	if err := h.load(); err != nil {
		return nil, err
	}
	img := &Image{Blobs: h.blobs, ChunkSize: h.ext.ChunkSize, Codec: h.codec, Digest: h.digest}
	if img.Chunks, err = h.readChunkTable(); err != nil {
		return nil, err
	}
	t := newTreeReader(h)
	for _, nid := range h.prefetch {
		t.wanted[uint64(nid)] = ""
	}
	if img.Root, err = t.readTree(uint64(h.sb.RootNid)); err != nil {
		return nil, err
	}
	if !img.Root.Inode.IsDir() {
		return nil, h.damaged(superOffset+14, "the root has mode %#o and is not a directory", img.Root.Inode.Mode)
	}
	for i, nid := range h.prefetch {
		path := t.wanted[uint64(nid)]
		if path == "" {
			return nil, h.damaged(h.ext.PrefetchTableOffset+4*uint64(i), "prefetch table entry %d: no file has inode number %d", i, nid)
		}
		img.Prefetch = append(img.Prefetch, path)
	}
	return img, nil
}

// ReadBlobs reads what a mount needs of a bootstrap of size bytes, in pieces: its memory depends on the number of blobs
// and on what is to be prefetched, not on the number of files. name is for errors.
func ReadBlobs(r io.ReaderAt, size int64, name string) (*Summary, error) {
	h, err := openHeader(r, size, name)
	if err != nil {
		return nil, err
	}
	s := &Summary{Blobs: h.blobs, ChunkSize: h.ext.ChunkSize, Codec: h.codec, Digest: h.digest, Inodes: h.sb.Inos}
	if !h.ownDigests() {
		if s.Chunks, err = h.readChunkTable(); err != nil {
			return nil, err
		}
	}
	t := newTreeReader(h)
	t.once = true
	for _, nid := range h.prefetch {
		n, err := t.readTree(uint64(nid))
		if err != nil {
			return nil, err
		}
		s.Prefetch = appendExtents(s.Prefetch, n)
	}
	return s, nil
}

// appendExtents adds the data of the files below n, in the order of their names, joining neighbours.
func appendExtents(out []Extent, n *tree.Node) []Extent {
	_ = n.Walk(func(_ string, n *tree.Node) error {
		chunk := uint64(n.Inode.ChunkSize)
		for i, c := range n.Inode.Chunks {
			if c.Blob == 0 {
				continue
			}
			length := rafs.AlignUp(min(chunk, n.Inode.Size-uint64(i)*chunk))
			if k := len(out) - 1; k >= 0 && out[k].Blob == c.Blob && out[k].Off+out[k].Len == c.Offset {
				out[k].Len += length
				continue
			}
			out = append(out, Extent{c.Blob, c.Offset, length})
		}
		return nil
	}) // the function has no errors
	return out
}

// A treeReader reads inodes. Its budgets bound what a crafted file can make it allocate.
type treeReader struct {
	*header
	inodes map[uint64]*tree.Inode // by nid
	wanted map[uint64]string      // nids whose path is wanted, and the path
	once   bool                   // an inode met again is left empty, rather than shared or refused
	path   []string               // of the directory that is being read
	length int                    // of path with its slashes

	unclaimed uint64 // bytes of the file that no inode has claimed; overlapping inodes run out of them
	names     uint64 // bytes that the paths in wanted may yet take
	cuts      uint64 // references that may yet be made by cutting raised chunks
}

func newTreeReader(h *header) *treeReader {
	return &treeReader{
		header: h, inodes: make(map[uint64]*tree.Inode), wanted: make(map[uint64]string),
		unclaimed: h.size, names: maxPrefetchPaths(h.size), cuts: 1<<16 + h.size/chunkIndexSize,
	}
}

// where adds the path to errors about what is at off.
func (t *treeReader) where(off uint64, name string, err error) error {
	path := "/" + strings.Join(t.path, "/")
	if name != "" {
		path = strings.TrimSuffix(path, "/") + "/" + name
	}
	return fmt.Errorf("bootstrap %s: %.256q: offset %d: %w", t.name, path, off, err)
}

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrDamaged, fmt.Errorf(format, args...))
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrUnsupported, fmt.Errorf(format, args...))
}

// readTree reads an inode and everything below it.
func (t *treeReader) readTree(nid uint64) (*tree.Node, error) {
	n := &tree.Node{}
	if err := t.readNode(n, nid, 0); err != nil {
		return nil, err
	}
	return n, nil
}

// readNode sets the inode of n, and its entries if it is a directory. ftype is what the directory says the inode is, 0
// if it does not.
func (t *treeReader) readNode(n *tree.Node, nid uint64, ftype uint8) error {
	if path, ok := t.wanted[nid]; ok && path == "" {
		path = strings.TrimSuffix("/"+strings.Join(t.path, "/"), "/") + "/" + n.Name
		if uint64(len(path)) > t.names {
			return t.where(0, n.Name, damaged("the paths of the prefetch table are over %d bytes long", maxPrefetchPaths(t.size)))
		}
		t.names -= uint64(len(path))
		t.wanted[nid] = path
	}
	off := uint64(t.sb.MetaBlkAddr)*blockSize + nid*slotSize
	if nid >= t.size/slotSize {
		return t.where(0, n.Name, damaged("inode number %d is outside the file (%d bytes)", nid, t.size))
	}
	ino, seen := t.inodes[nid]
	if seen && t.once {
		n.Inode = &tree.Inode{Mode: ino.Mode}
		return nil
	}
	if seen && ino.IsDir() {
		return t.where(off, n.Name, damaged("directory with inode number %d has a second name or contains itself", nid))
	}
	var raw rawInode
	if !seen {
		var err error
		if raw, err = t.readInode(off); err != nil {
			return t.where(off, n.Name, err)
		}
		ino = raw.ino
		t.inodes[nid] = ino
	}
	n.Inode = ino
	if ftype != 0 && ftype != fileType(ino.Mode) {
		return t.where(off, n.Name, damaged("mode %#o, but type %d in the directory", ino.Mode, ftype))
	}
	if !ino.IsDir() {
		return nil
	}
	if n.Name != "" {
		t.path = append(t.path, n.Name)
		t.length += 1 + len(n.Name)
		defer func() { t.path, t.length = t.path[:len(t.path)-1], t.length-1-len(n.Name) }()
	}
	return t.readDir(n, &raw)
}

// A rawInode is an inode with the place of its data.
type rawInode struct {
	inode
	ino    *tree.Inode
	off    uint64 // of the inode
	end    uint64 // of the inode and its xattrs
	layout uint16
}

// claim takes n bytes from what inodes may occupy.
func (t *treeReader) claim(n uint64) error {
	if n > t.unclaimed {
		return damaged("inodes overlap: together they claim more than the file's %d bytes", t.size)
	}
	t.unclaimed -= n
	return nil
}

// readInode reads everything of an inode but a directory's entries.
func (t *treeReader) readInode(off uint64) (rawInode, error) {
	raw := rawInode{off: off}
	b, err := t.at(off, slotSize, "inode")
	if err != nil {
		return raw, err
	}
	format := binary.LittleEndian.Uint16(b)
	if format&^formatAll != 0 {
		return raw, unsupported("inode format %#x", format)
	}
	size := uint64(slotSize)
	if format&formatExtended != 0 {
		size = inodeExtendedSize
		if b, err = t.at(off, size, "extended inode"); err != nil {
			return raw, err
		}
		raw.inode = getExtended(b)
	} else {
		raw.inode = getCompact(b)
		raw.mtime, raw.mtimeNsec = int64(t.sb.BuildTime), t.sb.BuildTimeNsec
	}
	raw.layout = format >> formatLayoutBit & formatLayoutMask
	switch {
	case raw.layout == layoutCompressedFull || raw.layout == layoutCompressedCompact:
		return raw, unsupported("compressed EROFS (inode data layout %d)", raw.layout)
	case raw.layout > layoutChunkBased:
		return raw, unsupported("inode data layout %d", raw.layout)
	case raw.size > math.MaxInt64:
		return raw, damaged("size %d", raw.size)
	case raw.mtimeNsec >= 1e9:
		return raw, damaged("mtime with %d nanoseconds", raw.mtimeNsec)
	}
	raw.end = off + size
	raw.ino = &tree.Inode{Mode: uint32(raw.mode), UID: raw.uid, GID: raw.gid, Mtime: raw.mtime, MtimeNsec: raw.mtimeNsec}
	if err := t.claim(size); err != nil {
		return raw, err
	}
	if err := t.readXattrs(&raw); err != nil {
		return raw, err
	}
	return raw, t.readContent(&raw)
}

func (t *treeReader) readXattrs(raw *rawInode) error {
	if raw.xattrCount == 0 {
		return nil
	}
	n := xattrHeaderSize + 4*(uint64(raw.xattrCount)-1)
	b, err := t.at(raw.end, n, "xattrs")
	if err != nil {
		return err
	}
	if err := t.claim(n); err != nil {
		return err
	}
	raw.end += n
	raw.ino.Xattrs, err = parseXattrs(b)
	return err
}

// readContent reads what belongs to the inode's type, but a directory's entries.
func (t *treeReader) readContent(raw *rawInode) error {
	ino := raw.ino
	switch ino.Mode & tree.ModeType {
	case tree.ModeFile:
		return t.readFile(raw)
	case tree.ModeLink:
		if raw.size == 0 || raw.size > MaxTarget {
			return damaged("link target of %d bytes, want 1 to %d", raw.size, MaxTarget)
		}
		b, err := t.block(raw, 0)
		if err != nil {
			return err
		}
		ino.Target = string(b)
		if err := checkTarget(ino.Target); err != nil {
			return damaged("%w", err)
		}
	case tree.ModeChar, tree.ModeBlock:
		ino.Major, ino.Minor = decodeDev(raw.union)
	case tree.ModeDir, tree.ModeFifo, tree.ModeSocket:
	default:
		return damaged("mode %#o has no known file type", ino.Mode)
	}
	return nil
}

// block returns and claims a flat inode's data from i*blockSize on: a block, or what the last one has.
func (t *treeReader) block(raw *rawInode, i uint64) ([]byte, error) {
	n := min(blockSize, raw.size-i*blockSize)
	off := (uint64(raw.union) + i) * blockSize
	switch {
	case raw.layout == layoutFlatInline && n == raw.size-i*blockSize:
		off = raw.end
		if off%blockSize+n > blockSize {
			return nil, damaged("inline data of %d bytes at %d crosses a block boundary", n, off)
		}
	case raw.layout != layoutFlatInline && raw.layout != layoutFlatPlain:
		return nil, unsupported("data layout %d for a directory or symbolic link", raw.layout)
	}
	if err := t.claim(n); err != nil {
		return nil, err
	}
	return t.at(off, n, "data")
}

// readDir reads the entries of the directory n.
func (t *treeReader) readDir(n *tree.Node, raw *rawInode) error {
	var last string
	for i := uint64(0); i*blockSize < raw.size; i++ {
		b, err := t.block(raw, i)
		if err != nil {
			return t.where(raw.off, "", err)
		}
		var inner error // from below, which says where
		err = parseDirBlock(b, func(d rawDirent) error {
			name := string(d.name)
			if name == "." || name == ".." {
				return nil
			}
			switch err := tree.CheckName(name); {
			case err != nil:
				return err
			case name <= last:
				return fmt.Errorf("name %q after %q: names are not in order", name, last)
			case t.length+1+len(name) > MaxPath:
				return fmt.Errorf("path of over %d bytes", MaxPath)
			}
			last = name
			c := &tree.Node{Name: name}
			if inner = t.readNode(c, d.nid, d.ftype); inner != nil {
				return inner
			}
			return n.Put(c)
		})
		if inner != nil {
			return inner
		}
		if err != nil {
			return t.where(raw.off, "", damaged("directory block %d: %w", i, err))
		}
	}
	return nil
}

// maxTreeChunk is the largest chunk size that tree.Inode can hold.
const maxTreeChunk = 1 << 31

// readFile reads the chunk indexes of a regular file.
func (t *treeReader) readFile(raw *rawInode) error {
	ino := raw.ino
	ino.Size = raw.size
	if raw.layout != layoutChunkBased {
		if raw.size == 0 {
			ino.ChunkSize = t.ext.ChunkSize
			return nil
		}
		return unsupported("a regular file with its data in the bootstrap (data layout %d)", raw.layout)
	}
	format := raw.union
	if format&^(chunkIndexes|chunkBlkBitsMask) != 0 || format&chunkIndexes == 0 {
		return unsupported("chunk format %#x, want chunk indexes", format)
	}
	chunk := uint64(1) << (blockBits + format&chunkBlkBitsMask)
	n := chunkCount(raw.size, chunk)
	if n > t.size/chunkIndexSize {
		return damaged("%d bytes in chunks of %d need %d chunk indexes, more than the file has room for", raw.size, chunk, n)
	}
	start := alignTo(raw.end, chunkIndexSize)
	b, err := t.at(start, n*chunkIndexSize, "chunk indexes")
	if err != nil {
		return err
	}
	if err := t.claim(n * chunkIndexSize); err != nil {
		return err
	}
	ino.ChunkSize = uint32(min(chunk, maxTreeChunk))
	parts := chunk / uint64(ino.ChunkSize)
	if total := chunkCount(raw.size, uint64(ino.ChunkSize)); parts > 1 {
		if total > t.cuts {
			return damaged("%d bytes in chunks of %d", raw.size, chunk)
		}
		t.cuts -= total
	}
	if n > 0 {
		ino.Chunks = make([]tree.ChunkRef, 0, chunkCount(raw.size, uint64(ino.ChunkSize)))
	}
	for i := range n {
		ref, err := t.chunkRef(b[i*chunkIndexSize:], min(chunk, raw.size-i*chunk))
		if err != nil {
			return fmt.Errorf("chunk %d, index at %d: %w", i, start+i*chunkIndexSize, err)
		}
		for k := uint64(0); k < parts && i*chunk+k*uint64(ino.ChunkSize) < raw.size; k++ {
			ino.Chunks = append(ino.Chunks, ref)
			if ref.Blob != 0 {
				ref.Offset += uint64(ino.ChunkSize)
			}
		}
	}
	return nil
}

// chunkRef reads a chunk index that stands for n bytes.
func (t *treeReader) chunkRef(b []byte, n uint64) (tree.ChunkRef, error) {
	le := binary.LittleEndian
	block := le.Uint32(b[4:])
	if block == nullBlock {
		return tree.Hole, nil
	}
	ref := tree.ChunkRef{Blob: int(b[2]), Index: uint32(le.Uint16(b)) | uint32(b[3])<<16, Offset: uint64(block) * blockSize}
	if ref.Blob == 0 {
		return ref, unsupported("file data in the bootstrap")
	}
	if ref.Blob > len(t.blobs) {
		return ref, damaged("device %d of %d", ref.Blob, len(t.blobs))
	}
	if err := checkRef(ref, n, &t.blobs[ref.Blob-1]); err != nil {
		return ref, damaged("%w", err)
	}
	return ref, nil
}
