package blob

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"holdfast/rafs"
	"holdfast/rafs/source"
)

// victim is a blob with every part, and where the parts lie.
func victim(t *testing.T) ([]byte, rafs.BlobInfo, toc) {
	blob, _, res := write(t, content(rand.New(rand.NewPCG(7, 7)), 12, 4000), []byte("bootstrap"), small)
	toc, err := parseTOC(blob[len(blob)-int(res.Info.TOCSize):], uint64(len(blob)))
	if err != nil {
		t.Fatal(err)
	}
	return blob, res.Info, toc
}

func TestDamagedMetadataIsRefusedAndPlaceNamed(t *testing.T) {
	blob, info, entries := victim(t)
	whole, err := ReadMeta(context.Background(), &memory{b: blob}, info)
	if err != nil {
		t.Fatal(err)
	}
	tocOff := uint64(len(blob)) - uint64(info.TOCSize)
	for _, part := range []struct {
		name     string
		off, n   uint64
		mustName string
	}{
		{"chunk information", info.CIOffset, info.CIStored, fmt.Sprint("offset ", info.CIOffset)},
		{"header", info.CIOffset + info.CIStored, cctSize, fmt.Sprint("offset ", info.CIOffset+info.CIStored)},
		{"digests", entries.find(tocDigest).offset, entries.find(tocDigest).size, fmt.Sprint("offset ", entries.find(tocDigest).offset)},
		{"TOC", tocOff, uint64(info.TOCSize), fmt.Sprint("offset ", tocOff)},
	} {
		for off := part.off; off < part.off+part.n; off++ {
			bad := bytes.Clone(blob)
			bad[off] ^= 1 << (off % 8)
			m, err := ReadMeta(context.Background(), &memory{b: bad}, info)
			if err == nil && part.name == "chunk information" && slices.Equal(m.rows, whole.rows) {
				continue // another compressed form of the same array
			}
			if !errors.Is(err, ErrFormat) && !errors.Is(err, rafs.ErrUnsupported) {
				t.Fatalf("%s: damage at offset %d: %v", part.name, off, err)
			}
			if !strings.Contains(err.Error(), part.mustName) || !strings.Contains(err.Error(), "memory blob") || !source.IsPermanent(err) {
				t.Fatalf("%s: damage at offset %d: the error does not say %q and the blob, or is not permanent: %v", part.name, off, part.mustName, err)
			}
		}
	}
}

func TestDamagedChunkIsRefusedAndPlaceNamed(t *testing.T) {
	for _, codec := range []rafs.Codec{rafs.CodecNone, rafs.CodecLZ4, rafs.CodecZstd} {
		o := small
		o.Codec = codec
		blob, _, res := write(t, content(rand.New(rand.NewPCG(8, 8)), 12, 4000), nil, o)
		m, err := ReadMeta(context.Background(), &memory{b: blob}, res.Info)
		if err != nil {
			t.Fatal(err)
		}
		table, err := m.Table(nil)
		if err != nil {
			t.Fatal(err)
		}
		c := table.At(table.Len() - 1)
		place := fmt.Sprintf("object offset %d, %d bytes at blob offset %d", c.Offset, c.Stored, c.BlobOffset)
		d, err := NewDecoder()
		if err != nil {
			t.Fatal(err)
		}
		good := blob[c.BlobOffset:][:c.Stored]
		want, dst := make([]byte, c.Size), make([]byte, c.Size)
		if err := d.Decode(c, table.Algo(), good, want); err != nil {
			t.Fatal(err)
		}
		for i := range good {
			bad := bytes.Clone(good)
			bad[i] ^= 1 << (i % 8)
			err := d.Decode(c, table.Algo(), bad, dst)
			if err == nil && bytes.Equal(dst, want) {
				continue // a bit that means nothing
			}
			if !errors.Is(err, ErrDigest) && !errors.Is(err, ErrDecode) || !strings.Contains(err.Error(), place) {
				t.Fatalf("%s: damage at byte %d: %v, want %q in it", codec, i, err, place)
			}
		}
	}
}

