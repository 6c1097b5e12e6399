package bootstrap

import (
	"fmt"
	"math"
	"math/bits"

	"holdfast/rafs"
	"holdfast/rafs/tree"
)

// maxInlineTail is the most that is stored after an inode rather than in a block of its own: moving an inode to the
// next block to make room wastes at most about this much, a block of its own wastes the rest of the block.
const maxInlineTail = blockSize / 2

// A placed inode has a place in the bootstrap.
type placed struct {
	node   *tree.Node // its first name
	ino    *tree.Inode
	parent int32 // directories: index in plan.inodes
	nlink  uint32
	layout uint16
	xattrs int    // bytes of xattrs with their header
	size   uint64 // i_size
	blocks uint64 // data blocks outside the inode area
	off    uint64 // of the inode in the file
	block  uint64 // number of its first data block
}

// inline is the part of the data that follows the inode.
func (p *placed) inline() uint64 {
	if p.layout != layoutFlatInline {
		return 0
	}
	return p.size - p.blocks*blockSize
}

// indexes is where a regular file's chunk indexes start, from the inode's start.
func (p *placed) indexes() uint64 { return alignTo(inodeExtendedSize+uint64(p.xattrs), chunkIndexSize) }

// A plan says where everything goes.
type plan struct {
	img      *Image
	inodes   []placed // in the order of their places; the root is first
	index    map[*tree.Inode]int32
	hasXattr bool
	scratch  []dirent
	prefetch []uint32 // nids

	prefetchOff uint64
	metaOff     uint64 // of the root inode
	size        uint64 // of the file
}

func (p *plan) blobTableOff() uint64 {
	return alignTo((devtSlotOffset+uint64(len(p.img.Blobs)))*deviceSlotSize, blockSize)
}

func (p *plan) nid(i int32) uint64 { return rootNid + (p.inodes[i].off-p.metaOff)/slotSize }

// makePlan checks the image and gives everything in it a place.
func makePlan(img *Image) (*plan, error) {
	p := &plan{img: img, index: make(map[*tree.Inode]int32)}
	if err := checkImage(img); err != nil {
		return nil, err
	}
	if img.Root == nil || !img.Root.Inode.IsDir() {
		return nil, fmt.Errorf("%w: the root is not a directory", ErrInvalid)
	}
	if err := p.add(img.Root, "/", 0); err != nil {
		return nil, err
	}
	p.prefetchOff = p.blobTableOff() + uint64(len(img.Blobs))*blobEntrySize
	p.metaOff = alignTo(p.prefetchOff+4*uint64(len(img.Prefetch)), blockSize)
	p.place()
	if p.size > MaxSize {
		return nil, fmt.Errorf("%w: the metadata of %d inodes takes %d bytes, at most %d are possible", ErrInvalid, len(p.inodes), p.size, uint64(MaxSize))
	}
	return p, p.resolvePrefetch()
}

// checkImage checks everything but the tree.
func checkImage(img *Image) error {
	if err := checkChunkSize(img.ChunkSize); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if img.Codec > rafs.CodecZstd || img.Digest > rafs.SHA256 {
		return fmt.Errorf("%w: %v with %v", ErrInvalid, img.Codec, img.Digest)
	}
	if len(img.Blobs) > rafs.MaxBlobs {
		return fmt.Errorf("%w: %d blobs, at most %d are possible: merge layers", ErrInvalid, len(img.Blobs), rafs.MaxBlobs)
	}
	if err := checkBlobs(img.Blobs, img.ChunkSize); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return nil
}

func checkChunkSize(n uint32) error {
	if n < rafs.MinChunkSize || n > rafs.MaxChunkSize || n&(n-1) != 0 {
		return fmt.Errorf("chunk size %d is not a power of two from %d to %d", n, rafs.MinChunkSize, rafs.MaxChunkSize)
	}
	return nil
}

// maxData is the most that all blobs of an image may have together, in bytes: with the bootstrap before them, every block
// must have a number of 32 bits in the one-device view, and not the one that marks a hole.
const maxData = rafs.MaxObjectSize - MaxSize - (rafs.MaxBlobs+1)*segmentAlign

func checkBlobs(blobs []rafs.BlobInfo, chunkSize uint32) error {
	var total uint64
	for i := range blobs {
		if err := checkBlob(&blobs[i], chunkSize); err != nil {
			return fmt.Errorf("blob %d: %w", i, err)
		}
		if total += rafs.AlignUp(blobs[i].Size); total > maxData {
			return fmt.Errorf("blob %d: the blobs have over %d bytes of data together", i, uint64(maxData))
		}
	}
	return nil
}

