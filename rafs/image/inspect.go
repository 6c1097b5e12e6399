package image

import (
	"bytes"
	"context"
	"time"

	"holdfast/rafs/bootstrap"
	"holdfast/rafs/tree"
)

// A Description is what [Inspect] shows of an image. Sizes are in bytes.
type Description struct {
	Ref           string            `json:"ref"`
	Digest        string            `json:"digest"`
	BootstrapSize int               `json:"bootstrap_size"`
	ChunkSize     uint32            `json:"chunk_size"`
	Codec         string            `json:"codec"`
	DigestAlgo    string            `json:"digest_algorithm"`
	Blobs         []BlobDescription `json:"blobs"`
	Dedup         Dedup             `json:"dedup"`
	Prefetch      []string          `json:"prefetch,omitempty"` // paths, in priority order
	Tree          []Entry           `json:"tree"`               // parents before what is in them, by name
}

// A BlobDescription describes a blob.
type BlobDescription struct {
	ID         string `json:"id"`
	Source     string `json:"source"`
	FileSize   int64  `json:"file_size"`
	ObjectSize uint64 `json:"object_size"` // of the cache object: the chunks, uncompressed and padded to blocks
	Chunks     uint32 `json:"chunks"`
	Codec      string `json:"codec"`
	DigestAlgo string `json:"digest_algorithm"`
	Features   uint32 `json:"features"`
	Used       uint64 `json:"chunks_used"`   // by files of this image
	Shared     uint64 `json:"chunks_shared"` // used more than once
}

// Dedup says what sharing chunks and compression save.
type Dedup struct {
	FileBytes   uint64 `json:"file_bytes"`   // of all regular files, holes included, hard links once
	References  uint64 `json:"references"`   // of files to chunks
	Chunks      uint64 `json:"chunks"`       // different ones
	SharedBytes uint64 `json:"shared_bytes"` // that would be there once more for every further reference
	ChunkBytes  uint64 `json:"chunk_bytes"`  // of the different chunks, uncompressed
	StoredBytes uint64 `json:"stored_bytes"` // of them, as they are in the blobs
}

// An Entry is one name in the tree.
type Entry struct {
	Path   string            `json:"path"`
	Type   string            `json:"type"` // "dir", "file", "link", "char", "block", "fifo", "socket"
	Mode   uint32            `json:"mode"` // permission bits, set-id and sticky bits
	UID    uint32            `json:"uid"`
	GID    uint32            `json:"gid"`
	Nlink  uint32            `json:"nlink"` // names of the inode in this image; of a directory, with its own and its children's dots
	Size   uint64            `json:"size"`  // of regular files, and of a link's target
	Mtime  time.Time         `json:"mtime"`
	Target string            `json:"target,omitempty"`
	Major  uint32            `json:"major,omitempty"`
	Minor  uint32            `json:"minor,omitempty"`
	Xattrs map[string][]byte `json:"xattrs,omitempty"`
	Chunks []ChunkUse        `json:"chunks,omitempty"` // only when asked for
}

// A ChunkUse is one chunk of a file.
type ChunkUse struct {
	Blob       int    `json:"blob"`        // index in Description.Blobs
	Index      uint64 `json:"index"`       // in the blob's own chunk array
	Offset     uint64 `json:"offset"`      // in the object
	Size       uint32 `json:"size"`        // uncompressed
	BlobOffset uint64 `json:"blob_offset"` // in the blob file
	Stored     uint32 `json:"stored"`      // in the blob file
	Digest     string `json:"digest"`
}

// Inspect describes an image; with chunks also every chunk of every file. References to chunks that do not exist are left out:
// [Check] tells of them. Errors are those of [Open], and of reading the tree.
func Inspect(ctx context.Context, ref string, o Options, chunks bool) (*Description, error) {
	img, err := Open(ctx, ref, o)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	return img.Describe(chunks)
}

// Describe describes an open image, as [Inspect] does. Bootstrap must not have been set to nil.
func (i *Image) Describe(chunks bool) (*Description, error) {
	boot, err := bootstrap.Read(bytes.NewReader(i.Bootstrap), int64(len(i.Bootstrap)), i.Ref)
	if err != nil {
		return nil, err
	}
	d := &Description{
		Ref: i.Ref, Digest: i.Digest, BootstrapSize: len(i.Bootstrap), Prefetch: boot.Prefetch,
		ChunkSize: boot.ChunkSize, Codec: boot.Codec.String(), DigestAlgo: boot.Digest.String(),
	}
	in := &inspector{img: i, out: d, rows: i.rowFinders(), nlink: make(map[*tree.Inode]uint32), chunks: chunks}
	for _, b := range i.Blobs {
		in.used = append(in.used, make([]uint32, b.Table.Len()))
	}
	in.describeTree(boot.Root)
	in.describeBlobs()
	return d, nil
}