func TestDigestErrorNamesBothDigests(t *testing.T) {
	d, err := NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	c := rafs.Chunk{Offset: 4096, Size: 3, Stored: 3, Digest: rafs.Digest{1, 2}}
	err = d.Decode(c, rafs.SHA256, []byte("abc"), make([]byte, 3))
	if !errors.Is(err, ErrDigest) || !strings.Contains(err.Error(), c.Digest.String()) || !strings.Contains(err.Error(), rafs.SHA256.Sum([]byte("abc")).String()) {
		t.Errorf("error %v", err)
	}
}

func TestNumbersThatCannotBeTrueAreRefused(t *testing.T) {
	blob, info, _ := victim(t)
	for name, change := range map[string]func(*rafs.BlobInfo){
		"more chunks than bytes":      func(i *rafs.BlobInfo) { i.ChunkCount = rafs.MaxChunks },
		"more chunks than possible":   func(i *rafs.BlobInfo) { i.ChunkCount = 1<<32 - 1 },
		"no chunks":                   func(i *rafs.BlobInfo) { i.ChunkCount = 0 },
		"fewer chunks":                func(i *rafs.BlobInfo) { i.ChunkCount-- },
		"array after the end":         func(i *rafs.BlobInfo) { i.CIOffset = 1 << 62 },
		"array offset overflows":      func(i *rafs.BlobInfo) { i.CIOffset = 1<<64 - 1 },
		"array before the tar header": func(i *rafs.BlobInfo) { i.CIOffset = 100 },
		"array elsewhere":             func(i *rafs.BlobInfo) { i.CIOffset-- },
		"array larger than the blob":  func(i *rafs.BlobInfo) { i.CIStored = 1 << 40 },
		"array length overflows":      func(i *rafs.BlobInfo) { i.CIStored = 1<<64 - 1 },
		"array expands enormously":    func(i *rafs.BlobInfo) { i.CISize = 1 << 60 },
		"array codec":                 func(i *rafs.BlobInfo) { i.CICodec = rafs.CodecGzip },
		"array codec unknown":         func(i *rafs.BlobInfo) { i.CICodec = 77 },
		"codec unknown":               func(i *rafs.BlobInfo) { i.Codec = 77 },
		"digest unknown":              func(i *rafs.BlobInfo) { i.Digest = 77 },
		"object too large":            func(i *rafs.BlobInfo) { i.Size = rafs.MaxObjectSize + 1 },
		"TOC larger than the blob":    func(i *rafs.BlobInfo) { i.TOCSize = 1<<32 - 1 },
		"TOC cut":                     func(i *rafs.BlobInfo) { i.TOCSize = 100; i.TOCDigest = rafs.Digest{} },
		"TOC not whole entries":       func(i *rafs.BlobInfo) { i.TOCSize--; i.TOCDigest = rafs.Digest{} },
		"TOC digest":                  func(i *rafs.BlobInfo) { i.TOCDigest[0]++ },
		"data larger than the blob": func(i *rafs.BlobInfo) {
			i.Features &^= rafs.FeatureCapTarTOC
			i.StoredSize = rafs.MaxStoredSize
		},
		"v2 where there is v1": func(i *rafs.BlobInfo) { i.CISize = uint64(i.ChunkCount) * ciSizeV2 },
	} {
		bad := info
		change(&bad)
		for _, toc := range []bool{true, false} {
			if !toc && bad.TOCSize == info.TOCSize {
				bad.TOCSize = 0
			} else if !toc {
				continue
			}
			_, err := ReadMeta(context.Background(), &memory{b: blob}, bad)
			if name == "TOC digest" && !toc {
				continue
			}
			if !errors.Is(err, ErrFormat) || !source.IsPermanent(err) {
				t.Errorf("%s, TOC %v: %v", name, toc, err)
			}
		}
	}
}

// Compressed well, the chunk information of millions of chunks takes a few hundred bytes, and as rows a gigabyte.
func TestMoreChunksThanBytesAreRefused(t *testing.T) {
	const n = 100000
	ci := bytes.Repeat(appendCIv1(nil, rafs.Chunk{Size: 1, Stored: 1}), n)
	stored := encode(t, rafs.CodecZstd, ci)
	info := rafs.BlobInfo{
		ChunkCount: n, Codec: rafs.CodecZstd, Features: rafs.FeatureCapTarTOC, Size: n * rafs.BlockSize,
		CICodec: rafs.CodecZstd, CIOffset: 1000, CIStored: uint64(len(stored)), CISize: uint64(len(ci)),
	}
	h := cctHeader{codec: info.CICodec, entries: n, offset: info.CIOffset, stored: info.CIStored, size: info.CISize}
	blob := h.append(append(make([]byte, info.CIOffset), stored...))
	if _, err := ReadMeta(context.Background(), &memory{b: blob}, info); !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), "100000 chunks in 1000 bytes") {
		t.Errorf("error %v", err)
	}
}

