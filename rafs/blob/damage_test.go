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
		"v2 where there is v1":        func(i *rafs.BlobInfo) { i.CISize = uint64(i.ChunkCount) * ciSizeV2 },
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
