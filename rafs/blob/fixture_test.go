package blob

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"holdfast/rafs"
)

const fixtureID = "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef"

// fixtureInfo reads the one blob table entry of the fixture's bootstrap (FORMATS.md 1.5).
func fixtureInfo(t *testing.T) rafs.BlobInfo {
	b := fixture(t, "rafs-v6/rafs-v6-2.2.boot")
	e := b[binary.LittleEndian.Uint64(b[1152+8:]):]
	u32 := func(off int) uint32 { return binary.LittleEndian.Uint32(e[off:]) }
	u64 := func(off int) uint64 { return binary.LittleEndian.Uint64(e[off:]) }
	return rafs.BlobInfo{
		ID: string(e[:64]), ChunkSize: u32(68), ChunkCount: u32(72), Codec: rafs.Codec(u32(76)), Digest: rafs.DigestAlgo(u32(80)),
		Features: u32(84), StoredSize: u64(88), Size: u64(96), TOCSize: u32(104), CICodec: rafs.Codec(u32(108)),
		CIOffset: u64(112), CIStored: u64(120), CISize: u64(128), TOCDigest: rafs.Digest(e[136:168]),
		MetaDigest: rafs.Digest(e[168:200]), MetaSize: u64(200),
	}
}

func TestFixtureDecodesToItsCacheObject(t *testing.T) {
	blob, want := fixture(t, "rafs-v6/"+fixtureID), fixture(t, "decoded/"+fixtureID+".decoded")
	info := fixtureInfo(t)
	read, err := ReadMeta(context.Background(), open(t, "rafs-v6/"+fixtureID), info)
	if err != nil {
		t.Fatal(err)
	}
	found, err := FindMeta(context.Background(), open(t, "rafs-v6/"+fixtureID), rafs.BlobInfo{ID: fixtureID, Codec: rafs.CodecZstd, Digest: rafs.Blake3})
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range map[string]*Meta{"ReadMeta": read, "FindMeta": found} {
		table, err := m.Table(nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		got, err := object(table, blob)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: the decoded object differs", name)
		}
		if data, err := info.DataSize(); err != nil || data != 7802 {
			t.Errorf("chunk data of %d bytes, %v", data, err)
		}
	}
}

// The entries of the fixture's own bootstrap, which its builder ordered by digest.
func TestFixtureTableTakesDigestsOfBootstrap(t *testing.T) {
	boot, info := fixture(t, "rafs-v6/rafs-v6-2.2.boot"), fixtureInfo(t)
	digests := make([]rafs.Digest, info.ChunkCount)
	for e := boot[16384:][:160]; len(e) > 0; e = e[80:] {
		digests[binary.LittleEndian.Uint32(e[72:])] = rafs.Digest(e[:32])
	}
	m, err := ReadMeta(context.Background(), open(t, "rafs-v6/"+fixtureID), info)
	if err != nil {
		t.Fatal(err)
	}
	inlined, err := m.Table(nil)
	if err != nil {
		t.Fatal(err)
	}
	given, err := m.Table(digests)
	if err != nil {
		t.Fatal(err)
	}
	for i := range given.Len() {
		if given.At(i) != inlined.At(i) {
			t.Errorf("row %d: %+v with the bootstrap's digests, %+v with the blob's", i, given.At(i), inlined.At(i))
		}
	}
	for name, d := range map[string][]rafs.Digest{"one missing": digests[:1], "one unset": {digests[0], {}}} {
		if _, err := m.Table(d); !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), fixtureID) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Its builder wrote the size of image.blob as its offset, has no digests, and sets next to no features.
