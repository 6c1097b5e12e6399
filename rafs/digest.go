package rafs

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"github.com/zeebo/blake3"
)

// A DigestAlgo is the algorithm of chunk digests. The values are those of RafsV6Blob.digest_algo.
type DigestAlgo uint8

// Digest algorithms.
const (
	Blake3 DigestAlgo = 0
	SHA256 DigestAlgo = 1
)

// String returns the algorithm's name as it is written on the command line.
func (a DigestAlgo) String() string {
	switch a {
	case Blake3:
		return "blake3"
	case SHA256:
		return "sha256"
	}
	return fmt.Sprintf("digest(%d)", uint8(a))
}

// ParseDigestAlgo is the inverse of [DigestAlgo.String].
func ParseDigestAlgo(s string) (DigestAlgo, error) {
	switch s {
	case "blake3":
		return Blake3, nil
	case "sha256":
		return SHA256, nil
	}
	return 0, fmt.Errorf("unknown digest algorithm %q: use blake3 or sha256", s)
}

// Sum returns the digest of p. An unknown algorithm gives the zero digest, which no content has.
func (a DigestAlgo) Sum(p []byte) Digest {
	switch a {
	case Blake3:
		return blake3.Sum256(p)
	case SHA256:
		return sha256.Sum256(p)
	}
	return Digest{}
}

// A Digest is a 256 bit digest of a chunk's uncompressed bytes.
type Digest [32]byte

// String returns the digest in hex.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }
