package blob

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"

	"holdfast/rafs"
	"holdfast/rafs/tree"
)

// benchData is a file of the machine's, HOLDFAST_BENCH_FILE (a tar of /usr/lib says more), or the test binary itself.
func benchData(b *testing.B) []byte {
	name := os.Getenv("HOLDFAST_BENCH_FILE")
	if name == "" {
		name = os.Args[0]
	}
	data, err := os.ReadFile(name)
	if err != nil {
		b.Fatal(err)
	}
	return data
}

// BenchmarkWriter writes blobs to nowhere. "stored%" is the size of the chunk data.
func BenchmarkWriter(b *testing.B) {
	data := benchData(b)
	for _, codec := range []rafs.Codec{rafs.CodecNone, rafs.CodecLZ4, rafs.CodecZstd} {
		for _, chunk := range []int{4 << 10, 1 << 20} {
			b.Run(fmt.Sprintf("%s/%dKiB", codec, chunk>>10), func(b *testing.B) {
				b.SetBytes(int64(len(data)))
				b.ReportAllocs()
				var stats Stats
				for range b.N {
					w, err := NewWriter(io.Discard, Options{Blob: 1, ChunkSize: uint32(chunk), Codec: codec})
					if err != nil {
						b.Fatal(err)
					}
					refs := make([]tree.ChunkRef, len(data)/chunk+1)
					for i, rest := 0, data; len(rest) > 0; i++ {
						n := copy(w.Buffer(chunk), rest)
						if err := w.Add(w.Buffer(n), &refs[i]); err != nil {
							b.Fatal(err)
						}
						rest = rest[n:]
					}
					res, err := w.Finish(nil)
					if err != nil {
						b.Fatal(err)
					}
					stats = res.Stats
				}
				b.ReportMetric(float64(stats.Stored)*100/float64(stats.Bytes), "stored%")
			})
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	data := benchData(b)
	for _, algo := range []rafs.DigestAlgo{rafs.Blake3, rafs.SHA256} {
		for _, codec := range []rafs.Codec{rafs.CodecNone, rafs.CodecLZ4, rafs.CodecZstd, rafs.CodecGzip} {
			for _, size := range []int{4 << 10, 1 << 20} {
				b.Run(fmt.Sprintf("%s/%s/%dKiB", codec, algo, size>>10), func(b *testing.B) {
					benchDecode(b, codec, algo, data, size)
				})
			}
		}
	}
}

func benchDecode(b *testing.B, codec rafs.Codec, algo rafs.DigestAlgo, data []byte, size int) {
	d, err := NewDecoder()
	if err != nil {
		b.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	type chunk struct {
		row    rafs.Chunk
		stored []byte
	}
	var chunks []chunk
	for len(chunks) < 16 {
		off := rng.IntN(len(data) - size)
		p := data[off : off+size]
		stored := encode(b, codec, p)
		row := rafs.Chunk{Size: uint32(size), Stored: uint32(len(stored)), Codec: codec, Digest: algo.Sum(p)}
		if len(stored) == size {
			row.Codec = rafs.CodecNone
		}
		chunks = append(chunks, chunk{row, stored})
	}
	dst := make([]byte, size)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		c := chunks[i%len(chunks)]
		if err := d.Decode(c.row, algo, c.stored, dst); err != nil {
			b.Fatal(err)
		}
	}
}