func TestFixtureOfOldBuilderIsFoundByTOC(t *testing.T) {
	const id = "2fa78cad554b75ac91a4a125ed148d0ddeb25efa4aaa8bd80e5dc292690a4dca"
	blob := fixture(t, "toc/"+id)
	m, err := FindMeta(context.Background(), open(t, "toc/"+id), rafs.BlobInfo{ID: id, Codec: rafs.CodecZstd})
	if err != nil {
		t.Fatal(err)
	}
	info := m.Info()
	if info.ChunkCount != 3 || info.Size != 12288 || info.CIOffset != 3341 || m.HasDigests() {
		t.Errorf("found %+v", info)
	}
	if _, err := m.Table(nil); !errors.Is(err, ErrFormat) {
		t.Errorf("a table without digests: %v", err)
	}
	d, err := NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	digests := make([]rafs.Digest, len(m.rows))
	for i, c := range m.rows {
		p := make([]byte, c.Size)
		if err := d.expand(c.Codec, blob[c.BlobOffset:][:c.Stored], p); err != nil {
			t.Fatalf("chunk %d: %v", i, err)
		}
		digests[i] = info.Digest.Sum(p)
	}
	table, err := m.Table(digests)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := object(table, blob); err != nil {
		t.Error(err)
	}
}

func TestZranBlobIsRefusedByName(t *testing.T) {
	b := fixture(t, "zran/233c72f2b6b698c07021c4da367cfe2dff4f049efbaa885ca0ff760ea297865a.blob.meta")
	h, err := parseHeader(b[len(b)-cctSize:])
	if err != nil || h.entries != 163 || h.zranCount != 21 || !h.v2() {
		t.Errorf("header %+v, %v", h, err)
	}
	if _, err = ParseBlobMeta(b, rafs.BlobInfo{ID: "233c"}); !errors.Is(err, rafs.ErrUnsupported) || !strings.Contains(err.Error(), "ZRAN") || !strings.Contains(err.Error(), "233c") {
		t.Errorf("error %v", err)
	}
	// Its entries are refused as well, should the header lie.
	if _, err := parseCI(b[:163*ciSizeV2], 163, true, rafs.CodecGzip); !errors.Is(err, rafs.ErrUnsupported) || !strings.Contains(err.Error(), "ZRAN") {
		t.Errorf("error %v", err)
	}
}

func TestTarHeaderIsThatOfOtherBuilders(t *testing.T) {
	blob := fixture(t, "rafs-v6/"+fixtureID)
	for _, h := range []struct {
		off  int
		name string
		size uint64
	}{{7802, tocBlob, 7802}, {12442, tocMeta, 32 + 4096}, {13018, tocDigest, 64}, {14042, tocSelf, 512}} {
		want := blob[h.off:][:rafs.TarHeaderSize]
		if got := appendTarHeader(nil, h.name, h.size); !bytes.Equal(got, want) {
			t.Errorf("%s:\n%s\nwant\n%s", h.name, hex.Dump(got), hex.Dump(want))
		}
		if size, err := parseTarHeader(want, h.name); err != nil || size != h.size {
			t.Errorf("%s: %d, %v", h.name, size, err)
		}
	}
}

// Header and TOC that other builders wrote come out the same when written again.
func TestTOCAndHeaderAreThoseOfOtherBuilders(t *testing.T) {
	blob := fixture(t, "rafs-v6/"+fixtureID)
	h, err := parseHeader(blob[8346:][:cctSize])
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(h.append(nil), blob[8346:][:cctSize]) {
		t.Errorf("header %+v is written differently", h)
	}
	entries := blob[len(blob)-1024:]
	toc, err := parseTOC(entries, uint64(len(blob)))
	if err != nil {
		t.Fatal(err)
	}
	toc.find(tocBlob).offset = 7802
	for i := range toc {
		// That builder left the last 4 bytes, padding in its struct, as it found them in memory.
		if got := toc[i].append(nil)[:tocEntrySize-4]; !bytes.Equal(got, entries[i*tocEntrySize:][:tocEntrySize-4]) {
			t.Errorf("TOC entry %q is written differently:\n%s", toc[i].name, hex.Dump(got))
		}
	}
	ci := blob[8314:8346]
	rows, err := parseCI(ci, 2, false, rafs.CodecZstd)
	if err != nil {
		t.Fatal(err)
	}
	if got := appendCIv1(appendCIv1(nil, rows[0]), rows[1]); !bytes.Equal(got, ci) {
		t.Errorf("chunk information %x, want %x", got, ci)
	}
}
