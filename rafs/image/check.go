package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"

	"holdfast/rafs"
	"holdfast/rafs/bootstrap"
	"holdfast/rafs/tree"
)

// ErrDamaged is wrapped by [Check]'s error about an image in which something is wrong.
var ErrDamaged = errors.New("the image is damaged")

// maxDamage is how many damaged things a check lists before it gives up.
const maxDamage = 100

// A Report is what a check found.
type Report struct {
	Ref    string `json:"ref"`
	Digest string `json:"digest"` // of the image, as in Image

	Directories  uint64 `json:"directories"`
	Files        uint64 `json:"files"` // regular ones; hard links of one are counted once
	Links        uint64 `json:"links"` // symbolic
	Others       uint64 `json:"others"`
	References   uint64 `json:"references"` // of files to chunks
	Blobs        int    `json:"blobs"`
	Chunks       uint64 `json:"chunks"`        // decoded and compared with their digest
	ChunkBytes   uint64 `json:"chunk_bytes"`   // of them, uncompressed
	StoredBytes  uint64 `json:"stored_bytes"`  // read from the blobs
	LayerDigests int    `json:"layer_digests"` // blobs whose whole file was compared with its layer's digest

	// Damage lists what is wrong, each with its place, at most 100 of them; Truncated says that the check ended there.
	Damage    []string `json:"damage,omitempty"`
	Truncated bool     `json:"truncated,omitempty"`
}

// Progress is how far a check is, in bytes of blobs.
type Progress struct{ Done, Total uint64 }

// Check verifies an image from end to end: all that [Open] checks, the whole tree, that every chunk of every file is a
// chunk of its blob, every chunk's digest, and each blob file's digest where the image is a manifest's. It goes on after
// damage up to a bound, and then returns the report and an error that wraps [ErrDamaged]. Any other error means that the check
// could not be made, or not to its end. progress, if not nil, is called from one goroutine at a time.
func Check(ctx context.Context, ref string, o Options, progress func(Progress)) (*Report, error) {
	img, err := Open(ctx, ref, o)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	c := newChecker(img, progress)
	if err := c.run(ctx); err != nil {
		return &c.report, fmt.Errorf("check image %s: %w", img.Ref, err)
	}
	return &c.report, nil
}

func newChecker(img *Image, progress func(Progress)) *checker {
	c := &checker{img: img, progress: progress, report: Report{Ref: img.Ref, Digest: img.Digest, Blobs: len(img.Blobs)}}
	for _, b := range img.Blobs {
		c.total += uint64(b.Source.Size())
	}
	return c
}

// run checks everything. The error wraps ErrDamaged, or says what kept it from the end.
func (c *checker) run(ctx context.Context) error {
	err := c.checkTree()
	for _, id := range c.img.unused {
		err = errors.Join(err, c.damage("manifest %s: layer %s is a blob that the bootstrap does not know", c.img.Digest, id))
	}
	for n := 0; err == nil && n < len(c.img.Blobs); n++ {
		err = c.checkBlob(ctx, n)
	}
	if err != nil && !errors.Is(err, errEnough) {
		return err
	}
	if d := c.report.Damage; len(d) > 0 {
		return fmt.Errorf("%w in %d places, the first: %s; fetch or convert it again", ErrDamaged, len(d), d[0])
	}
	return nil
}

// errEnough ends a check that has found enough.
var errEnough = errors.New("enough damage found")

type checker struct {
	img      *Image
	progress func(Progress)
	total    uint64
	keep     func(blob int, off uint64, data []byte) error // gets every chunk that is right, from several goroutines; may be nil

	mu     sync.Mutex // guards what follows
	report Report
	done   uint64
}

// damage notes what is wrong, and returns errEnough if the check is to end.
func (c *checker) damage(format string, args ...any) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.report.Damage) < maxDamage {
		c.report.Damage = append(c.report.Damage, fmt.Sprintf(format, args...))
		return nil
	}
	c.report.Truncated = true
	return errEnough
}

