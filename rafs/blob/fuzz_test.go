package blob

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"holdfast/rafs"
)

func FuzzChunkInfoV1(f *testing.F) {
	f.Add(appendCIv1(nil, rafs.Chunk{Offset: 4096, BlobOffset: 77, Size: rafs.MaxChunkSize, Stored: 5}))
	f.Add(make([]byte, ciSizeV1))
	f.Fuzz(func(t *testing.T, b []byte) { fuzzCI(t, b, ciSizeV1, appendCIv1) })
}

func FuzzChunkInfoV2(f *testing.F) {
	f.Add(appendCIv2(nil, rafs.Chunk{Offset: 4096, BlobOffset: 77, Size: rafs.MaxChunkSize, Stored: 5, Codec: rafs.CodecZstd}))
	f.Add(make([]byte, ciSizeV2))
	f.Fuzz(func(t *testing.T, b []byte) { fuzzCI(t, b, ciSizeV2, appendCIv2) })
}

// fuzzCI checks that what can be read can be written, and reads back the same.
func fuzzCI(t *testing.T, b []byte, size int, appendCI func([]byte, rafs.Chunk) []byte) {
	n, v2 := uint32(len(b)/size), size == ciSizeV2
	rows, err := parseCI(b, n, v2, rafs.CodecZstd)
	if err != nil {
		return
	}
	var again []byte
	for _, r := range rows {
		again = appendCI(again, r)
	}
	if !v2 && !bytes.Equal(again, b) {
		t.Fatalf("%x is written as %x", b, again)
	}
	back, err := parseCI(again, n, v2, rafs.CodecZstd)
	if err != nil {
		t.Fatal(err)
	}
	for i := range rows {
		if rows[i] != back[i] {
			t.Fatalf("%+v reads back as %+v", rows[i], back[i])
		}
	}
}

func FuzzHeader(f *testing.F) {
	h := cctHeader{features: nativeFeatures, entries: 3, offset: 4, stored: 5, size: 6}
	f.Add(h.append(nil)[:60])
	f.Fuzz(func(t *testing.T, fields []byte) {
		b := h.append(nil)
		copy(b[:cctSize-4], fields)
		h, err := parseHeader(b)
		if err != nil {
			return
		}
		if back, err := parseHeader(h.append(nil)); err != nil || back != h {
			t.Fatalf("%+v reads back as %+v, %v", h, back, err)
		}
	})
}

func FuzzTOC(f *testing.F) {
	e := tocEntry{name: tocBlob, stored: 100, size: 200}
	f.Add(e.append(nil))
	f.Add(appendTarHeader(e.append(nil), tocSelf, tocEntrySize))
	f.Fuzz(func(t *testing.T, b []byte) {
		const blobSize = 1 << 20
		parseTOC(b, blobSize) // mostly a tar header that is none
		toc, err := parseTOC(appendTarHeader(bytes.Clone(b), tocSelf, uint64(len(b))), blobSize)
		if err != nil {
			return
		}
		var again []byte
		for i := range toc {
			if toc[i].offset+toc[i].stored > blobSize {
				t.Fatalf("entry %+v reaches outside the blob", toc[i])
			}
			again = toc[i].append(again)
		}
		back, err := parseTOC(appendTarHeader(again, tocSelf, uint64(len(again))), blobSize)
		if err != nil || len(back) != len(toc) {
			t.Fatalf("%+v reads back as %+v, %v", toc, back, err)
		}
	})
}

// FuzzBlob looks for a panic or a table with rows outside the blob in files that end like one.
func FuzzBlob(f *testing.F) {
	var w bytes.Buffer
	blob, info := seedBlob(f, &w)
	f.Add(blob)
	f.Add(w.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		src := &memory{b: b}
		found, err := FindMeta(context.Background(), src, rafs.BlobInfo{Codec: rafs.CodecZstd})
		if err == nil {
			checkRows(t, found, uint64(len(b)))
		}
		bare := info
		bare.TOCSize, bare.TOCDigest = 0, rafs.Digest{}
		if m, err := ReadMeta(context.Background(), src, bare); err == nil {
			checkRows(t, m, uint64(len(b)))
		}
	})
}

// seedBlob returns a small blob.
func seedBlob(f *testing.F, w *bytes.Buffer) ([]byte, rafs.BlobInfo) {
	blob, _, _ := write(f, content(rand.New(rand.NewPCG(9, 1)), 3, 100), []byte("bootstrap"), small)
	w.Write(blob)
	blob, _, res := write(f, content(rand.New(rand.NewPCG(9, 2)), 3, 100), nil, small)
	return blob, res.Info
}

func checkRows(t *testing.T, m *Meta, size uint64) {
	table, err := m.Table(nil)
	if err != nil {
		return
	}
	for i := range table.Len() {
		if c := table.At(i); c.BlobOffset+uint64(c.Stored) > size || c.End() > table.Size() {
			t.Fatalf("row %d, %+v, lies outside the blob of %d bytes", i, c, size)
		}
	}
}

