package bootstrap

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"holdfast/rafs"
	"holdfast/rafs/tree"
)

// fixture returns a file of the Nydus fixtures, or skips where they are not there.
func fixture(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join("..", "..", "..", "shared", "fixtures", "nydus", name)
	if _, err := os.Stat(path); err != nil {
		t.Skipf("no fixtures: %v", err)
	}
	return path
}

// oracle is what an independent decoder said about the fixture.
type oracle struct {
	Inos, ExtraDev, ChunkTableEntries int
	ChunkSize                         uint32
	Blobs                             []struct {
		ID                                       string
		ChunkSize, ChunkCount, Features, TocSize uint32
		Comp, Digest, CiComp                     uint8
		CSize, USize, CiOff, CiCSize, CiUSize    uint64
		TocDigest, MetaDigest                    string
	}
	Files []struct {
		Path, Type, Sha256 string
		Mode, UID, GID     uint32
		Size               uint64
		Mtime              int64
	}
}

func TestNydusFixtureSaysWhatTheOracleSays(t *testing.T) {
	data, err := os.ReadFile(fixture(t, "rafs-v6/rafs-v6-2.2.boot"))
	if err != nil {
		t.Fatal(err)
	}
	said, err := os.ReadFile(fixture(t, "decoded/rafs-v6-2.2.json"))
	if err != nil {
		t.Fatal(err)
	}
	var want oracle
	if err := json.Unmarshal(said, &want); err != nil {
		t.Fatal(err)
	}
	img, err := readImage(data)
	if err != nil {
		t.Fatal(err)
	}
	w := want.Blobs[0]
	info := rafs.BlobInfo{
		ID: w.ID, ChunkSize: w.ChunkSize, ChunkCount: w.ChunkCount, Codec: rafs.Codec(w.Comp), Digest: rafs.DigestAlgo(w.Digest), Features: w.Features,
		StoredSize: w.CSize, Size: w.USize, CICodec: rafs.Codec(w.CiComp), CIOffset: w.CiOff, CIStored: w.CiCSize, CISize: w.CiUSize, TOCSize: w.TocSize,
	}
	for from, to := range map[string]*rafs.Digest{w.TocDigest: &info.TOCDigest, w.MetaDigest: &info.MetaDigest} {
		if _, err := hex.Decode(to[:], []byte(from)); err != nil {
			t.Fatal(err)
		}
	}
	if d := cmp.Diff([]rafs.BlobInfo{info}, img.Blobs); d != "" {
		t.Errorf("-oracle +read:\n%s", d)
	}
	// ChunkTableFirst of the oracle, in its order.
	table := []ChunkEntry{
		{Digest: digest(t, "812465bcc9e88393598311dc5fc93abaeccef0185bcd99f9701d17ebdf9adc3f"), Blob: 1, Flags: 1, Stored: 2974, Size: 13400, BlobOffset: 4828, Offset: 20480, Index: 1},
		{Digest: digest(t, "f7e2735f1c6ae9cde91e537416b09d8bb71b306a421d19cc1012a51f93a7fe69"), Blob: 1, Flags: 1, Stored: 4828, Size: 16931, Index: 0},
	}
	if d := cmp.Diff(table, img.Chunks); d != "" || len(img.Chunks) != want.ChunkTableEntries {
		t.Errorf("-oracle +read:\n%s", d)
	}
	if img.ChunkSize != want.ChunkSize || img.Codec != rafs.CodecZstd || img.Digest != rafs.Blake3 {
		t.Errorf("chunk size %d, %v, %v", img.ChunkSize, img.Codec, img.Digest)
	}
	compareOracle(t, img, want)
}

func digest(t testing.TB, s string) (d rafs.Digest) {
	t.Helper()
	if _, err := hex.Decode(d[:], []byte(s)); err != nil {
		t.Fatal(err)
	}
	return d
}

