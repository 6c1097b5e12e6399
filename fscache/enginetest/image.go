package enginetest

import (
	"encoding/binary"
	"fmt"

	"holdfast/fscache"
)

// Layout of an image: super block, device table, inodes, all in one block (fs/erofs/erofs_fs.h).
const (
	superOffset  = 1024
	deviceOffset = superOffset + 128
	deviceLen    = 128
	maxBlobs     = 4
	nidLen       = 32
	firstNid     = (deviceOffset + maxBlobs*deviceLen) / nidLen

	layoutInline = 2 << 1 // EROFS_INODE_FLAT_INLINE
	layoutChunks = 4 << 1 // EROFS_INODE_CHUNK_BASED

	incompatChunks  = 0x4  // EROFS_FEATURE_INCOMPAT_CHUNKED_FILE
	incompatDevices = 0x8  // EROFS_FEATURE_INCOMPAT_DEVICE_TABLE
	chunkIndexes    = 0x20 // EROFS_CHUNK_FORMAT_INDEXES
	chunkBits       = 19   // log2 of a chunk's blocks: 2 GiB, so that a file is one chunk
)

// Bootstrap returns an EROFS image whose root holds one file for each blob, named by its id.
func Bootstrap(blobs []fscache.Object) ([]byte, error) {
	if len(blobs) > maxBlobs {
		return nil, fmt.Errorf("%d blobs, the image has room for %d", len(blobs), maxBlobs)
	}
	le := binary.LittleEndian
	b := make([]byte, fscache.BlockSize)
	super := b[superOffset:]
	le.PutUint32(super, 0xe0f5e1e2)
	super[12] = 12 // log2 of the block size
	le.PutUint16(super[14:], firstNid)
	le.PutUint64(super[16:], uint64(len(blobs)+1)) // inodes
	le.PutUint32(super[36:], 1)                    // blocks of the image itself
	le.PutUint32(super[80:], incompatChunks|incompatDevices)
	le.PutUint16(super[86:], uint16(len(blobs)))
	le.PutUint16(super[88:], deviceOffset/deviceLen)

	names := []string{".", ".."}
	nids := []uint64{firstNid, firstNid}
	nid := uint64(firstNid + 16) // the root's inode and entries come first
	for i, o := range blobs {
		slot := b[deviceOffset+i*deviceLen:]
		if copy(slot[:64], o.Key.ID) != len(o.Key.ID) {
			return nil, fmt.Errorf("blob id %q does not fit a device's tag", o.Key.ID)
		}
		le.PutUint32(slot[64:], uint32(o.Size/fscache.BlockSize))

		inode := b[nid*nidLen:]
		le.PutUint16(inode, layoutChunks)
		le.PutUint16(inode[4:], 0o100444)
		le.PutUint16(inode[6:], 1)
		le.PutUint32(inode[8:], uint32(o.Size))
		le.PutUint16(inode[16:], chunkIndexes|chunkBits)
		le.PutUint16(inode[32+2:], uint16(i+1)) // device id of the one chunk, which starts at block 0
		names, nids, nid = append(names, o.Key.ID), append(nids, nid), nid+2
	}
	root := b[firstNid*nidLen : (firstNid+16)*nidLen]
	size, err := putDirectory(root[nidLen:], names, nids)
	if err != nil {
		return nil, err
	}
	le.PutUint16(root, layoutInline)
	le.PutUint16(root[4:], 0o040755)
	le.PutUint16(root[6:], 2)
	le.PutUint32(root[8:], uint32(size))
	return b, nil
}

// putDirectory writes entries and names; ids of blobs must come in the order of their bytes.
func putDirectory(b []byte, names []string, nids []uint64) (int, error) {
	const entryLen = 12
	end := len(names) * entryLen
	for i, name := range names {
		if i > 2 && names[i-1] >= name {
			return 0, fmt.Errorf("blobs %q and %q are not sorted", names[i-1], name)
		}
		if end+len(name) > len(b) {
			return 0, fmt.Errorf("the names of the blobs take more than %d bytes", len(b))
		}
		e := b[i*entryLen:]
		binary.LittleEndian.PutUint64(e, nids[i])
		binary.LittleEndian.PutUint16(e[8:], uint16(end))
		e[10] = 1 // EROFS_FT_REG_FILE
		if i < 2 {
			e[10] = 2 // EROFS_FT_DIR
		}
		end += copy(b[end:], name)
	}
	return end, nil
}
