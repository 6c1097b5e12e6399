package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"holdfast/fscache"
	"holdfast/fscache/plain"
	"holdfast/rafs"
	"holdfast/rafs/image"
	"holdfast/state"
)

// A cacheSet is an image's cache files of one engine, open for reading.
type cacheSet struct {
	ref     string
	kind    plain.Kind
	boot    string
	files   []*cached
	missing int64
	checked int64 // by settle
}

// A cached blob is a cache file that may be complete.
type cached struct {
	key   fscache.Key
	table *rafs.Table
	print string
	known state.Object
	file  *plain.File // nil: there is none
	whole bool        // no chunk has a hole in it
	stamp string      // of what was found right and synced
}

// openCache opens an image's cache files, of the engine that has most of it.
func openCache(root, domain string, on onRecord, img *image.Image) (best *cacheSet, err error) {
	for _, kind := range plain.Kinds {
		c, err := openKind(kind, root, domain, on, img)
		if err == nil && (best == nil || c.missing < best.missing) {
			best, c = c, best
		}
		if c != nil {
			c.close()
		}
		if err != nil {
			if best != nil {
				best.close()
			}
			return nil, err
		}
	}
	return best, nil
}

// openKind opens those of one engine.
func openKind(kind plain.Kind, root, domain string, on onRecord, img *image.Image) (*cacheSet, error) {
	c := &cacheSet{ref: on.image.Ref, kind: kind, boot: on.boot}
	for _, b := range img.Blobs {
		if err := c.add(root, fscache.Key{Domain: domain, ID: b.Info.ID}, b.Table, on.objects); err != nil {
			c.close()
			return nil, err
		}
	}
	return c, nil
}

// add opens the cache file of one blob and finds what of it is there.
func (c *cacheSet) add(root string, k fscache.Key, t *rafs.Table, objects map[fscache.Key]state.Object) error {
	f := &cached{key: k, table: t, print: fingerprint(t), known: objects[k]}
	c.files = append(c.files, f)
	path, err := c.kind.CacheFile(CacheDir(root, c.kind.Engine), k)
	if err == nil {
		f.file, err = plain.Open(path)
	}
	if errors.Is(err, os.ErrNotExist) {
		c.missing += int64(t.Size())
		return nil
	}
	if err != nil {
		return fmt.Errorf("cache file of object %s: %w", k, err)
	}
	extents, err := f.file.Extents(int64(t.Size()))
	if err != nil {
		return err
	}
	there := int64(0)
	for _, s := range covered(t, extents) {
		for i := s.first; i < s.last; i++ {
			there += int64(t.At(i).End() - t.At(i).Offset)
		}
	}
	f.whole = there == int64(t.Size())
	c.missing += int64(t.Size()) - there
	return nil
}

func (c *cacheSet) close() {
	for _, f := range c.files {
		if f.file != nil {
			f.file.Close() // only read from
		}
	}
}

func (c *cacheSet) paths() (list []string) {
	for _, f := range c.files {
		list = append(list, f.file.Path())
	}
	return list
}

// size is that of all files, in bytes.
func (c *cacheSet) size() (n int64) {
	for _, f := range c.files {
		n += int64(f.table.Size())
	}
	return n
}

// vouched says whether the record vouches for every byte of a file (I5). What an engine that cannot read its cache back settled
// in this boot was not checked.
func (c *cacheSet) vouched(f *cached) (bool, error) {
	if !f.whole || f.known.Table != f.print {
		return false, nil
	}
	if f.known.Stamp == "" {
		return f.known.Boot == c.boot && c.kind.Verifies, nil
	}
	stamp, err := f.file.Stamp()
	return err == nil && f.known.Stamp == stamp, err
}

// written says whether every byte of every file was written, or checked, in this boot.
func (c *cacheSet) written() bool {
	for _, f := range c.files {
		if !f.whole || f.known.Table != f.print || f.known.Boot != c.boot {
			return false
		}
	}
	return c.kind.Verifies
}