func compareOracle(t *testing.T, img *Image, want oracle) {
	t.Helper()
	object, err := os.ReadFile(fixture(t, "decoded/"+want.Blobs[0].ID+".decoded"))
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	_ = img.Root.Walk(func(string, *tree.Node) error { count++; return nil })
	if count != len(want.Files) {
		t.Errorf("%d files, want %d", count, len(want.Files))
	}
	for _, f := range want.Files {
		n, err := img.Root.Lookup("/" + strings.TrimPrefix(f.Path, "/"))
		if err != nil {
			t.Error(err)
			continue
		}
		if i := n.Inode; i.Mode != f.Mode || i.UID != f.UID || i.GID != f.GID || i.Mtime != f.Mtime {
			t.Errorf("%q: %+v, want %+v", f.Path, i, f)
		}
		if f.Type != "reg" {
			continue
		}
		if n.Inode.Size != f.Size {
			t.Errorf("%q: %d bytes, want %d", f.Path, n.Inode.Size, f.Size)
		}
		off := n.Inode.Chunks[0].Offset
		if sum := sha256.Sum256(object[off : off+f.Size]); hex.EncodeToString(sum[:]) != f.Sha256 {
			t.Errorf("%q: content at %d has another digest", f.Path, off)
		}
	}
}

func TestKernelAndReaderSeeTheSameFixture(t *testing.T) {
	boot := fixture(t, "rafs-v6/rafs-v6-2.2.boot")
	data, err := os.ReadFile(boot)
	if err != nil {
		t.Fatal(err)
	}
	img, err := readImage(data)
	if err != nil {
		t.Fatal(err)
	}
	object, err := os.ReadFile(fixture(t, "decoded/"+img.Blobs[0].ID+".decoded"))
	if err != nil {
		t.Fatal(err)
	}
	paths := files(t, t.TempDir(), data, nil)
	paths = append(paths, filepath.Join(filepath.Dir(paths[0]), "object"))
	if err := os.WriteFile(paths[1], object, 0o600); err != nil {
		t.Fatal(err)
	}
	dir, _ := mountErofs(t, paths)
	for _, n := range img.Root.Children() {
		got, err := os.ReadFile(filepath.Join(dir, n.Name))
		off := n.Inode.Chunks[0].Offset
		if err != nil || !bytes.Equal(got, object[off:off+n.Inode.Size]) {
			t.Errorf("%q: content differs (%v)", n.Name, err)
		}
	}
}

func TestCompactInodesHaveTheBuildTime(t *testing.T) {
	s := newSpecimen(t, smallImage(t))
	s.u64(superOffset+24, 1234567890)
	s.u32(superOffset+32, 42)
	off := s.at("/null")
	clear(s.b[off : off+64])
	s.u16(off+4, 0o020604)
	s.u16(off+6, 1)
	s.u32(off+16, encodeDev(4095, 0xabcde))
	s.u16(off+24, 1000)
	s.u16(off+26, 2000)
	img, err := readImage(s.b)
	if err != nil {
		t.Fatal(err)
	}
	want := &tree.Inode{Mode: 0o020604, UID: 1000, GID: 2000, Major: 4095, Minor: 0xabcde, Mtime: 1234567890, MtimeNsec: 42}
	if d := cmp.Diff(want, img.Root.Child("null").Inode); d != "" {
		t.Fatalf("-want +got:\n%s", d)
	}
}

func TestRaisedChunkSizes(t *testing.T) {
	img := &Image{Root: tree.NewRoot(), ChunkSize: 4096, Blobs: []rafs.BlobInfo{testBlob(1, 20<<30, 4096)}}
	ref := tree.ChunkRef{Blob: 1, Index: 99, Offset: 4096}
	mk(t, img.Root, "f", &tree.Inode{Mode: tree.ModeFile, Size: 4096, ChunkSize: 4096, Chunks: []tree.ChunkRef{ref}})
	for _, c := range []struct {
		name      string
		size      uint64
		bits      uint32
		wantChunk uint32
		want      []tree.ChunkRef
	}{
		{"64 KiB", 60000, 16, 65536, []tree.ChunkRef{ref}},
		{"2 GiB", 2<<30 - 5, 31, 1 << 31, []tree.ChunkRef{ref}},
		{"8 GiB is cut", 5 << 30, 33, 1 << 31, []tree.ChunkRef{ref, {Blob: 1, Index: 99, Offset: 4096 + 2<<30}, {Blob: 1, Index: 99, Offset: 4096 + 4<<30}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSpecimen(t, img)
			s.u64(s.at("/f")+8, c.size)
			s.u32(s.at("/f")+16, chunkIndexes|(c.bits-blockBits))
			got, err := readImage(s.b)
			if err != nil {
				t.Fatal(err)
			}
			ino := got.Root.Child("f").Inode
			if ino.Size != c.size || ino.ChunkSize != c.wantChunk || !cmp.Equal(ino.Chunks, c.want) {
				t.Fatalf("got %+v, want chunks %+v of %d", ino, c.want, c.wantChunk)
			}
			if again, err := readImage(write(t, got)); err != nil || diff(got, again) != "" {
				t.Fatalf("written and read again: %v\n%s", err, diff(got, again))
			}
		})
	}
}

