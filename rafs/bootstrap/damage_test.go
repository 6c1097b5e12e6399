package bootstrap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"testing"

	"holdfast/rafs/tree"
)

// A specimen is a written bootstrap whose bytes a test changes.
type specimen struct {
	t    testing.TB
	b    []byte
	plan *plan
}

func newSpecimen(t testing.TB, img *Image) *specimen {
	t.Helper()
	p, err := makePlan(img)
	if err != nil {
		t.Fatal(err)
	}
	return &specimen{t, write(t, img), p}
}

func (s *specimen) u8(off uint64, v uint8)   { s.b[off] = v }
func (s *specimen) u16(off uint64, v uint16) { binary.LittleEndian.PutUint16(s.b[off:], v) }
func (s *specimen) u32(off uint64, v uint32) { binary.LittleEndian.PutUint32(s.b[off:], v) }
func (s *specimen) u64(off uint64, v uint64) { binary.LittleEndian.PutUint64(s.b[off:], v) }

func (s *specimen) placed(path string) *placed {
	s.t.Helper()
	n, err := s.plan.img.Root.Lookup(path)
	if err != nil {
		s.t.Fatal(err)
	}
	return &s.plan.inodes[s.plan.index[n.Inode]]
}

// at is the offset of a file's inode, nid its number, data the offset of what follows inode and xattrs.
func (s *specimen) at(path string) uint64 { return s.placed(path).off }
func (s *specimen) nid(path string) uint64 {
	return rootNid + (s.at(path)-s.plan.metaOff)/slotSize
}
func (s *specimen) data(path string) uint64 {
	q := s.placed(path)
	return q.off + inodeExtendedSize + uint64(q.xattrs)
}

// entry is the offset of a name's dirent in a directory block of n bytes that starts at block.
func (s *specimen) entry(block, n uint64, name string) uint64 {
	s.t.Helper()
	found, i := uint64(0), uint64(0)
	_ = parseDirBlock(s.b[block:block+n], func(d rawDirent) error {
		if string(d.name) == name {
			found = block + i*direntSize
		}
		i++
		return nil
	})
	if found == 0 {
		s.t.Fatalf("no entry %q", name)
	}
	return found
}

// in is the offset of a name's dirent in an inline directory.
func (s *specimen) in(dir, name string) uint64 {
	s.t.Helper()
	return s.entry(s.data(dir), s.placed(dir).size, name)
}

const (
	sbAt  = superOffset
	extAt = extSuperOffset
)

// devAt, blobAt and indexAt are where smallImage's device table, blob table and the chunk indexes of /file start.
const devAt, blobAt = devtSlotOffset * deviceSlotSize, 4096

func (s *specimen) indexAt() uint64 { return s.placed("/file").off + s.placed("/file").indexes() }