func TestTOCThatContradictsIsRefused(t *testing.T) {
	good := tocEntry{name: tocMeta, offset: 10, stored: 20, size: 20}
	for name, change := range map[string]func(b []byte) []byte{
		"entry outside the blob": func(b []byte) []byte { binary.LittleEndian.PutUint64(b[56:], 981); return b },
		"entry overflows":        func(b []byte) []byte { binary.LittleEndian.PutUint64(b[56:], 1<<64-1); return b },
		"raw of another length":  func(b []byte) []byte { b[72]++; return b },
		"unknown compression":    func(b []byte) []byte { b[0] = 8; return b },
		"no entry":               func(b []byte) []byte { return nil },
		"half an entry":          func(b []byte) []byte { return b[:64] },
		"the same entry twice":   func(b []byte) []byte { return append(b, b...) },
	} {
		b := change(good.append(nil))
		if _, err := parseTOC(appendTarHeader(b, tocSelf, uint64(len(b))), 1000); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
	b := good.append(nil)
	if _, err := parseTOC(appendTarHeader(b, tocSelf, uint64(len(b))+1), 1000); !errors.Is(err, ErrFormat) {
		t.Errorf("other size in the tar header: %v", err)
	}
	b = appendTarHeader(b, tocSelf, uint64(len(b)))
	if _, err := parseTOC(b, 1000); err != nil {
		t.Error(err)
	}
	for _, off := range []int{tocEntrySize, tocEntrySize + tarSizeOff, tocEntrySize + tarMagicOff, tocEntrySize + tarSumOff, tocEntrySize + 300} {
		bad := bytes.Clone(b)
		bad[off] ^= 1
		if _, err := parseTOC(bad, 1000); !errors.Is(err, ErrFormat) {
			t.Errorf("damage at byte %d: %v", off, err)
		}
	}
}

func TestTOCThatContradictsBlobIsRefused(t *testing.T) {
	blob, info, entries := victim(t)
	for name, change := range map[string]func(toc) toc{
		"chunk data elsewhere":   func(t toc) toc { t.find(tocBlob).stored--; return t },
		"no chunk data":          func(t toc) toc { return t[1:] },
		"no header":              func(t toc) toc { t.find(tocHeader).name = "x"; return t },
		"array elsewhere":        func(t toc) toc { t.find(tocMeta).offset--; return t },
		"fewer digests":          func(t toc) toc { e := t.find(tocDigest); e.size, e.stored = e.size-32, e.stored-32; return t },
		"compressed digests":     func(t toc) toc { t.find(tocDigest).codec = rafs.CodecZstd; return t },
		"digests outside":        func(t toc) toc { t.find(tocDigest).offset = uint64(len(blob)) - 100; return t },
		"chunk information gone": func(t toc) toc { t.find(tocMeta).stored = 0; t.find(tocMeta).size = 0; return t },
	} {
		bad := blob[: len(blob)-int(info.TOCSize) : len(blob)-int(info.TOCSize)]
		start := len(bad)
		for _, e := range change(slices.Clone(entries)) {
			bad = e.append(bad)
		}
		bad = appendTarHeader(bad, tocSelf, uint64(len(bad)-start))
		if _, err := FindMeta(context.Background(), &memory{b: bad}, info); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSizeBeyondElevenOctalDigitsFitsTarHeader(t *testing.T) {
	for _, size := range []uint64{0, 1<<33 - 1, 1 << 33, rafs.MaxStoredSize} {
		if got, err := parseTarHeader(appendTarHeader(nil, tocBlob, size), tocBlob); err != nil || got != size {
			t.Errorf("%d reads back as %d, %v", size, got, err)
		}
	}
}

func TestUnsupportedFeaturesAreRefusedByName(t *testing.T) {
	blob, info, _ := victim(t)
	for bit, name := range map[uint32]string{
		rafs.FeatureZran: "ZRAN", rafs.FeatureSeparate: "SEPARATE", rafs.FeatureTarfs: "TARFS", rafs.FeatureBatch: "BATCH",
		rafs.FeatureEncrypted: "ENCRYPTED", rafs.FeatureExternal: "EXTERNAL", 1 << 13: "0x2000", 1 << 31: "0x80000000",
	} {
		bad := info
		bad.Features |= bit
		if _, err := ReadMeta(context.Background(), &memory{b: blob}, bad); !errors.Is(err, rafs.ErrUnsupported) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s in the blob table: %v", name, err)
		}
		other := bytes.Clone(blob)
		binary.LittleEndian.PutUint32(other[info.CIOffset+info.CIStored+4:], info.Features|bit)
		if _, err := FindMeta(context.Background(), &memory{b: other}, info); !errors.Is(err, rafs.ErrUnsupported) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s in the header: %v", name, err)
		}
	}
	for flag, name := range map[uint64]string{ciZran: "ZRAN", ciBatch: "BATCH", ciEncrypted: "ENCRYPTED", 1 << 7: "0x80"} {
		b := binary.LittleEndian.AppendUint64(nil, flag<<56)
		b = append(b, make([]byte, 16)...)
		if _, err := parseCI(b, 1, true, rafs.CodecZstd); !errors.Is(err, rafs.ErrUnsupported) || !strings.Contains(err.Error(), name) {
			t.Errorf("chunk flag %s: %v", name, err)
		}
	}
}

func TestShortBlobIsRefused(t *testing.T) {
	blob, info, _ := victim(t)
	for n := 0; n < len(blob); n += 97 {
		if _, err := ReadMeta(context.Background(), &memory{b: blob[:n]}, info); !errors.Is(err, ErrFormat) {
			t.Fatalf("blob cut to %d bytes: %v", n, err)
		}
		if _, err := FindMeta(context.Background(), &memory{b: blob[:n]}, info); !errors.Is(err, ErrFormat) {
			t.Fatalf("blob cut to %d bytes, TOC searched: %v", n, err)
		}
	}
}

// cutOff is a source that breaks off, as a network does: the error can be mended by trying again.
type cutOff struct{ memory }

func (c *cutOff) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	r, err := c.memory.ReadRange(ctx, off, n)
	return io.NopCloser(io.LimitReader(r, n/2)), err
}