func TestHolesCutIntoPartsHaveABudget(t *testing.T) {
	for _, c := range []struct {
		files int
		ok    bool
	}{{1, true}, {100, false}} {
		img := &Image{Root: tree.NewRoot(), ChunkSize: 4096}
		for i := range c.files {
			mk(t, img.Root, fmt.Sprint(i), &tree.Inode{Mode: tree.ModeFile, Size: 4096, ChunkSize: 4096, Chunks: []tree.ChunkRef{tree.Hole}})
		}
		s := newSpecimen(t, img)
		for i := range c.files { // one index that stands for 8 TiB, which is 4096 parts of 2 GiB
			s.u64(s.at(fmt.Sprint("/", i))+8, 1<<43)
			s.u32(s.at(fmt.Sprint("/", i))+16, chunkIndexes|31)
		}
		img, err := readImage(s.b)
		if c.ok && (err != nil || len(img.Root.Child("0").Inode.Chunks) != 4096) {
			t.Errorf("%d files: %v", c.files, err)
		}
		if !c.ok && (!errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "8796093022208 bytes in chunks of 8796093022208")) {
			t.Errorf("%d files: got %v, want an error about the parts", c.files, err)
		}
	}
}

func TestPlaceholderStandsForABlobsID(t *testing.T) {
	img := smallImage(t)
	img.Prefetch, img.Blobs[1].ID = nil, rafs.PlaceholderID
	got, err := readImage(write(t, img))
	if err != nil || diff(img, got) != "" {
		t.Fatalf("%v\n%s", err, diff(img, got))
	}
}

func TestPrefetchPathsHaveABudget(t *testing.T) {
	img := &Image{Root: tree.NewRoot(), ChunkSize: 4096}
	at, path := img.Root, ""
	for range 60 {
		name := strings.Repeat("d", 250)
		at, path = mk(t, at, name, &tree.Inode{Mode: tree.ModeDir}), path+"/"+name
	}
	for i := range 300 {
		mk(t, at, fmt.Sprint(i), &tree.Inode{Mode: tree.ModeFifo})
		img.Prefetch = append(img.Prefetch, fmt.Sprint(path, "/", i))
	}
	if _, err := Write(img); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "prefetch list") {
		t.Fatalf("Write: got %v, want an error about the prefetch list", err)
	}
	all := img.Prefetch
	img.Prefetch = make([]string, len(all)) // as many entries, of one path
	for i := range all {
		img.Prefetch[i] = all[0]
	}
	s := newSpecimen(t, img)
	if got, err := readImage(s.b); err != nil || diff(img, got) != "" {
		t.Fatalf("one path many times: %v", err)
	}
	for i, path := range all {
		s.u32(s.plan.prefetchOff+4*uint64(i), uint32(s.nid(path)))
	}
	if _, err := readImage(s.b); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "the paths of the prefetch table") {
		t.Fatalf("Read: got %v, want an error about the paths", err)
	}
}

func TestSummaryHasThePrefetchedDataInItsOrder(t *testing.T) {
	img := smallImage(t)
	img.Prefetch = []string{"/dir/sub", "/dir", "/file", "/"}
	img.Root.Child("file").Inode.Chunks[1] = tree.ChunkRef{Blob: 1, Offset: 12288}
	data := write(t, img)
	s, err := ReadBlobs(bytes.NewReader(data), int64(len(data)), "test.boot")
	if err != nil {
		t.Fatal(err)
	}
	want := &Summary{
		Blobs: img.Blobs, ChunkSize: 4096, Codec: rafs.CodecZstd, Inodes: 308,
		Prefetch: []Extent{{1, 8192, 8192}, {2, 0, 4096}}, // once, though three entries lead there
	}
	if d := cmp.Diff(want, s); d != "" {
		t.Fatalf("-want +got:\n%s", d)
	}
}