func FuzzParseMeta(f *testing.F) {
	m := &Meta{info: rafs.BlobInfo{ID: "ab", ChunkCount: 1, StoredSize: 10, Size: 4096}, rows: []rafs.Chunk{{Size: 5, Stored: 5}}, digests: true}
	b, err := m.MarshalBinary()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b[:len(b)-32])
	f.Fuzz(func(t *testing.T, b []byte) {
		ParseMeta(b)
		sum := rafs.SHA256.Sum(b)
		m, err := ParseMeta(append(bytes.Clone(b), sum[:]...))
		if err != nil {
			return
		}
		again, err := m.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseMeta(again); err != nil {
			t.Fatal(err)
		}
		m.Table(nil)
	})
}

func FuzzDecodeZstd(f *testing.F) { fuzzDecode(f, rafs.CodecZstd) }
func FuzzDecodeLZ4(f *testing.F)  { fuzzDecode(f, rafs.CodecLZ4) }
func FuzzDecodeGzip(f *testing.F) { fuzzDecode(f, rafs.CodecGzip) }
func FuzzDecodeNone(f *testing.F) { fuzzDecode(f, rafs.CodecNone) }

// encode stores p with a codec, gzip included, which no Writer writes.
func encode(t testing.TB, codec rafs.Codec, p []byte) []byte {
	t.Helper()
	if codec == rafs.CodecGzip {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		z.Write(p)
		z.Close()
		return b.Bytes()
	}
	c, err := newCompressor(codec, rafs.MaxChunkSize)
	if err != nil {
		t.Fatal(err)
	}
	_, stored := c(nil, p)
	return bytes.Clone(stored)
}

func fuzzDecode(f *testing.F, codec rafs.Codec) {
	f.Add(encode(f, codec, bytes.Repeat([]byte("holdfast "), 50)), uint32(450))
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd}, uint32(9))
	d, err := NewDecoder()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, stored []byte, size uint32) {
		size %= 256 << 10
		c := rafs.Chunk{Size: size, Stored: uint32(len(stored)), Codec: codec}
		all := bytes.Repeat([]byte{0xa5}, int(size)+64)
		for slack, dst := range map[uint32][]byte{Slack: all[:size], 0: all} {
			if err := d.Decode(c, rafs.Blake3, stored, dst); err == nil && size > 0 && len(stored) > 0 {
				t.Fatal("no content has the digest zero")
			}
			if rest := all[size+slack:]; bytes.Count(rest, []byte{0xa5}) != len(rest) {
				t.Fatalf("Decode wrote more than %d bytes beyond the chunk", slack)
			}
			copy(all, bytes.Repeat([]byte{0xa5}, len(all)))
		}
	})
}

// A frame that claims gigabytes costs nothing: what Decode allocates does not depend on the claim.
func TestFramesThatClaimTooMuchCostNoMemory(t *testing.T) {
	d, err := NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, 64<<20)
	for name, c := range map[string]struct {
		codec  rafs.Codec
		stored []byte
	}{
		"zstd content of 64 MiB":      {rafs.CodecZstd, enc.EncodeAll(zeros, nil)},
		"zstd content size of 1 EiB":  {rafs.CodecZstd, []byte{0x28, 0xb5, 0x2f, 0xfd, 0xe0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0x01, 0, 0}},
		"zstd window of 3.75 TiB":     {rafs.CodecZstd, []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xff, 0x03, 0, 0, 0}},
		"gzip content of 64 MiB":      {rafs.CodecGzip, encode(t, rafs.CodecGzip, zeros)},
		"lz4 content of 16 MiB":       {rafs.CodecLZ4, encode(t, rafs.CodecLZ4, zeros[:16<<20])},
		"zstd frame after the chunk":  {rafs.CodecZstd, append(encode(t, rafs.CodecZstd, zeros[:4096]), enc.EncodeAll([]byte("x"), nil)...)},
		"zstd content shorter":        {rafs.CodecZstd, enc.EncodeAll(zeros[:4095], nil)},
		"gzip member after the chunk": {rafs.CodecGzip, append(encode(t, rafs.CodecGzip, zeros[:4096]), encode(t, rafs.CodecGzip, []byte("x"))...)},
		"gzip content shorter":        {rafs.CodecGzip, encode(t, rafs.CodecGzip, zeros[:4095])},
		"lz4 content shorter":         {rafs.CodecLZ4, encode(t, rafs.CodecLZ4, zeros[:4095])},
	} {
		dst := make([]byte, 4096)
		// With this digest only the length tells.
		row := rafs.Chunk{Digest: rafs.Blake3.Sum(dst), Size: 4096, Stored: uint32(len(c.stored)), Codec: c.codec}
		decode := func() {
			clear(dst)
			if err := d.Decode(row, rafs.Blake3, c.stored, dst); !errors.Is(err, ErrDecode) {
				t.Errorf("%s: %v", name, err)
			}
		}
		decode() // decoder states are made once
		const rounds = 20
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range rounds {
			decode()
		}
		runtime.ReadMemStats(&after)
		if n := (after.TotalAlloc - before.TotalAlloc) / rounds; n > 64<<10 {
			t.Errorf("%s: %d bytes allocated", name, n)
		}
	}
}