func TestErrorOfSourceIsNotPermanent(t *testing.T) {
	blob, info, _ := victim(t)
	_, err := ReadMeta(context.Background(), &cutOff{memory{b: blob}}, info)
	if !errors.Is(err, io.ErrUnexpectedEOF) || source.IsPermanent(err) {
		t.Errorf("error %v", err)
	}
}

func TestBlobMetaFileOfOtherBuildersIsRead(t *testing.T) {
	blob, info, _ := victim(t)
	m, err := ReadMeta(context.Background(), &memory{b: blob}, info)
	if err != nil {
		t.Fatal(err)
	}
	var file []byte
	for _, c := range m.rows {
		file = appendCIv1(file, c)
	}
	file = append(file, make([]byte, rafs.AlignUp(uint64(len(file)))-uint64(len(file)))...)
	file = append(file, blob[info.CIOffset+info.CIStored:][:cctSize]...)
	if _, _, res := write(t, content(rand.New(rand.NewPCG(7, 7)), 12, 4000), []byte("bootstrap"), small); !bytes.Equal(res.BlobMeta, file) {
		t.Error("what the writer gives to be packed is not what the blob holds")
	}
	packed, err := ParseBlobMeta(file, info)
	if err != nil {
		t.Fatal(err)
	}
	digests := make([]rafs.Digest, len(m.rows))
	for i := range digests {
		digests[i] = m.rows[i].Digest
	}
	table, err := packed.Table(digests)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := object(table, blob); err != nil {
		t.Error(err)
	}
	for n := 0; n < len(file); n += 61 {
		if _, err := ParseBlobMeta(file[:n], info); !errors.Is(err, ErrFormat) {
			t.Fatalf("cut to %d bytes: %v", n, err)
		}
	}
}

func TestMetaOfNewerReleaseIsRefused(t *testing.T) {
	b, err := (&Meta{}).MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	b[8]++
	if _, err := ParseMeta(b); !errors.Is(err, ErrNewer) {
		t.Errorf("error %v", err)
	}
}
