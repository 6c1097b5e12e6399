package blob

import (
	"bytes"
	"fmt"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"holdfast/rafs"
)

// A compressor appends the stored form of src to dst and returns both: the grown dst, and the stored form alone, which
// is src itself where compressing does not make it smaller. What it makes depends on src and the options only. It is
// used by one goroutine.
type compressor func(dst, src []byte) (grown, stored []byte)

// newCompressor returns a compressor for a codec that holdfast writes; chunks are at most chunkSize bytes.
//
// The zstd level is the library's default, about zstd -3. Measured as whole conversions of the demo image's tar (216 MB, 1 MiB
// chunks) on two cores of an EPYC with AVX-512, medians of five runs in turns:
//
//	              wall clock   processor   blobs
//	fastest       0.60 s       1.07 s      86.5 MB
//	default       0.79 s       1.41 s      81.0 MB
//	zstd -3 -T0   1.09 s       1.39 s      67.3 MB  (one frame; with sha256sum)
//
// and of 705 MB of shared libraries by chunk size, on one core, MB/s and compressed size in percent:
//
//	chunks   fastest     default     lz4
//	1 MiB    268, 36.6   94, 34.4    311, 48.1
//	16 KiB   230, 41.4   166, 39.0   461, 53.8
//	4 KiB    170, 45.6   126, 42.9   472, 58.7
//
// An image is converted once and fetched often, and a reader waits for what is fetched: six percent of it are worth a third
// more time to convert. No CRC is written: every chunk has a digest.
func newCompressor(codec rafs.Codec, chunkSize uint32) (compressor, error) {
	switch codec {
	case rafs.CodecNone:
		return func(dst, src []byte) ([]byte, []byte) { return dst, src }, nil
	case rafs.CodecLZ4:
		return newLZ4(), nil
	case rafs.CodecZstd:
		return newZstd(chunkSize)
	}
	return nil, fmt.Errorf("compressing chunks with %s is not possible: use zstd, lz4 or none", codec)
}

func newZstd(chunkSize uint32) (compressor, error) {
	enc, err := zstd.NewWriter(nil,
		zstd.WithEncoderLevel(zstd.SpeedDefault),
		zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderCRC(false),
		zstd.WithSingleSegment(true),
		zstd.WithWindowSize(int(min(max(chunkSize, zstd.MinWindowSize), 8<<20))))
	if err != nil {
		return nil, fmt.Errorf("set up zstd: %w", err)
	}
	return func(dst, src []byte) ([]byte, []byte) {
		grown := enc.EncodeAll(src, dst)
		return smaller(dst, grown, src)
	}, nil
}

func newLZ4() compressor {
	var c lz4.Compressor
	return func(dst, src []byte) ([]byte, []byte) {
		bound := lz4.CompressBlockBound(len(src))
		if cap(dst)-len(dst) < bound {
			dst = make([]byte, 0, bound) // what the old one holds stays referenced by its chunks
		}
		// The only error is a dst that is too short, and it is not; 0 bytes mean that src does not shrink.
		n, err := c.CompressBlock(src, dst[len(dst):len(dst)+bound])
		if err != nil || n == 0 {
			return dst, src
		}
		return smaller(dst, dst[:len(dst)+n], src)
	}
}

// smaller chooses between src and what was appended to dst to make grown.
func smaller(dst, grown, src []byte) ([]byte, []byte) {
	if stored := grown[len(dst):]; len(stored) < len(src) {
		return grown, stored
	}
	return grown[:len(dst)], src
}

// allZero reports whether p holds nothing but zeros. Comparing p with itself one byte on runs at the speed of memcmp.
func allZero(p []byte) bool {
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}
