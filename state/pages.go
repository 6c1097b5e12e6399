package state

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math"
)

// bbolt takes a file for sound whose meta page has a good checksum. In one that is not, a cycle of pages is walked for ever and a
// page that says it is billions of pages long is freed page by page, in memory. Neither can be recovered from as a panic can, so
// everything a file's meta page leads to is looked at before bbolt gets it. The format is that of go.etcd.io/bbolt/internal/common
// (meta.go, page.go, bucket.go, version 1.5.0); it has been the same since 2013.
const (
	boltMagic   = 0xED0CDAED
	boltVersion = 2

	pageHeader   = 16 // id, flags, count, overflow
	pageElement  = 16
	bucketHeader = 16 // root page, sequence
	metaLen      = 64

	flagBranch   = 1
	flagLeaf     = 2
	flagFreelist = 16

	noFreelist = math.MaxUint64
	maxDepth   = 64 // of pages and buckets below each other; a file of any size needs fewer
)

// A boltFile is a file being checked.
type boltFile struct {
	r     io.ReaderAt
	size  int64
	page  uint64 // bytes of a page
	pages uint64 // below the high-water mark
	used  []bool
}

// A boltMeta is the part of a meta page that leads to the rest.
type boltMeta struct{ page, root, freelist, pages, tx uint64 }

// checkPages looks at all pages of a file of that size. Errors of reading are returned as they are, others are damage. A file
// without a meta page bbolt refuses itself.
func checkPages(r io.ReaderAt, size int64) error {
	f := &boltFile{r: r, size: size}
	m, ok, err := f.meta()
	if err != nil || !ok {
		return err
	}
	f.page, f.pages = m.page, m.pages
	if m.pages < 4 || m.pages > uint64(size)/m.page {
		return damagef("%d pages of %d bytes in a file of %d", m.pages, m.page, size)
	}
	f.used = make([]bool, m.pages)
	if m.freelist != noFreelist {
		if err := f.freelist(m.freelist); err != nil {
			return err
		}
	}
	return f.tree(m.root, bounds{}, 0)
}

func damagef(format string, args ...any) error { return &damageError{fmt.Errorf(format, args...)} }

// meta finds the meta page that bbolt uses, the later one of two.
func (f *boltFile) meta() (m boltMeta, ok bool, err error) {
	m, ok, err = f.metaAt(0)
	if err != nil {
		return m, false, err
	}
	if ok {
		m2, ok2, err := f.metaAt(int64(m.page))
		if ok2 && m2.tx > m.tx {
			m = m2
		}
		return m, true, err
	}
	for size := int64(1024); size <= 1024<<14; size <<= 1 {
		if m, ok, err = f.metaAt(size); ok || err != nil {
			return m, ok, err
		}
	}
	return m, false, nil
}

func (f *boltFile) metaAt(at int64) (m boltMeta, ok bool, err error) {
	p := make([]byte, pageHeader+metaLen)
	if _, err := f.r.ReadAt(p, at); errors.Is(err, io.EOF) {
		return m, false, nil
	} else if err != nil {
		return m, false, err
	}
	p = p[pageHeader:]
	sum := fnv.New64a()
	sum.Write(p[:metaLen-8])
	if u32(p, 0) != boltMagic || u32(p, 4) != boltVersion || u64(p, metaLen-8) != sum.Sum64() {
		return m, false, nil
	}
	m = boltMeta{page: u32(p, 8), root: u64(p, 16), freelist: u64(p, 32), pages: u64(p, 40), tx: u64(p, 48)}
	if m.page < 1024 || m.page > 1024<<14 || m.page&(m.page-1) != 0 {
		return m, false, damagef("pages of %d bytes", m.page)
	}
	return m, true, nil
}

func u32(p []byte, at uint64) uint64 { return uint64(binary.NativeEndian.Uint32(p[at:])) }
func u64(p []byte, at uint64) uint64 { return binary.NativeEndian.Uint64(p[at:]) }

// read reads a page with its overflow pages, and takes note that they are used.
func (f *boltFile) read(id uint64) ([]byte, error) {
	if id < 2 || id >= f.pages {
		return nil, damagef("page %d of %d", id, f.pages)
	}
	head := make([]byte, pageHeader)
	if err := f.readAt(head, id); err != nil {
		return nil, err
	}
	n := u32(head, 12) + 1
	if u64(head, 0) != id {
		return nil, damagef("page %d says it is page %d", id, u64(head, 0))
	}
	for i := id; i < id+n; i++ {
		if err := f.use(i); err != nil {
			return nil, err
		}
	}
	p := make([]byte, n*f.page)
	return p, f.readAt(p, id)
}

func (f *boltFile) readAt(p []byte, id uint64) error {
	_, err := f.r.ReadAt(p, int64(id*f.page))
	if errors.Is(err, io.EOF) {
		return damagef("page %d is cut short", id)
	}
	return err
}

