package rafs

import (
	"errors"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// rows draws rows of a table with gaps, and returns object and blob sizes that hold them.
func rows(t *rapid.T) ([]Chunk, uint64, uint64) {
	var out []Chunk
	var off, stored uint64
	for range rapid.IntRange(0, 20).Draw(t, "rows") {
		off += uint64(rapid.SampledFrom([]int{0, 0, 1, 3, 5000}).Draw(t, "gap")) * BlockSize
		size := rapid.Uint32Range(1, MaxChunkSize).Draw(t, "size")
		c := Chunk{Offset: off, BlobOffset: stored, Size: size, Stored: size}
		if size > 1 && rapid.Bool().Draw(t, "compressed") {
			c.Codec, c.Stored = CodecZstd, rapid.Uint32Range(1, size-1).Draw(t, "stored")
		}
		out = append(out, c)
		off, stored = c.End(), stored+uint64(c.Stored)
	}
	return out, off + uint64(rapid.IntRange(0, 3*MaxChunkSize).Draw(t, "rest")), stored
}

func TestTableCoversEveryByteOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in, size, stored := rows(t)
		kept := append([]Chunk(nil), in...)
		table, err := NewTable(in, size, stored, SHA256)
		if err != nil {
			t.Fatal(err)
		}
		if table.Size() != AlignUp(size) || table.Algo() != SHA256 {
			t.Fatalf("size %d, algorithm %s", table.Size(), table.Algo())
		}
		var next uint64
		for i := range table.Len() {
			c := table.At(i)
			if c.Offset != next || c.Size == 0 || c.Size > MaxChunkSize {
				t.Fatalf("row %d, %+v, does not begin at %d", i, c, next)
			}
			if !c.Zero() {
				if c != kept[0] {
					t.Fatalf("row %d is %+v, want %+v", i, c, kept[0])
				}
				kept = kept[1:]
			}
			next = c.End()
		}
		if next != table.Size() || len(kept) != 0 {
			t.Fatalf("the rows end at %d of %d, %d are lost", next, table.Size(), len(kept))
		}
	})
}

func TestRangeIsTheRowsThatTouchIt(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in, size, stored := rows(t)
		table, err := NewTable(in, size, stored, Blake3)
		if err != nil {
			t.Fatal(err)
		}
		off := rapid.Uint64Range(0, table.Size()+BlockSize).Draw(t, "off")
		n := rapid.OneOf(rapid.Uint64Range(0, 3*MaxChunkSize), rapid.Just(^uint64(0))).Draw(t, "n")
		first, last := table.Range(off, n)
		for i := range table.Len() {
			c := table.At(i)
			touches := n > 0 && c.End() > off && (c.Offset < off || c.Offset-off < n)
			if touches != (i >= first && i < last) {
				t.Fatalf("range [%d, +%d) is rows [%d, %d), but row %d is %+v", off, n, first, last, i, c)
			}
		}
	})
}