var damages = []struct {
	name   string
	kind   error
	want   string
	change func(s *specimen)
}{
	{"no magic", ErrDamaged, "magic number 0x0", func(s *specimen) { s.u32(sbAt, 0) }},
	{"RAFS v5", ErrUnsupported, "RAFS v5", func(s *specimen) { s.u32(sbAt, 0); s.u32(0, rafsV5Magic) }},
	{"tarfs blocks", ErrUnsupported, "512 byte blocks (tarfs)", func(s *specimen) { s.u8(sbAt+12, 9) }},
	{"block size", ErrUnsupported, "block size of 2^16", func(s *specimen) { s.u8(sbAt+12, 16) }},
	{"extension slots", ErrUnsupported, "1 extension slots", func(s *specimen) { s.u8(sbAt+13, 1) }},
	{"root outside the file", ErrDamaged, "inode number 65535 is outside", func(s *specimen) { s.u16(sbAt+14, 65535) }},
	{"root is a file", ErrDamaged, "root has mode 0100644", func(s *specimen) { s.u16(sbAt+14, uint16(s.nid("/file"))) }},
	{"build time", ErrDamaged, "build time", func(s *specimen) { s.u32(sbAt+32, 1e9) }},
	{"metadata after the file", ErrDamaged, "inodes start in block", func(s *specimen) { s.u32(sbAt+40, 1<<31) }},
	{"shared xattr area", ErrUnsupported, "shared xattrs", func(s *specimen) { s.u32(sbAt+44, 1) }},
	{"not RAFS v6", ErrUnsupported, "EROFS that is not RAFS v6", func(s *specimen) { s.u32(sbAt+8, 0) }},
	{"no device table feature", ErrUnsupported, "EROFS that is not RAFS v6", func(s *specimen) { s.u32(sbAt+80, 4) }},
	{"compressed", ErrUnsupported, "compressed EROFS (ZERO_PADDING)", func(s *specimen) { s.u32(sbAt+80, 0xd) }},
	{"big pclusters", ErrUnsupported, "compressed EROFS (COMPR_CFGS or BIG_PCLUSTER), compressed EROFS (ZTAILPACKING)", func(s *specimen) { s.u32(sbAt+80, 0x1e) }},
	{"fragments", ErrUnsupported, "FRAGMENTS", func(s *specimen) { s.u32(sbAt+80, 0x2c) }},
	{"long prefixes", ErrUnsupported, "XATTR_PREFIXES", func(s *specimen) { s.u32(sbAt+80, 0x4c) }},
	{"unknown features", ErrUnsupported, "48BIT), metadata in an inode (METABOX), unknown incompatible features 0x80000000", func(s *specimen) { s.u32(sbAt+80, 0x8000018c) }},
	{"too many devices", ErrDamaged, "for 300 devices", func(s *specimen) { s.u16(sbAt+86, 300) }},
	{"fewer devices", ErrDamaged, "for 1 devices", func(s *specimen) { s.u16(sbAt+86, 1) }},
	{"device table elsewhere", ErrDamaged, "device table in slot 12", func(s *specimen) { s.u16(sbAt+88, 12) }},
	{"directory block size", ErrUnsupported, "directory blocks of another size", func(s *specimen) { s.u8(sbAt+90, 1) }},

	{"two compressions", ErrDamaged, "do not name one compression", func(s *specimen) { s.u32(extAt, flagCompressionLZ4|flagCompressionZstd|flagHashBlake3) }},
	{"no digest", ErrDamaged, "do not name one compression", func(s *specimen) { s.u32(extAt, flagCompressionZstd) }},
	{"tarfs flag", ErrUnsupported, "tarfs", func(s *specimen) { s.u32(extAt, flagCompressionZstd|flagHashBlake3|flagTarfs) }},
	{"encryption flag", ErrUnsupported, "encryption", func(s *specimen) { s.u32(extAt, flagCompressionZstd|flagHashBlake3|flagEncryptionAES128) }},
	{"blob table in the device table", ErrDamaged, "blob table at 0", func(s *specimen) { s.u64(extAt+8, 0) }},
	{"blob table not aligned", ErrDamaged, "blob table at 4100", func(s *specimen) { s.u64(extAt+8, 4100) }},
	{"blob table after the file", ErrDamaged, "ends after the file", func(s *specimen) { s.u64(extAt+8, uint64(len(s.b))) }},
	{"blob table wraps", ErrDamaged, "ends after the file", func(s *specimen) { s.u64(extAt+8, math.MaxUint64-4095) }},
	{"blob table size", ErrDamaged, "blob table of 500 bytes", func(s *specimen) { s.u32(extAt+16, 500) }},
	{"chunk size", ErrDamaged, "chunk size 4097", func(s *specimen) { s.u32(extAt+20, 4097) }},
	{"large chunk size", ErrDamaged, "chunk size 33554432", func(s *specimen) { s.u32(extAt+20, 32<<20) }},
	{"other chunk size", ErrDamaged, "its chunk size is 4096, the image's 8192", func(s *specimen) { s.u32(extAt+20, 8192) }},
	{"chunk table size", ErrDamaged, "chunk table of 81 bytes", func(s *specimen) { s.u64(extAt+24, 4096); s.u64(extAt+32, 81) }},
	{"huge chunk table", ErrDamaged, "ends after the file", func(s *specimen) { s.u64(extAt+24, 4096); s.u64(extAt+32, 80<<50) }},
	{"chunk table place", ErrDamaged, "chunk table at 80", func(s *specimen) { s.u64(extAt+24, 80); s.u64(extAt+32, 80) }},
	{"prefetch table size", ErrDamaged, "prefetch table of 7 bytes", func(s *specimen) { s.u32(extAt+48, 7) }},
	{"prefetch table place", ErrDamaged, "prefetch table at 8", func(s *specimen) { s.u64(extAt+40, 8) }},
	{"prefetch table after the file", ErrDamaged, "ends after the file", func(s *specimen) { s.u32(extAt+48, 1<<31) }},
	{"prefetch of no file", ErrDamaged, "prefetch table entry 1: no file has inode number 7", func(s *specimen) { s.u32(blobAt+2*blobEntrySize+4, 7) }},

	{"device tag", ErrDamaged, `device 2 is blob "y`, func(s *specimen) { s.u8(devAt+deviceSlotSize, 'y') }},
	{"blob id", ErrDamaged, "is not lower-case hex", func(s *specimen) { s.u8(blobAt, '/'); s.u8(devAt, '/') }},
	{"blob id with NUL", ErrDamaged, "with a NUL", func(s *specimen) { s.u8(blobAt+5, 0) }},
	{"blob without id", ErrDamaged, "blob id of 0 bytes", func(s *specimen) { clear(s.b[blobAt : blobAt+64]); clear(s.b[devAt : devAt+64]) }},
	{"blob index", ErrDamaged, "blob 1 has index 7", func(s *specimen) { s.u32(blobAt+blobEntrySize+64, 7) }},
	{"blob chunk count", ErrDamaged, "16777217 chunks", func(s *specimen) { s.u32(blobAt+72, 1<<24+1) }},
	{"blob compression", ErrUnsupported, "compression 4", func(s *specimen) { s.u32(blobAt+76, 4) }},
	{"blob digest", ErrUnsupported, "digest 2", func(s *specimen) { s.u32(blobAt+80, 2) }},
	{"blob features", ErrUnsupported, "unknown features 0x1000", func(s *specimen) { s.u32(blobAt+84, 0x1001) }},
	{"internal feature", ErrUnsupported, "unknown features 0x80000000", func(s *specimen) { s.u32(blobAt+84, 1<<31) }},
	{"tarfs blob", ErrUnsupported, "blob 0: tarfs", func(s *specimen) { s.u32(blobAt+84, 0x41) }},
	{"encrypted blob", ErrUnsupported, "blob 0: encryption", func(s *specimen) { s.u32(blobAt+84, 0x101) }},
	{"stored size", ErrDamaged, "bytes stored, at most", func(s *specimen) { s.u64(blobAt+88, 1<<40+1) }},
	{"size", ErrDamaged, "bytes of data, at most", func(s *specimen) { s.u64(blobAt+96, 1<<44+1) }},
	{"chunk information compression", ErrUnsupported, "of its chunk information: 9", func(s *specimen) { s.u32(blobAt+108, 9) }},
	{"chunk information place", ErrDamaged, "chunk information at", func(s *specimen) { s.u64(blobAt+112, math.MaxUint64) }},
	{"chunk information stored size", ErrDamaged, "chunk information at", func(s *specimen) { s.u64(blobAt+120, math.MaxUint64) }},
	{"chunk information size", ErrDamaged, "chunk information of", func(s *specimen) { s.u64(blobAt+128, math.MaxUint64) }},
	{"cipher", ErrUnsupported, "encryption", func(s *specimen) { s.u32(blobAt+216, 1) }},

	{"inode format", ErrUnsupported, `"/dir/hard": offset 8`, func(s *specimen) { s.u16(s.at("/file"), 0x19) }},
	{"compressed file", ErrUnsupported, "compressed EROFS (inode data layout 3)", func(s *specimen) { s.u16(s.at("/file"), formatExtended|layoutCompressedCompact<<1) }},
	{"compressed file, full index", ErrUnsupported, "compressed EROFS (inode data layout 1)", func(s *specimen) { s.u16(s.at("/file"), formatExtended|layoutCompressedFull<<1) }},
	{"unknown layout", ErrUnsupported, "inode data layout 5", func(s *specimen) { s.u16(s.at("/file"), formatExtended|5<<1) }},
	{"file with inline data", ErrUnsupported, "data in the bootstrap (data layout 2)", func(s *specimen) { s.u16(s.at("/file"), formatExtended|layoutFlatInline<<1) }},
	{"chunked directory", ErrUnsupported, "data layout 4 for a directory", func(s *specimen) { s.u16(s.at("/dir"), formatExtended|layoutChunkBased<<1) }},
	{"too many xattrs", ErrDamaged, "xattrs of", func(s *specimen) { s.u16(s.at("/file")+2, 65535) }},
	{"mode without type", ErrDamaged, "mode 0644 has no known file type", func(s *specimen) { s.u16(s.at("/file")+4, 0o644) }},
	{"other type", ErrDamaged, "mode 010600, but type 1", func(s *specimen) { s.u16(s.at("/empty")+4, 0o010600) }},
	{"negative size", ErrDamaged, "size 9223372036854775808", func(s *specimen) { s.u64(s.at("/file")+8, 1<<63) }},
	{"size of more chunks than fit", ErrDamaged, "more than the file has room for", func(s *specimen) { s.u64(s.at("/file")+8, 1<<62) }},
	{"size of more chunks than follow", ErrUnsupported, "chunk 3, index at", func(s *specimen) { s.u64(s.at("/file")+8, 4096*100) }},
	{"chunk format", ErrUnsupported, "chunk format 0x60", func(s *specimen) { s.u32(s.at("/file")+16, 0x60) }},
	{"block map", ErrUnsupported, "chunk format 0x0", func(s *specimen) { s.u32(s.at("/file")+16, 0) }},
	{"nanoseconds", ErrDamaged, "mtime with 1000000000", func(s *specimen) { s.u32(s.at("/file")+40, 1e9) }},
	{"chunk in the bootstrap", ErrUnsupported, "chunk 0, index at", func(s *specimen) { s.u8(s.indexAt()+2, 0) }},
	{"chunk in no blob", ErrDamaged, "device 3 of 2", func(s *specimen) { s.u8(s.indexAt()+2, 3) }},
	{"chunk after its blob", ErrDamaged, "4096 bytes at 1048576 of blob", func(s *specimen) { s.u32(s.indexAt()+4, 256) }},
	{"long target", ErrDamaged, "link target of 4096 bytes", func(s *specimen) { s.u64(s.at("/link")+8, 4096) }},
	{"no target", ErrDamaged, "link target of 0 bytes", func(s *specimen) { s.u64(s.at("/link")+8, 0) }},
	{"target over a block boundary", ErrDamaged, "crosses a block boundary", func(s *specimen) { s.u64(s.at("/link")+8, 4095) }},
	{"NUL in target", ErrDamaged, "NUL", func(s *specimen) { s.u8(s.data("/link")+1, 0) }},
	{"directory data after the file", ErrDamaged, "ends after the file", func(s *specimen) { s.u32(s.at("/many")+16, math.MaxUint32) }},
	{"huge directory", ErrDamaged, `"/many"`, func(s *specimen) { s.u64(s.at("/many")+8, 1<<60) }},

	{"shared xattrs", ErrUnsupported, "1 shared xattrs", func(s *specimen) { s.u8(s.at("/file")+64+4, 1) }},
	{"xattr name space", ErrDamaged, "name space 5", func(s *specimen) { s.u8(s.at("/file")+64+12+1, 5) }},
	{"long xattr prefix", ErrUnsupported, "long xattr name prefixes", func(s *specimen) { s.u8(s.at("/file")+64+12+1, 0x81) }},
	{"xattr value size", ErrDamaged, "takes 60006 bytes where", func(s *specimen) { s.u16(s.at("/file")+64+12+2, 60001) }},
	{"xattr name length", ErrDamaged, "takes", func(s *specimen) { s.u8(s.at("/file")+64+12, 255) }},
	{"NUL in xattr name", ErrDamaged, `with name "\x00"`, func(s *specimen) { s.u8(s.at("/file")+64+12+4, 0) }},
	{"xattr twice", ErrDamaged, "is there twice", func(s *specimen) {
		e := s.at("/file") + 64 + 12
		copy(s.b[e+12:e+17], s.b[e:e+5]) // both have names of one byte and values of five
	}},

	{"loop", ErrDamaged, `"/dir/sub/zz": `, func(s *specimen) { copy(s.b[s.name("/dir/sub", ".."):], "zz") }},
	{"directory contains itself", ErrDamaged, "has a second name or contains itself", func(s *specimen) { s.u64(s.in("/dir", "sub"), s.nid("/dir")) }},
	{"directory contains the root", ErrDamaged, "has a second name or contains itself", func(s *specimen) { s.u64(s.in("/dir", "sub"), rootNid) }},
	{"directory with two names", ErrDamaged, `"/link"`, func(s *specimen) {
		e := s.in("/", "link")
		s.u64(e, s.nid("/dir"))
		s.u8(e+10, 2)
	}},
	{"inode number outside the file", ErrDamaged, `"/dir/sub"`, func(s *specimen) { s.u64(s.in("/dir", "sub"), 1<<40) }},
	{"inode number wraps", ErrDamaged, "is outside the file", func(s *specimen) { s.u64(s.in("/dir", "sub"), math.MaxUint64) }},
	{"inode at the very end", ErrDamaged, `"/dir/sub"`, func(s *specimen) { s.u64(s.in("/dir", "sub"), uint64(len(s.b))/32-1) }},
	{"first name offset 0", ErrDamaged, "entry 0 has its name at 0", func(s *specimen) { s.u16(s.data("/dir")+8, 0) }},
	{"first name offset between entries", ErrDamaged, "entry 0 has its name at 13", func(s *specimen) { s.u16(s.data("/dir")+8, 13) }},
	{"first name offset after the block", ErrDamaged, "entry 0 has its name at 4092", func(s *specimen) { s.u16(s.data("/dir")+8, 4092) }},
	{"names out of order", ErrDamaged, "are not in order", func(s *specimen) { copy(s.b[s.name("/dir", "hard"):], "zard") }},
	{"same name twice", ErrDamaged, `name "entry-0001" after "entry-0001"`, func(s *specimen) {
		block := s.placed("/many").block * blockSize
		d := s.entry(block, blockSize, "entry-0002")
		s.u8(block+uint64(binary.LittleEndian.Uint16(s.b[d+8:]))+9, '1')
	}},
	{"overlapping names", ErrDamaged, "entry 1 has its name from", func(s *specimen) { s.u16(s.data("/dir")+12+8+12, 1) }},
	{"name after the block", ErrDamaged, "in a block of", func(s *specimen) { s.u16(s.data("/dir")+3*12+8, 4095) }},
	{"slash in name", ErrDamaged, "'/' or NUL in it", func(s *specimen) { s.u8(s.name("/dir", "hard")+1, '/') }},
	{"NUL in name", ErrDamaged, "'/' or NUL in it", func(s *specimen) { s.u8(s.name("/dir", "hard")+1, 0) }},
	{"empty name", ErrDamaged, "invalid entry name", func(s *specimen) { s.u8(s.name("/dir", "sub"), 0) }},
	{"type in the directory", ErrDamaged, "but type 5 in the directory", func(s *specimen) { s.u8(s.in("/dir", "hard")+10, 5) }},
	{"directory of less than an entry", ErrDamaged, "has no room for an entry", func(s *specimen) { s.u64(s.at("/dir")+8, 5) }},
}