func (f *boltFile) use(id uint64) error {
	if id < 2 || id >= f.pages {
		return damagef("page %d of %d", id, f.pages)
	}
	if f.used[id] {
		return damagef("page %d is used twice", id)
	}
	f.used[id] = true
	return nil
}

func (f *boltFile) freelist(id uint64) error {
	p, err := f.read(id)
	if err != nil {
		return err
	}
	flags, n := flagsAndCount(p)
	ids := p[pageHeader:]
	if n == math.MaxUint16 {
		// More than a page header can count.
		n, ids = u64(ids, 0), ids[8:]
	}
	if flags != flagFreelist || n > uint64(len(ids)/8) {
		return damagef("page %d is no list of %d free pages", id, n)
	}
	for i := range n {
		if err := f.use(u64(ids, 8*i)); err != nil {
			return err
		}
	}
	return nil
}

func flagsAndCount(p []byte) (flags, count uint64) {
	return uint64(binary.NativeEndian.Uint16(p[8:])), uint64(binary.NativeEndian.Uint16(p[10:]))
}

// bounds are what a branch says of the page below it. bbolt looks a page up in its branch by its first key (node.spill), and where
// they differ makes it twice.
type bounds struct{ first, before []byte } // nil: no branch; no more in it

func (b bounds) hold(i uint64, key []byte) bool {
	return (i > 0 || b.first == nil || bytes.Equal(key, b.first)) && (b.before == nil || bytes.Compare(key, b.before) < 0)
}

// tree checks a page and all below it.
func (f *boltFile) tree(id uint64, in bounds, depth int) error {
	if depth > maxDepth {
		return damagef("page %d is more than %d deep", id, maxDepth)
	}
	p, err := f.read(id)
	if err != nil {
		return err
	}
	flags, n := flagsAndCount(p)
	if flags != flagBranch {
		return f.leaf(p, in, depth)
	}
	if n < 2 {
		return damagef("page %d is a branch with %d pages below it", id, n) // bbolt makes none, and panics when it removes from below one (node.rebalance)
	}
	all, err := elements(p, in)
	if err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	for i, e := range all {
		below := bounds{e.key, in.before}
		if i+1 < len(all) {
			below.before = all[i+1].key
		}
		if err := f.tree(e.child, below, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// leaf checks a leaf page and the buckets in it.
func (f *boltFile) leaf(p []byte, in bounds, depth int) error {
	if flags, _ := flagsAndCount(p); flags != flagLeaf {
		return damagef("page %d with flags %d", u64(p, 0), flags)
	}
	all, err := elements(p, in)
	if err != nil {
		return fmt.Errorf("page %d: %w", u64(p, 0), err)
	}
	for _, e := range all {
		switch {
		case !e.bucket:
		case len(e.value) < bucketHeader:
			return damagef("bucket %q of %d bytes", e.key, len(e.value))
		case u64(e.value, 0) != 0:
			err = f.tree(u64(e.value, 0), bounds{}, depth+1)
		case len(e.value) < bucketHeader+pageHeader:
			return damagef("bucket %q of %d bytes", e.key, len(e.value))
		default:
			// A small bucket's only page is its value.
			err = f.leaf(e.value[bucketHeader:], bounds{}, depth+1)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// An element is an entry of a branch or leaf page.
type element struct {
	key, value []byte
	bucket     bool
	child      uint64 // branch
}

// elements returns the entries of a page, whose keys ascend.
func elements(p []byte, in bounds) ([]element, error) {
	flags, n := flagsAndCount(p)
	size := uint64(len(p))
	if pageHeader+n*pageElement > size {
		return nil, damagef("%d entries in %d bytes", n, size)
	}
	if n == 0 && in.first != nil {
		return nil, damagef("no entries below a branch")
	}
	all := make([]element, n)
	for i := range n {
		at := pageHeader + i*pageElement
		var e element
		var start, keyLen, valueLen uint64
		if flags == flagBranch {
			start, keyLen, e.child = u32(p, at), u32(p, at+4), u64(p, at+8)
		} else {
			start, keyLen, valueLen = u32(p, at+4), u32(p, at+8), u32(p, at+12)
			if u32(p, at) > 1 {
				return nil, damagef("entry with flags %d", u32(p, at))
			}
			e.bucket = u32(p, at) == 1
		}
		start += at
		if start+keyLen+valueLen > size {
			return nil, damagef("entry of %d+%d bytes at %d of %d", keyLen, valueLen, start, size)
		}
		e.key, e.value = p[start:start+keyLen], p[start+keyLen:start+keyLen+valueLen]
		if !in.hold(i, e.key) || i > 0 && bytes.Compare(all[i-1].key, e.key) >= 0 {
			return nil, damagef("entry %d is out of order", i)
		}
		all[i] = e
	}
	return all, nil
}