// advance counts n bytes of blobs as read.
func (c *checker) advance(n uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done += n
	c.report.StoredBytes += n
	if c.progress != nil {
		c.progress(Progress{c.done, c.total})
	}
}

// checkTree reads the whole bootstrap and looks every chunk reference up.
func (c *checker) checkTree() error {
	b := c.img.Bootstrap
	boot, err := bootstrap.Read(bytes.NewReader(b), int64(len(b)), c.img.Ref)
	if err != nil {
		return c.damage("%v", err)
	}
	rows := c.img.rowFinders()
	seen := make(map[*tree.Inode]bool)
	return boot.Root.Walk(func(path string, n *tree.Node) error {
		if seen[n.Inode] {
			return nil
		}
		seen[n.Inode] = true
		switch {
		case n.Inode.IsDir():
			c.report.Directories++
		case n.Inode.IsLink():
			c.report.Links++
		case !n.Inode.IsFile():
			c.report.Others++
		default:
			c.report.Files++
			return c.checkFile(path, n.Inode, boot.ChunkSize, rows)
		}
		return nil
	})
}

func (c *checker) checkFile(path string, ino *tree.Inode, chunkSize uint32, rows []*rowFinder) error {
	for i, ref := range ino.Chunks {
		if ref.Blob == 0 {
			continue
		}
		c.report.References++
		n := min(uint64(ino.ChunkSize), ino.Size-uint64(i)*uint64(ino.ChunkSize))
		f := rows[ref.Blob-1]
		first, _, err := f.find(ref.Offset, n)
		if err == nil && ino.ChunkSize == chunkSize && f.index(first) != uint64(ref.Index) {
			err = fmt.Errorf("it is chunk %d there, the file says %d", f.index(first), ref.Index)
		}
		if err != nil {
			if err := c.damage("bootstrap: %.256q: chunk %d, %d bytes at object offset %d of blob %s: %v", path, i, n, ref.Offset, c.img.Blobs[ref.Blob-1].Info.ID, err); err != nil {
				return err
			}
		}
	}
	return nil
}

// A rowFinder finds the rows of a table that references mean.
type rowFinder struct {
	table *rafs.Table
	zeros []uint32 // zeros[i] zero rows come before row i; nil: there are none
}

// rowFinders returns one for each blob.
func (i *Image) rowFinders() []*rowFinder {
	var out []*rowFinder
	for _, b := range i.Blobs {
		f := &rowFinder{table: b.Table}
		if uint64(b.Table.Len()) != uint64(b.Info.ChunkCount) {
			f.zeros = make([]uint32, b.Table.Len()+1)
			for r := range b.Table.Len() {
				f.zeros[r+1] = f.zeros[r]
				if b.Table.At(r).Zero() {
					f.zeros[r+1]++
				}
			}
		}
		out = append(out, f)
	}
	return out
}

// index is the place of table row r in the blob's own chunk array, which has no rows for gaps.
func (f *rowFinder) index(r int) uint64 {
	if f.zeros == nil {
		return uint64(r)
	}
	return uint64(r) - uint64(f.zeros[r])
}

// find returns the rows [first, last) whose bytes, one after the other, are the n bytes of a file that a reference to
// the object's offset off stands for.
func (f *rowFinder) find(off, n uint64) (first, last int, err error) {
	first, last = f.table.Range(off, n)
	if first == last || f.table.At(first).Offset != off {
		return 0, 0, errors.New("no chunk of the blob begins there")
	}
	var have uint64
	for r := first; r < last; r++ {
		row := f.table.At(r)
		switch {
		case row.Zero():
			return 0, 0, fmt.Errorf("the blob has no data at object offset %d", row.Offset)
		case r < last-1 && row.Size%rafs.BlockSize != 0:
			return 0, 0, fmt.Errorf("it runs over the end of the blob's chunk at object offset %d", row.Offset)
		}
		have += uint64(row.Size)
	}
	if have != n {
		return 0, 0, fmt.Errorf("the blob's chunks there have %d bytes", have)
	}
	return first, last, nil
}
