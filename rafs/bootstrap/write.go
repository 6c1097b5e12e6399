package bootstrap

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"holdfast/rafs"
	"holdfast/rafs/tree"
)

// segmentAlign is the alignment of the places that devices have behind the bootstrap in the one-device view of an
// image, in bytes (Nydus, V6_BLOCK_SEG_ALIGNMENT).
const segmentAlign = 0x80000

// Write returns the bootstrap of an image; its length is a multiple of 4096. img.Chunks is not written: the digests
// are expected in the blobs. Errors wrap [ErrInvalid] and name the file or the blob. Write sorts the tree's directories
// but changes nothing else; it may not run at the same time as anything else that uses the tree.
func Write(img *Image) ([]byte, error) {
	p, err := makePlan(img)
	if err != nil {
		return nil, fmt.Errorf("write bootstrap: %w", err)
	}
	out := make([]byte, p.size)
	p.putSuper(out, p.putDeviceSlots(out))
	for i := range img.Blobs {
		e := makeBlobEntry(i, &img.Blobs[i])
		put(out, p.blobTableOff()+uint64(i)*blobEntrySize, &e)
	}
	for i, nid := range p.prefetch {
		binary.LittleEndian.PutUint32(out[p.prefetchOff+4*uint64(i):], nid)
	}
	for i := range p.inodes {
		p.putInode(out, int32(i))
	}
	return out, nil
}

// put writes a fixed-size structure at off.
func put(out []byte, off uint64, v any) {
	if _, err := binary.Encode(out[off:], binary.LittleEndian, v); err != nil {
		panic(err) // the structures have a fixed size and the plan made room for them
	}
}

// putDeviceSlots writes the device table and returns the number of blocks of all devices together.
func (p *plan) putDeviceSlots(out []byte) (blocks uint32) {
	next := alignTo(p.size, segmentAlign)
	for i := range p.img.Blobs {
		n := rafs.AlignUp(p.img.Blobs[i].Size)
		slot := deviceSlot{Blocks: uint32(n / blockSize), MappedBlkAddr: uint32(next / blockSize)} // checkBlobs: both fit
		copy(slot.Tag[:], p.img.Blobs[i].ID)
		put(out, (devtSlotOffset+uint64(i))*deviceSlotSize, &slot)
		blocks += slot.Blocks
		next = alignTo(next+n, segmentAlign)
	}
	return blocks
}

func (p *plan) putSuper(out []byte, blocks uint32) {
	put(out, superOffset, &superBlock{
		Magic:         superMagic,
		FeatureCompat: compatRAFSv6,
		BlkSzBits:     blockBits,
		RootNid:       rootNid,
		Inos:          uint64(len(p.inodes)),
		// The devices' blocks alone: Nydus refuses an image without blobs that says anything but 0 here.
		Blocks:          blocks,
		MetaBlkAddr:     uint32(p.metaOff/blockSize - 1),
		FeatureIncompat: incompatRAFSv6,
		ExtraDevices:    uint16(len(p.img.Blobs)),
		DevtSlotOff:     devtSlotOffset,
	})
	ext := extSuperBlock{
		Flags:           flagsOf(p.img.Codec, p.img.Digest) | flagExplicitUIDGID | flagInlinedDigest,
		BlobTableOffset: p.blobTableOff(),
		BlobTableSize:   uint32(len(p.img.Blobs) * blobEntrySize),
		ChunkSize:       p.img.ChunkSize,
	}
	if p.hasXattr {
		ext.Flags |= flagHasXattr
	}
	if len(p.prefetch) > 0 {
		ext.PrefetchTableOffset = p.prefetchOff
		ext.PrefetchTableSize = uint32(4 * len(p.prefetch))
	}
	put(out, extSuperOffset, &ext)
}

