package convert

import (
	"context"
	"fmt"

	"holdfast/rafs"
	"holdfast/rafs/blob"
	"holdfast/rafs/tree"
)

const (
	// maxRefs bounds the references to chunks of one layer's files, holes included, which are held in memory.
	maxRefs = 1 << 25
	// refsPiece is how many references are allocated at once: a size in a header is believed no further than that.
	refsPiece = 1 << 16
)

// A content gives out a file's bytes, in order: it fills p with those at offset off.
type content func(p []byte, off uint64) error

// A chunker cuts the files of one layer into chunks.
type chunker struct {
	w     *blob.Writer
	chunk uint64
	refs  uint64 // so far
	long  []longFile
}

// A longFile is a file whose references are still in pieces, to which the blob writer holds pointers.
type longFile struct {
	in     *tree.Inode
	pieces [][]tree.ChunkRef
}

// add gives the regular file in its size and content. Its references are set once finish has returned.
func (c *chunker) add(ctx context.Context, in *tree.Inode, size uint64, read content) error {
	if size > rafs.MaxObjectSize {
		return fmt.Errorf("its size, %d bytes, is over the limit of %d", size, uint64(rafs.MaxObjectSize))
	}
	in.Size, in.ChunkSize = size, uint32(c.chunk)
	left := (size + c.chunk - 1) / c.chunk
	if left > maxRefs-c.refs {
		return fmt.Errorf("the layer's files have over %d chunks of %d bytes: convert with larger chunks", maxRefs, c.chunk)
	}
	c.refs += left
	var pieces [][]tree.ChunkRef
	for off := uint64(0); left > 0; {
		piece := make([]tree.ChunkRef, min(left, refsPiece))
		left -= uint64(len(piece))
		pieces = append(pieces, piece)
		for i := range piece {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			p := c.w.Buffer(int(min(size-off, c.chunk)))
			if err := read(p, off); err != nil {
				return err
			}
			if err := c.w.Add(p, &piece[i]); err != nil {
				return err
			}
			off += uint64(len(p))
		}
	}
	if len(pieces) == 1 {
		in.Chunks = pieces[0]
	} else if len(pieces) > 1 {
		c.long = append(c.long, longFile{in, pieces})
	}
	return nil
}

// finish waits until all references are set.
func (c *chunker) finish() error {
	if err := c.w.Flush(); err != nil {
		return err
	}
	for _, f := range c.long {
		n := 0
		for _, p := range f.pieces {
			n += len(p)
		}
		f.in.Chunks = make([]tree.ChunkRef, 0, n)
		for _, p := range f.pieces {
			f.in.Chunks = append(f.in.Chunks, p...)
		}
	}
	c.long = nil
	return nil
}