// settle makes sure that every file is complete and right, now and after a power failure.
func (c *cacheSet) settle(ctx context.Context, progress func(done, total int64)) error {
	if c.missing > 0 {
		return &IncompleteError{Ref: c.ref, Missing: c.missing, Size: c.size()}
	}
	var check []*cached
	total := int64(0)
	for _, f := range c.files {
		ok, err := c.vouched(f)
		if err != nil {
			return err
		}
		if !ok {
			check = append(check, f)
			total += int64(f.table.Size())
		}
	}
	var mu sync.Mutex
	damaged := int64(0)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, f := range check {
		for _, s := range steps(f.table) {
			g.Go(func() error {
				n, bad, err := f.check(ctx, s)
				mu.Lock()
				defer mu.Unlock()
				c.checked += n
				damaged += bad
				if progress != nil {
					progress(c.checked, total)
				}
				return err
			})
		}
	}
	switch err := g.Wait(); {
	case err != nil:
		return err
	case damaged > 0:
		return &IncompleteError{Ref: c.ref, Damaged: damaged, Size: c.size()}
	}
	for _, f := range c.files {
		// ORDER: synced, then stamped: what is on record as right is what a power failure leaves.
		if err := f.file.Sync(); err != nil {
			return fmt.Errorf("sync %s: %w", f.file.Path(), err)
		}
		var err error
		if f.stamp, err = f.file.Stamp(); err != nil {
			return err
		}
	}
	return nil
}

// steps cuts a table into spans of some megabytes.
func steps(t *rafs.Table) (list []span) {
	for first := 0; first < t.Len(); {
		_, last := t.Range(t.At(first).Offset, prefetchStep)
		list = append(list, span{first, last})
		first = last
	}
	return list
}

// check reads the chunks of s and compares their digests. It returns how many bytes it read, and how many of them are of wrong chunks.
func (f *cached) check(ctx context.Context, s span) (n, bad int64, err error) {
	for i := s.first; i < s.last; i++ {
		if err := context.Cause(ctx); err != nil {
			return n, bad, err
		}
		c := f.table.At(i)
		size := int64(c.End() - c.Offset)
		ok, err := intact(f.table, i, func(p []byte, off int64) error {
			_, err := f.file.ReadAt(p, off)
			if errors.Is(err, io.EOF) {
				err = nil // what is not there stays zero, and is found wrong
			}
			return err
		})
		if err != nil {
			return n, bad, fmt.Errorf("check %s at %d: %w", f.file.Path(), c.Offset, err)
		}
		n += size
		if !ok {
			bad += size
		}
	}
	return n, bad, nil
}

// record puts it on record that the files are right.
func (c *cacheSet) record(db *state.DB) error {
	for _, f := range c.files {
		if f.known.Boot == c.boot && f.known.Table == f.print && f.known.Stamp == f.stamp {
			continue
		}
		o := state.Object{Domain: f.key.Domain, ID: f.key.ID, Boot: c.boot, Table: f.print, Stamp: f.stamp}
		if err := db.StampObject(o); err != nil {
			return err
		}
	}
	return nil
}

// intact reports whether row i of a table has the bytes the row says, padded with zeros; read fills a zeroed buffer.
func intact(t *rafs.Table, i int, read func(p []byte, off int64) error) (bool, error) {
	c := t.At(i)
	p := getBuffer(int(c.End() - c.Offset))
	defer p.free()
	clear(p.b)
	if err := read(p.b, int64(c.Offset)); err != nil {
		return false, err
	}
	data, pad := p.b[:c.Size], p.b[c.Size:]
	if c.Zero() {
		pad = p.b
	}
	for ; len(pad) > 0; pad = pad[min(len(pad), maxBatch):] {
		if n := min(len(pad), maxBatch); !bytes.Equal(pad[:n], zeros().b[:n]) {
			return false, nil
		}
	}
	return c.Zero() || t.Algo().Sum(data) == c.Digest, nil
}