var (
	codecFlags  = map[rafs.Codec]uint64{rafs.CodecNone: flagCompressionNone, rafs.CodecLZ4: flagCompressionLZ4, rafs.CodecGzip: flagCompressionGzip, rafs.CodecZstd: flagCompressionZstd}
	digestFlags = map[rafs.DigestAlgo]uint64{rafs.Blake3: flagHashBlake3, rafs.SHA256: flagHashSHA256}
)

func flagsOf(c rafs.Codec, d rafs.DigestAlgo) uint64 { return codecFlags[c] | digestFlags[d] }

func makeBlobEntry(i int, b *rafs.BlobInfo) blobEntry {
	e := blobEntry{
		Index: uint32(i), ChunkSize: b.ChunkSize, ChunkCount: b.ChunkCount, Codec: uint32(b.Codec), Digest: uint32(b.Digest),
		Features: b.Features, StoredSize: b.StoredSize, Size: b.Size, TOCSize: b.TOCSize, CICodec: uint32(b.CICodec),
		CIOffset: b.CIOffset, CIStored: b.CIStored, CISize: b.CISize, TOCDigest: b.TOCDigest, MetaDigest: b.MetaDigest, MetaSize: b.MetaSize,
	}
	copy(e.ID[:], b.ID)
	return e
}

// putInode writes inode i with all that belongs to it.
func (p *plan) putInode(out []byte, i int32) {
	q := &p.inodes[i]
	ino := q.ino
	disk := inode{
		format: q.layout << formatLayoutBit, xattrCount: xattrCount(q.xattrs), mode: uint16(ino.Mode), size: q.size,
		ino: uint32(i) + 1, uid: ino.UID, gid: ino.GID, mtime: ino.Mtime, mtimeNsec: ino.MtimeNsec, nlink: q.nlink,
	}
	b := out[q.off:]
	putXattrs(b[inodeExtendedSize:], ino.Xattrs)
	switch ino.Mode & tree.ModeType {
	case tree.ModeFile:
		disk.union = chunkIndexes | uint32(bits.TrailingZeros32(p.fileChunkSize(ino))-blockBits)
		putChunks(b[q.indexes():], ino.Chunks)
	case tree.ModeChar, tree.ModeBlock:
		disk.union = encodeDev(ino.Major, ino.Minor)
	case tree.ModeLink:
		copy(q.tail(out), ino.Target)
	case tree.ModeDir:
		p.putDir(out, i)
	}
	if q.blocks > 0 {
		disk.union = uint32(q.block)
	}
	disk.put(b)
}

// tail is the room for the last part of a flat inode's data, after its whole blocks.
func (q *placed) tail(out []byte) []byte {
	if n := q.inline(); n > 0 {
		start := q.off + inodeExtendedSize + uint64(q.xattrs)
		return out[start : start+n]
	}
	end := (q.block + q.blocks) * blockSize
	return out[end-blockSize : end]
}

func (p *plan) putDir(out []byte, i int32) {
	q := &p.inodes[i]
	inodeOf := func(e dirent) (uint64, uint32) {
		k := q.parent
		if e.child != nil {
			k = p.index[e.child.Inode]
		}
		return p.nid(k), p.inodes[k].ino.Mode
	}
	p.scratch = listing(p.scratch[:0], q.node)
	entries := p.scratch
	for block := q.block; len(entries) > 0; block++ {
		n, _ := dirBlock(entries)
		b := out[block*blockSize:]
		if n == len(entries) {
			b = q.tail(out)
		}
		putDirBlock(b, entries[:n], inodeOf)
		entries = entries[n:]
	}
}

func putChunks(b []byte, chunks []tree.ChunkRef) {
	le := binary.LittleEndian
	for i, c := range chunks {
		e := b[i*chunkIndexSize:]
		if c.Blob == 0 {
			le.PutUint32(e[4:], nullBlock)
			continue
		}
		le.PutUint16(e[0:], uint16(c.Index))
		e[2] = uint8(c.Blob)
		e[3] = uint8(c.Index >> 16)
		le.PutUint32(e[4:], uint32(c.Offset/blockSize))
	}
}