// name is the offset of a name in an inline directory.
func (s *specimen) name(dir, name string) uint64 {
	s.t.Helper()
	return s.data(dir) + uint64(binary.LittleEndian.Uint16(s.b[s.in(dir, name)+8:]))
}

func TestDamageGivesAnErrorThatNamesIt(t *testing.T) {
	for _, c := range damages {
		t.Run(c.name, func(t *testing.T) {
			s := newSpecimen(t, smallImage(t))
			c.change(s)
			img, err := readImage(s.b)
			if err == nil || img != nil || !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want %v with %q", err, c.kind, c.want)
			}
			if !strings.Contains(err.Error(), "bootstrap test.boot: ") || !strings.Contains(err.Error(), "offset ") {
				t.Fatalf("%v does not name file and offset", err)
			}
			if _, err := ReadBlobs(bytes.NewReader(s.b), int64(len(s.b)), "test.boot"); err != nil && !errors.Is(err, c.kind) {
				t.Fatalf("ReadBlobs: got %v, want %v or nothing", err, c.kind)
			}
		})
	}
}

func TestEverySizeButTheRightOneIsRefused(t *testing.T) {
	b := write(t, smallImage(t))
	for n := range int64(len(b)) {
		if n%4096 != 0 && n%97 != 0 {
			continue
		}
		if _, err := Read(bytes.NewReader(b[:n]), n, "cut"); err == nil {
			t.Fatalf("cut to %d of %d bytes: no error", n, len(b))
		}
	}
	if _, err := Read(bytes.NewReader(b), int64(len(b))+4096, "short"); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("a file shorter than it claims: got %v", err)
	}
	for _, size := range []int64{-1, 0, MaxSize + 4096} {
		if _, err := Read(bytes.NewReader(b), size, "size"); !errors.Is(err, ErrDamaged) {
			t.Fatalf("size %d: got %v", size, err)
		}
	}
}

func TestOverlappingInodesCannotMultiply(t *testing.T) {
	img := smallImage(t)
	var paths []string
	for i := range 1000 {
		name := fmt.Sprintf("d%03d", i)
		mk(t, img.Root, name, &tree.Inode{Mode: tree.ModeDir | 0o755})
		paths = append(paths, "/"+name)
	}
	s := newSpecimen(t, img)
	for _, path := range paths { // each gets the first block of /many, which alone would be valid
		off := s.at(path)
		s.u16(off, formatExtended|layoutFlatPlain<<1)
		s.u64(off+8, blockSize)
		s.u32(off+16, uint32(s.placed("/many").block))
	}
	if _, err := readImage(s.b); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "inodes overlap") {
		t.Fatalf("got %v, want an error about overlapping inodes", err)
	}
}