func TestTableRefusesRowsThatContradict(t *testing.T) {
	good := Chunk{Offset: 4096, BlobOffset: 10, Size: 5000, Stored: 100, Codec: CodecLZ4}
	for name, c := range map[string]struct {
		change func(*Chunk)
		word   string
	}{
		"offset between blocks":      {func(c *Chunk) { c.Offset = 4097 }, "boundary"},
		"no bytes":                   {func(c *Chunk) { c.Size = 0 }, "long"},
		"too long":                   {func(c *Chunk) { c.Size = MaxChunkSize + 1 }, "long"},
		"before the row before":      {func(c *Chunk) { c.Offset = 0 }, "overlaps"},
		"after the object":           {func(c *Chunk) { c.Offset = 16384 }, "ends after"},
		"end overflows":              {func(c *Chunk) { c.Offset = 1<<64 - 4096 }, "ends after"},
		"stored outside":             {func(c *Chunk) { c.BlobOffset = 901 }, "outside"},
		"stored offset overflows":    {func(c *Chunk) { c.BlobOffset = 1<<64 - 1 }, "outside"},
		"raw of another length":      {func(c *Chunk) { c.Codec = CodecNone }, "not compressed"},
		"unknown compression":        {func(c *Chunk) { c.Codec = 9 }, "compression"},
		"more stored than any codec": {func(c *Chunk) { c.Stored = MaxChunkSize * 2 }, "stored"},
	} {
		first := Chunk{Size: 1, Stored: 1}
		bad := good
		c.change(&bad)
		if _, err := NewTable([]Chunk{first, bad}, 16384, 1000, Blake3); !errors.Is(err, ErrTable) || !strings.Contains(err.Error(), c.word) || !strings.Contains(err.Error(), "row 1") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := NewTable(nil, MaxObjectSize+1, 0, Blake3); !errors.Is(err, ErrTable) {
		t.Errorf("object too large: %v", err)
	}
	if _, err := NewTable(nil, 0, MaxStoredSize+1, Blake3); !errors.Is(err, ErrTable) {
		t.Errorf("blob too large: %v", err)
	}
}

func TestTableTellsUnknownDigestAlgorithm(t *testing.T) {
	if _, err := NewTable(nil, 0, 0, 7); !errors.Is(err, ErrTable) {
		t.Errorf("error %v", err)
	}
}

func TestNamesParseBack(t *testing.T) {
	for _, c := range []Codec{CodecNone, CodecLZ4, CodecZstd} {
		if got, err := ParseCodec(c.String()); err != nil || got != c {
			t.Errorf("%s: %s, %v", c, got, err)
		}
	}
	for _, a := range []DigestAlgo{Blake3, SHA256} {
		if got, err := ParseDigestAlgo(a.String()); err != nil || got != a {
			t.Errorf("%s: %s, %v", a, got, err)
		}
	}
	for _, s := range []string{"", "gzip", "codec(7)"} {
		if _, err := ParseCodec(s); err == nil {
			t.Errorf("codec %q is known", s)
		}
		if _, err := ParseDigestAlgo(s); err == nil {
			t.Errorf("digest %q is known", s)
		}
	}
}

// The digests of no bytes and of "abc", from the BLAKE3 and SHA-2 papers' test vectors.
func TestDigests(t *testing.T) {
	for _, v := range []struct {
		algo DigestAlgo
		in   string
		want string
	}{
		{Blake3, "", "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"},
		{Blake3, "abc", "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"},
		{SHA256, "", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
		{SHA256, "abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
	} {
		if got := v.algo.Sum([]byte(v.in)).String(); got != v.want {
			t.Errorf("%s of %q is %s, want %s", v.algo, v.in, got, v.want)
		}
	}
	if DigestAlgo(7).Sum([]byte("abc")) != (Digest{}) {
		t.Error("an unknown algorithm gives a digest")
	}
}

func TestFeaturesAreRefusedByName(t *testing.T) {
	known := uint32(0xfff)
	for bit := range 32 {
		f := uint32(1) << bit
		err := CheckFeatures(f)
		readable := false
		for _, n := range featureNames {
			if n.bit == f {
				readable = n.readable
				if !n.readable && (err == nil || !strings.Contains(err.Error(), n.name)) {
					t.Errorf("feature %s: %v", n.name, err)
				}
			}
		}
		if f&known == 0 { // outside the mask of incompatible bits all but the last are hints
			readable = f > 0xffff && bit != 31
		}
		if readable != (err == nil) || err != nil && !errors.Is(err, ErrUnsupported) {
			t.Errorf("bit %#x: %v", f, err)
		}
	}
}

func TestSizeOfChunkData(t *testing.T) {
	b := BlobInfo{StoredSize: 10000, CIOffset: 5512}
	for _, c := range []struct {
		features uint32
		want     uint64
	}{
		{0, 10000},
		{FeatureHasTarHeader, 10000}, // not to be trusted without CAP_TAR_TOC
		{FeatureCapTarTOC, 5512},
		{FeatureCapTarTOC | FeatureHasTarHeader, 5000},
		{FeatureCapTarTOC | FeatureHasTarHeader | FeatureSeparate, 10000},
	} {
		b.Features = c.features
		if got, err := b.DataSize(); err != nil || got != c.want {
			t.Errorf("features %#x: %d, %v, want %d", c.features, got, err, c.want)
		}
	}
	b = BlobInfo{CIOffset: 511, Features: FeatureCapTarTOC | FeatureHasTarHeader}
	if _, err := b.DataSize(); err == nil {
		t.Error("no room for the tar header, and no error")
	}
	if len(PlaceholderID) != 64 {
		t.Errorf("placeholder of %d bytes", len(PlaceholderID))
	}
}