func TestChunkTableIsReadForBlobsWithoutDigests(t *testing.T) {
	data, err := os.ReadFile(fixture(t, "rafs-v6/rafs-v6-2.2.boot"))
	if err != nil {
		t.Fatal(err)
	}
	read := func() []ChunkEntry {
		t.Helper()
		s, err := ReadBlobs(bytes.NewReader(data), int64(len(data)), "test.boot")
		if err != nil {
			t.Fatal(err)
		}
		return s.Chunks
	}
	if got := read(); got != nil {
		t.Fatalf("%d entries, though the blob holds its digests", len(got))
	}
	features := binary.LittleEndian.Uint32(data[4096+84:])
	binary.LittleEndian.PutUint32(data[4096+84:], features&^featureInlinedDigest)
	if got := read(); len(got) != 2 {
		t.Fatalf("%d entries, want 2", len(got))
	}
	const table = 16384
	for _, c := range []struct {
		name string
		off  int
		v    uint32
	}{
		{"blob", 32, 1}, {"flags", 36, 0x20}, {"stored bytes", 40, 1 << 20}, {"size 0", 44, 0}, {"size", 44, 2 << 20},
		{"place in the blob", 52, 1 << 31}, {"place in the object", 60, 1 << 31}, {"index", 72, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			damaged := bytes.Clone(data)
			binary.LittleEndian.PutUint32(damaged[table+c.off:], c.v)
			if _, err := readImage(damaged); err == nil || !strings.Contains(err.Error(), "offset 16384: damaged bootstrap: chunk table entry 0: ") {
				t.Fatalf("got %v, want an error about chunk table entry 0", err)
			}
		})
	}
}

func TestNoBlobsNoPrefetchEmptyRoot(t *testing.T) {
	img := &Image{Root: tree.NewRoot(), ChunkSize: rafs.DefaultChunkSize}
	data := write(t, img)
	got, err := readImage(data)
	if err != nil {
		t.Fatal(err)
	}
	if d := diff(img, got); d != "" {
		t.Fatalf("-written +read:\n%s", d)
	}
	// Nydus refuses an image without devices whose superblock counts blocks (v6.rs, RafsV6SuperBlock::validate).
	if blocks := binary.LittleEndian.Uint32(data[superOffset+36:]); blocks != 0 {
		t.Fatalf("%d blocks", blocks)
	}
	dir, _ := mountErofs(t, files(t, t.TempDir(), data, nil))
	compareMounted(t, img, dir)
}

// FuzzRead: whatever the bytes, Read gives an error or a tree that can be written and read back, and its memory is in
// proportion to the bytes.
func FuzzRead(f *testing.F) {
	img := &Image{Root: tree.NewRoot(), ChunkSize: 4096, Blobs: []rafs.BlobInfo{testBlob(1, 1<<20, 4096)}}
	mk(f, img.Root, "f", &tree.Inode{Mode: tree.ModeFile, Size: 1, ChunkSize: 4096, Chunks: []tree.ChunkRef{{Blob: 1}}})
	f.Add(write(f, img))
	f.Fuzz(checkAnyBytes)
}

// FuzzDamage is FuzzRead for bytes near a good bootstrap: the input is changes to one, of four bytes each, two of
// which are an offset, one how many bytes to change there, and one their new value.
func FuzzDamage(f *testing.F) {
	good := write(f, smallImage(f))
	f.Add([]byte{4, 12, 1, 9})
	f.Add([]byte{0x21, 0, 2, 0xff, 0x22, 8, 1, 3})
	f.Fuzz(func(t *testing.T, changes []byte) {
		b := bytes.Clone(good)
		for ; len(changes) >= 4; changes = changes[4:] {
			off := int(changes[0])<<8 | int(changes[1])
			for k := off; k < min(len(b), off+int(changes[2]%9)); k++ {
				b[k] = changes[3]
			}
		}
		checkAnyBytes(t, b)
	})
}

func checkAnyBytes(t *testing.T, b []byte) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	img, err := readImage(b)
	runtime.ReadMemStats(&after)
	if used := after.TotalAlloc - before.TotalAlloc; used > 100*uint64(len(b))+8<<20 {
		t.Fatalf("%d bytes allocated for a file of %d", used, len(b))
	}
	if _, err := ReadBlobs(bytes.NewReader(b), int64(len(b)), "fuzz"); err != nil && img != nil {
		t.Fatalf("Read gave a tree, ReadBlobs: %v", err)
	}
	if (img == nil) == (err == nil) {
		t.Fatalf("image %v and error %v", img != nil, err)
	}
	if err != nil {
		return
	}
	data, err := Write(img)
	if err != nil {
		t.Fatalf("what was read cannot be written: %v", err)
	}
	again, err := readImage(data)
	if err != nil {
		t.Fatalf("what was written cannot be read: %v", err)
	}
	if d := diff(img, again); d != "" {
		t.Fatalf("-read +written and read again:\n%s", d)
	}
}