type inspector struct {
	img    *Image
	out    *Description
	rows   []*rowFinder
	used   [][]uint32 // how often each row of each blob is used
	nlink  map[*tree.Inode]uint32
	chunks bool
}

func (in *inspector) describeTree(root *tree.Node) {
	count := func(_ string, n *tree.Node) error {
		if !n.Inode.IsDir() {
			in.nlink[n.Inode]++
			return nil
		}
		in.nlink[n.Inode] = 2
		for _, c := range n.Children() {
			if c.Inode.IsDir() {
				in.nlink[n.Inode]++
			}
		}
		return nil
	}
	seen := make(map[*tree.Inode]bool)
	describe := func(path string, n *tree.Node) error {
		in.out.Tree = append(in.out.Tree, in.entry(path, n.Inode, !seen[n.Inode]))
		seen[n.Inode] = true
		return nil
	}
	_ = root.Walk(count) // neither function has errors
	_ = root.Walk(describe)
}

// entry describes one name; count says whether its chunks are to be counted.
func (in *inspector) entry(path string, ino *tree.Inode, count bool) Entry {
	e := Entry{
		Path: path, Type: typeName(ino.Mode), Mode: ino.Mode &^ tree.ModeType, UID: ino.UID, GID: ino.GID, Nlink: in.nlink[ino],
		Size: ino.Size, Mtime: time.Unix(ino.Mtime, int64(ino.MtimeNsec)).UTC(), Target: ino.Target, Major: ino.Major, Minor: ino.Minor,
	}
	if ino.IsLink() {
		e.Size = uint64(len(ino.Target))
	}
	for _, x := range ino.Xattrs {
		if e.Xattrs == nil {
			e.Xattrs = make(map[string][]byte, len(ino.Xattrs))
		}
		e.Xattrs[x.Name] = x.Value
	}
	if !ino.IsFile() {
		return e
	}
	if count {
		in.out.Dedup.FileBytes += ino.Size
	}
	for i, ref := range ino.Chunks {
		if ref.Blob == 0 {
			continue
		}
		n := min(uint64(ino.ChunkSize), ino.Size-uint64(i)*uint64(ino.ChunkSize))
		f := in.rows[ref.Blob-1]
		first, last, err := f.find(ref.Offset, n)
		if err != nil {
			continue // damage is Check's matter
		}
		for r := first; r < last; r++ {
			if count {
				in.used[ref.Blob-1][r]++
			}
			if in.chunks {
				c := f.table.At(r)
				e.Chunks = append(e.Chunks, ChunkUse{ref.Blob - 1, f.index(r), c.Offset, c.Size, c.BlobOffset, c.Stored, c.Digest.String()})
			}
		}
	}
	return e
}

func (in *inspector) describeBlobs() {
	dedup := &in.out.Dedup
	for n, b := range in.img.Blobs {
		d := BlobDescription{
			ID: b.Info.ID, Source: b.Source.String(), FileSize: b.Source.Size(), ObjectSize: b.Table.Size(), Chunks: b.Info.ChunkCount,
			Codec: b.Info.Codec.String(), DigestAlgo: b.Info.Digest.String(), Features: b.Info.Features,
		}
		for r, times := range in.used[n] {
			if times == 0 {
				continue
			}
			c := b.Table.At(r)
			d.Used++
			dedup.Chunks++
			dedup.References += uint64(times)
			dedup.ChunkBytes += uint64(c.Size)
			dedup.StoredBytes += uint64(c.Stored)
			dedup.SharedBytes += uint64(times-1) * uint64(c.Size)
			if times > 1 {
				d.Shared++
			}
		}
		in.out.Blobs = append(in.out.Blobs, d)
	}
}

func typeName(mode uint32) string {
	switch mode & tree.ModeType {
	case tree.ModeDir:
		return "dir"
	case tree.ModeLink:
		return "link"
	case tree.ModeChar:
		return "char"
	case tree.ModeBlock:
		return "block"
	case tree.ModeFifo:
		return "fifo"
	case tree.ModeSocket:
		return "socket"
	}
	return "file"
}