// checkBlob checks what a blob table entry says, against the limits of FORMATS.md 1.5.
func checkBlob(b *rafs.BlobInfo, chunkSize uint32) error {
	if err := checkBlobID(b.ID); err != nil {
		return err
	}
	switch {
	case b.ChunkSize != chunkSize:
		return fmt.Errorf("its chunk size is %d, the image's %d", b.ChunkSize, chunkSize)
	case b.ChunkCount > rafs.MaxChunks:
		return fmt.Errorf("%d chunks, at most %d are possible", b.ChunkCount, rafs.MaxChunks)
	case b.Codec > rafs.CodecZstd || b.CICodec > rafs.CodecZstd:
		return fmt.Errorf("unknown compression %v or %v", b.Codec, b.CICodec)
	case b.Digest > rafs.SHA256:
		return fmt.Errorf("unknown digest %v", b.Digest)
	case b.StoredSize > rafs.MaxStoredSize:
		return fmt.Errorf("%d bytes stored, at most %d are possible", b.StoredSize, uint64(rafs.MaxStoredSize))
	case b.Size > maxData:
		return fmt.Errorf("%d bytes of data, at most %d are possible", b.Size, uint64(maxData))
	case b.CIStored > math.MaxInt64-b.CIOffset || b.CIOffset > math.MaxInt64:
		return fmt.Errorf("chunk information at %d, %d bytes", b.CIOffset, b.CIStored)
	case b.CISize > math.MaxInt64:
		return fmt.Errorf("chunk information of %d bytes", b.CISize)
	}
	return nil
}

// checkBlobID accepts up to 64 bytes of lower-case hex: ids become parts of file names and URLs.
func checkBlobID(id string) error {
	if id == rafs.PlaceholderID {
		return nil
	}
	if id == "" || len(id) > 64 {
		return fmt.Errorf("blob id of %d bytes, want 1 to 64", len(id))
	}
	for i := range len(id) {
		if c := id[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return fmt.Errorf("blob id %q is not lower-case hex", id)
		}
	}
	return nil
}

// add puts n and everything below it into the plan, parents first, in name order.
func (p *plan) add(n *tree.Node, path string, parent int32) error {
	if i, ok := p.index[n.Inode]; ok {
		if n.Inode.IsDir() {
			return invalid(path, "a directory with a second name (the first is %.64q)", p.inodes[i].node.Name)
		}
		p.inodes[i].nlink++
		return nil
	}
	if len(path) > MaxPath {
		return invalid(path, "its path of %d bytes is over %d", len(path), MaxPath)
	}
	q := placed{node: n, ino: n.Inode, parent: parent, nlink: 1}
	if err := p.measure(&q); err != nil {
		return fmt.Errorf("%w: %.256q: %w", ErrInvalid, path, err)
	}
	i := int32(len(p.inodes))
	p.index[n.Inode] = i
	p.inodes = append(p.inodes, q)
	if !n.Inode.IsDir() {
		return nil
	}
	if path != "/" {
		path += "/"
	}
	nlink := uint32(2)
	for _, c := range n.Children() {
		if c.Inode.IsDir() {
			nlink++
		}
		if err := p.add(c, path+c.Name, i); err != nil {
			return err
		}
	}
	p.inodes[i].nlink = nlink
	return nil
}

func invalid(path, format string, args ...any) error {
	return fmt.Errorf("%w: %.256q: %w", ErrInvalid, path, fmt.Errorf(format, args...))
}

// measure checks an inode and sets its sizes and layout.
func (p *plan) measure(q *placed) (err error) {
	ino := q.ino
	if ino.MtimeNsec >= 1e9 {
		return fmt.Errorf("mtime with %d nanoseconds", ino.MtimeNsec)
	}
	if ino.Mode > math.MaxUint16 {
		return fmt.Errorf("mode %#o", ino.Mode)
	}
	if q.xattrs, err = xattrSize(ino.Xattrs); err != nil {
		return err
	}
	p.hasXattr = p.hasXattr || q.xattrs > 0
	switch ino.Mode & tree.ModeType {
	case tree.ModeFile:
		q.layout, q.size = layoutChunkBased, ino.Size
		return p.checkChunks(ino)
	case tree.ModeDir:
		p.scratch = listing(p.scratch[:0], q.node)
		q.flat(dirSize(p.scratch))
	case tree.ModeLink:
		if err := checkTarget(ino.Target); err != nil {
			return err
		}
		q.flat(uint64(len(ino.Target)))
	case tree.ModeChar, tree.ModeBlock:
		if ino.Major > maxMajor || ino.Minor > maxMinor {
			return fmt.Errorf("device number %d:%d, at most %d:%d is possible", ino.Major, ino.Minor, maxMajor, maxMinor)
		}
	case tree.ModeFifo, tree.ModeSocket:
	default:
		return fmt.Errorf("mode %#o has no known file type", ino.Mode)
	}
	return nil
}

