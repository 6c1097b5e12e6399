package blob

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"reflect"
	"testing"

	"pgregory.net/rapid"

	"holdfast/rafs"
)

func TestBytesDoNotDependOnWorkersAndReadBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := Options{
			Blob:      rapid.IntRange(1, rafs.MaxBlobs).Draw(t, "blob"),
			ChunkSize: uint32(1) << rapid.IntRange(12, 20).Draw(t, "chunk size"),
			Codec:     rapid.SampledFrom([]rafs.Codec{rafs.CodecNone, rafs.CodecLZ4, rafs.CodecZstd}).Draw(t, "codec"),
			Digest:    rapid.SampledFrom([]rafs.DigestAlgo{rafs.Blake3, rafs.SHA256}).Draw(t, "digest"),
			Workers:   1,
		}
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "content"), 0))
		n := rapid.IntRange(0, 2<<20/int(o.ChunkSize)).Draw(t, "chunks")
		chunks := content(rng, min(n, 200), int(o.ChunkSize))
		boot := []byte(rapid.StringN(0, 100, 100).Draw(t, "bootstrap"))
		blob, refs, res := write(t, chunks, boot, o)
		for _, workers := range []int{2, 7} {
			o.Workers = workers
			again, againRefs, againRes := write(t, chunks, boot, o)
			if !bytes.Equal(blob, again) || !reflect.DeepEqual(res, againRes) || fmt.Sprint(refs) != fmt.Sprint(againRefs) {
				t.Fatalf("%d workers give another blob than one", workers)
			}
		}
		if err := checkBlob(blob, res.Info, chunks, refs); err != nil {
			t.Fatal(err)
		}
	})
}

func TestChunkInfoReadsBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := rafs.Chunk{
			Offset:     rapid.Uint64Range(0, rafs.MaxObjectSize/rafs.BlockSize-1).Draw(t, "block") * rafs.BlockSize,
			BlobOffset: rapid.Uint64Range(0, rafs.MaxStoredSize-1).Draw(t, "blob offset"),
			Size:       rapid.Uint32Range(1, rafs.MaxChunkSize).Draw(t, "size"),
			Stored:     rapid.Uint32Range(1, rafs.MaxChunkSize-1).Draw(t, "stored"),
			Codec:      rafs.CodecLZ4,
		}
		v2, err := parseCIv2(appendCIv2(nil, c), rafs.CodecLZ4)
		if err != nil || v2 != c {
			t.Fatalf("v2: %+v came back as %+v, %v", c, v2, err)
		}
		if c.Size == c.Stored {
			c.Codec = rafs.CodecNone // v1 has no other way to say it
		}
		v1, err := parseCIv1(appendCIv1(nil, c), rafs.CodecLZ4)
		if err != nil || v1 != c {
			t.Fatalf("v1: %+v came back as %+v, %v", c, v1, err)
		}
	})
}

func TestMetaSurvivesMarshalling(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "content"), 0))
		blob, _, res := write(t, content(rng, rng.IntN(50), 2000), nil, small)
		m, err := ReadMeta(context.Background(), &memory{b: blob}, res.Info)
		if err != nil {
			t.Fatal(err)
		}
		b, err := m.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		back, err := ParseMeta(b)
		if err != nil {
			t.Fatal(err)
		}
		if fmt.Sprint(back) != fmt.Sprint(m) {
			t.Fatalf("%+v came back as %+v", m, back)
		}
		// Any damage is noticed.
		b[rng.IntN(len(b))] ^= byte(1 + rng.IntN(255))
		if _, err := ParseMeta(b); err == nil {
			t.Fatal("damage was not noticed")
		}
		if _, err := ParseMeta(b[:rng.IntN(len(b))]); err == nil {
			t.Fatal("a cut was not noticed")
		}
	})
}
