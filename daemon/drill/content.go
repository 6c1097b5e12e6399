package drill

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"

	"holdfast/rafs"
)

// Content of a generated file: block b of file i is what a ChaCha8 generator keyed with (seed, i, b) yields. So any range can be compared
// without keeping the file, no two blocks are the same, and nothing compresses.
type generated struct {
	seed uint64
	file uint64
	size int64
}

const contentBlock = 4096

// fill writes the content at off to p.
func (g generated) fill(p []byte, off int64) {
	var block [contentBlock]byte
	for len(p) > 0 {
		b, skip := off/contentBlock, off%contentBlock
		var key [32]byte
		binary.LittleEndian.PutUint64(key[0:], g.seed)
		binary.LittleEndian.PutUint64(key[8:], g.file)
		binary.LittleEndian.PutUint64(key[16:], uint64(b))
		_, _ = rand.NewChaCha8(key).Read(block[:]) // never fails
		n := copy(p, block[skip:])
		p, off = p[n:], off+int64(n)
	}
}

// smallest and largest are the bounds of a generated file's size. Small files share blocks' neighbourhood with others in the image's object, large
// ones span many chunks.
const (
	smallest = 1
	largest  = 4 << 20
)

// generate writes a tree of files of size bytes in all to dir, and returns what they hold by their paths in it.
func generate(dir string, seed uint64, size int64) (map[string]generated, error) {
	r := rand.New(rand.NewPCG(seed, 1))
	files := map[string]generated{}
	for i := uint64(0); size > 0; i++ {
		n := int64(smallest) + r.Int64N(largest)
		if r.IntN(4) == 0 {
			n = smallest + r.Int64N(64<<10)
		}
		g := generated{seed, i, min(n, size)}
		size -= g.size
		path := fmt.Sprintf("d%d/f%d", i%16, i)
		if err := g.write(filepath.Join(dir, path)); err != nil {
			return nil, fmt.Errorf("generate the image's files: %w", err)
		}
		files[path] = g
	}
	return files, nil
}

func (g generated) write(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	b := make([]byte, g.size)
	g.fill(b, 0)
	return os.WriteFile(path, b, 0o644)
}

// A piece is a part of a file that is compared as a whole.
type piece struct {
	off    int64
	size   int
	digest rafs.Digest
	algo   rafs.DigestAlgo
	zero   bool // all zeros, with no digest
}

// parseDigest reads a digest as an image's description has it.
func parseDigest(d *rafs.Digest, s string) bool {
	n, err := hex.Decode(d[:], []byte(s))
	return err == nil && n == len(d)
}

// right reports whether p is what the piece holds.
func (c *piece) right(p []byte) bool {
	if !c.zero {
		return c.algo.Sum(p) == c.digest
	}
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