// flat lays size bytes of data out in blocks, the tail after the inode where it is small enough and fits.
func (q *placed) flat(size uint64) {
	q.size = size
	tail := size % blockSize
	if tail != 0 && tail <= maxInlineTail && inodeExtendedSize+uint64(q.xattrs)+tail <= blockSize {
		q.layout, q.blocks = layoutFlatInline, size/blockSize
		return
	}
	q.layout, q.blocks = layoutFlatPlain, (size+blockSize-1)/blockSize
}

func checkTarget(target string) error {
	if target == "" || len(target) > MaxTarget {
		return fmt.Errorf("link target of %d bytes, want 1 to %d", len(target), MaxTarget)
	}
	for i := range len(target) {
		if target[i] == 0 {
			return fmt.Errorf("link target %.64q has a NUL in it", target)
		}
	}
	return nil
}

// fileChunkSize is the chunk size of a regular file; an empty file may leave it out.
func (p *plan) fileChunkSize(ino *tree.Inode) uint32 {
	if ino.ChunkSize == 0 && ino.Size == 0 {
		return p.img.ChunkSize
	}
	return ino.ChunkSize
}

// checkChunks checks that a file's chunk references cover it and lie in the image's blobs.
func (p *plan) checkChunks(ino *tree.Inode) error {
	chunk := uint64(p.fileChunkSize(ino))
	if chunk < blockSize || bits.OnesCount64(chunk) != 1 {
		return fmt.Errorf("chunk size %d is not a power of two of at least %d", chunk, blockSize)
	}
	if ino.Size > math.MaxInt64 {
		return fmt.Errorf("size %d is over %d", ino.Size, uint64(math.MaxInt64))
	}
	if n := chunkCount(ino.Size, chunk); uint64(len(ino.Chunks)) != n {
		return fmt.Errorf("%d chunks for %d bytes in chunks of %d, want %d", len(ino.Chunks), ino.Size, chunk, n)
	}
	for i, c := range ino.Chunks {
		if c.Blob == 0 {
			continue
		}
		if c.Blob < 0 || c.Blob > len(p.img.Blobs) {
			return fmt.Errorf("chunk %d is in blob %d of %d", i, c.Blob, len(p.img.Blobs))
		}
		if err := checkRef(c, min(chunk, ino.Size-uint64(i)*chunk), &p.img.Blobs[c.Blob-1]); err != nil {
			return fmt.Errorf("chunk %d: %w", i, err)
		}
	}
	return nil
}

func chunkCount(size, chunk uint64) uint64 { return size/chunk + min(1, size%chunk) }

// checkRef checks a reference to n bytes of a blob's object.
func checkRef(c tree.ChunkRef, n uint64, b *rafs.BlobInfo) error {
	if size := rafs.AlignUp(b.Size); c.Offset > size || n > size-c.Offset {
		return fmt.Errorf("%d bytes at %d of blob %.64s, which has %d", n, c.Offset, b.ID, b.Size)
	}
	if c.Offset%blockSize != 0 || c.Index >= rafs.MaxChunks {
		return fmt.Errorf("chunk %d of blob %.64s at %d: not at a multiple of %d, or not below chunk %d", c.Index, b.ID, c.Offset, blockSize, rafs.MaxChunks)
	}
	return nil
}

// place gives every inode and every data block its offset.
func (p *plan) place() {
	off := p.metaOff
	for i := range p.inodes {
		q := &p.inodes[i]
		whole, length := uint64(inodeExtendedSize), inodeExtendedSize+uint64(q.xattrs)
		switch q.layout {
		case layoutFlatInline:
			length += q.inline()
			whole = length
		case layoutChunkBased:
			length = q.indexes() + chunkIndexSize*uint64(len(q.ino.Chunks))
		}
		if off%blockSize+whole > blockSize {
			off = alignTo(off, blockSize)
		}
		q.off = off
		off = alignTo(off+length, slotSize)
	}
	// fsck.erofs 1.5 reads an xattr header behind every inode, also where there is none (fsck/main.c, erofs_verify_xattr):
	// the last one must not end with the file.
	block := alignTo(off+xattrHeaderSize, blockSize) / blockSize
	for i := range p.inodes {
		q := &p.inodes[i]
		q.block = block
		block += q.blocks
	}
	p.size = block * blockSize
}

// resolvePrefetch turns the image's prefetch paths into nids.
func (p *plan) resolvePrefetch() error {
	var length uint64
	seen := make(map[string]bool, len(p.img.Prefetch))
	for _, path := range p.img.Prefetch {
		if !seen[path] {
			seen[path] = true
			length += uint64(len(path))
		}
		if length > maxPrefetchPaths(p.size) {
			return fmt.Errorf("%w: prefetch list: %.256q: the paths up to here are over %d bytes long", ErrInvalid, path, maxPrefetchPaths(p.size))
		}
		n, err := p.img.Root.Lookup(path)
		if err != nil {
			return fmt.Errorf("%w: prefetch list: %w", ErrInvalid, err)
		}
		p.prefetch = append(p.prefetch, uint32(p.nid(p.index[n.Inode])))
	}
	return nil
}
