package blob

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"holdfast/rafs"
)

// A Meta is what must be known of a blob before its chunks can be read. It is immutable and safe for concurrent use.
type Meta struct {
	info    rafs.BlobInfo
	rows    []rafs.Chunk
	digests bool // rows have them
}

// Info returns the blob's description.
func (m *Meta) Info() rafs.BlobInfo { return m.info }

// HasDigests reports whether the blob itself gives the digests of its chunks.
func (m *Meta) HasDigests() bool { return m.digests }

// Table returns the blob's chunk table. digests are those of the chunks in the order of the CI array, from the
// bootstrap's chunk table; with nil those inlined in the blob are used. Without digests there is no table: nothing
// could be checked. Errors name the blob.
func (m *Meta) Table(digests []rafs.Digest) (*rafs.Table, error) {
	rows := m.rows
	switch {
	case digests == nil && !m.digests && len(rows) > 0:
		return nil, fmt.Errorf("blob %s: it has no chunk digests, and the bootstrap gave none: %w", m.info.ID, ErrFormat)
	case digests != nil && len(digests) != len(rows):
		return nil, fmt.Errorf("blob %s: %d digests for %d chunks: %w", m.info.ID, len(digests), len(rows), ErrFormat)
	case digests != nil:
		rows = withDigests(rows, digests)
	}
	for i := range rows {
		if rows[i].Digest == (rafs.Digest{}) {
			return nil, fmt.Errorf("blob %s: chunk %d has no digest: %w", m.info.ID, i, ErrFormat)
		}
	}
	data, err := m.info.DataSize()
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w: %w", m.info.ID, err, ErrFormat)
	}
	t, err := rafs.NewTable(rows, m.info.Size, data, m.info.Digest)
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", m.info.ID, err)
	}
	return t, nil
}

// withDigests returns rows with other digests.
func withDigests(rows []rafs.Chunk, digests []rafs.Digest) []rafs.Chunk {
	out := append([]rafs.Chunk(nil), rows...)
	for i := range out {
		out[i].Digest = digests[i]
	}
	return out
}

// checkInfo refuses a blob that cannot be read or whose numbers cannot be true for a file of fileSize bytes. A chunk
// takes at least one stored byte, which bounds the memory for chunk information by the size of the file.
func checkInfo(info *rafs.BlobInfo, fileSize uint64) error {
	if err := rafs.CheckFeatures(info.Features); err != nil {
		return err
	}
	if info.Codec > rafs.CodecZstd || info.CICodec > rafs.CodecZstd {
		return fmt.Errorf("unknown compression (chunks %s, chunk information %s): %w", info.Codec, info.CICodec, ErrFormat)
	}
	if info.Digest != rafs.Blake3 && info.Digest != rafs.SHA256 {
		return fmt.Errorf("unknown digest algorithm %s: %w", info.Digest, ErrFormat)
	}
	if info.Size > rafs.MaxObjectSize || fileSize > rafs.MaxStoredSize {
		return fmt.Errorf("%d bytes, %d stored, are over the limit of the format: %w", info.Size, fileSize, ErrFormat)
	}
	if info.ChunkCount == 0 {
		if info.Size != 0 { // zeros would be read where its builder had data
			return fmt.Errorf("an object of %d bytes without a chunk: %w", info.Size, ErrFormat)
		}
		return nil
	}
	data, err := info.DataSize()
	if err != nil {
		return fmt.Errorf("%w: %w", err, ErrFormat)
	}
	if data > fileSize {
		return fmt.Errorf("%d bytes of chunk data in a blob of %d bytes: is the blob cut short? %w", data, fileSize, ErrFormat)
	}
	if info.ChunkCount > rafs.MaxChunks || uint64(info.ChunkCount) > data {
		return fmt.Errorf("%d chunks in %d bytes of chunk data: %w", info.ChunkCount, data, ErrFormat)
	}
	return nil
}

// parseChunks makes a Meta of a decoded CI array, its header and the digest array (nil: none). Errors do not name the
// blob; info was checked.
func parseChunks(info rafs.BlobInfo, h cctHeader, ci, digests []byte) (*Meta, error) {
	rows, err := parseCI(ci, h.entries, h.v2(), info.Codec)
	if err != nil {
		return nil, err
	}
	m := &Meta{info: info, rows: rows, digests: digests != nil}
	if digests == nil {
		return m, nil
	}
	const n = len(rafs.Digest{})
	if len(digests) != len(rows)*n {
		return nil, fmt.Errorf("digest array of %d bytes for %d chunks: %w", len(digests), len(rows), ErrFormat)
	}
	for i := range rows {
		rows[i].Digest = rafs.Digest(digests[i*n:])
	}
	return m, nil
}

// checkHeader compares the header beside a CI array with what the blob table (or TOC) says.
func checkHeader(h *cctHeader, info *rafs.BlobInfo) error {
	if err := rafs.CheckFeatures(h.features); err != nil {
		return fmt.Errorf("chunk information header: %w", err)
	}
	for _, f := range [...]struct {
		name      string
		got, want uint64
	}{
		{"entries", uint64(h.entries), uint64(info.ChunkCount)},
		{"compression", uint64(h.codec), uint64(info.CICodec)},
		{"offset", h.offset, info.CIOffset},
		{"stored size", h.stored, info.CIStored},
		{"size", h.size, info.CISize},
		{"context count", uint64(h.zranCount), 0},
	} {
		if f.got != f.want {
			return fmt.Errorf("chunk information header: %s is %d, want %d: %w", f.name, f.got, f.want, ErrFormat)
		}
	}
	size := uint64(ciSizeV1)
	if h.v2() {
		size = ciSizeV2
	}
	if h.size != uint64(h.entries)*size {
		return fmt.Errorf("chunk information header: %d bytes for %d entries of %d: %w", h.size, h.entries, size, ErrFormat)
	}
	return nil
}

// ParseBlobMeta reads a blob's chunk information in the form in which other software caches it and packs it beside
// bootstraps, "<id>.blob.meta": the decoded CI array padded to 4096 bytes, then the CCT header. It has no digests: see
// [Meta.Table]. Errors name the blob, and the feature if it cannot be read.
func ParseBlobMeta(b []byte, info rafs.BlobInfo) (*Meta, error) {
	m, err := parseBlobMeta(b, info)
	if err != nil {
		return nil, fmt.Errorf("chunk information of blob %s: %w", info.ID, err)
	}
	return m, nil
}

func parseBlobMeta(b []byte, info rafs.BlobInfo) (*Meta, error) {
	if len(b) < cctSize {
		return nil, fmt.Errorf("%d bytes are too few for its header: %w", len(b), ErrFormat)
	}
	h, err := parseHeader(b[len(b)-cctSize:])
	if err != nil {
		return nil, err
	}
	if err := rafs.CheckFeatures(h.features); err != nil {
		return nil, err
	}
	if err := checkInfo(&info, info.StoredSize); err != nil {
		return nil, err
	}
	if err := checkHeader(&h, &info); err != nil {
		return nil, err
	}
	if h.size > uint64(len(b)) || rafs.AlignUp(h.size)+cctSize != uint64(len(b)) {
		return nil, fmt.Errorf("%d bytes of it in a file of %d: %w", h.size, len(b), ErrFormat)
	}
	return parseChunks(info, h, b[:h.size], nil)
}

// The form in which a Meta is kept on disk: magic, version, flags, BlobInfo, CI array v2, digests, and the sha256 of all
// before it. All integers little endian.
const (
	metaMagic      = "hfblobmd"
	metaVersion    = 1
	metaDigests    = 1 << 0 // flag: digests follow the CI array
	metaHeaderSize = 8 + 4 + 4 + 64 + 5*4 + 3*8 + 4 + 3*8 + 4 + 32 + 8 + 32
)

// ErrNewer is wrapped by ParseMeta's error about a version it does not know.
var ErrNewer = errors.New("written by a newer release of holdfast: run that one, or delete the file")

// MarshalBinary returns m in a checksummed form for [ParseMeta].
func (m *Meta) MarshalBinary() ([]byte, error) {
	le := binary.LittleEndian
	in := &m.info
	var id [64]byte
	if len(in.ID) > len(id) {
		return nil, fmt.Errorf("blob id of %d bytes, at most %d are possible", len(in.ID), len(id))
	}
	copy(id[:], in.ID)
	var flags uint32
	if m.digests {
		flags = metaDigests
	}
	b := make([]byte, 0, metaHeaderSize+len(m.rows)*(ciSizeV2+len(rafs.Digest{}))+sha256.Size)
	b = append(b, metaMagic...)
	b = le.AppendUint32(b, metaVersion)
	b = le.AppendUint32(b, flags)
	b = append(b, id[:]...)
	for _, v := range [...]uint32{in.ChunkSize, in.ChunkCount, uint32(in.Codec), uint32(in.Digest), in.Features} {
		b = le.AppendUint32(b, v)
	}
	b = le.AppendUint64(b, in.StoredSize)
	b = le.AppendUint64(b, in.Size)
	b = le.AppendUint64(b, in.MetaSize)
	b = le.AppendUint32(b, uint32(in.CICodec))
	b = le.AppendUint64(b, in.CIOffset)
	b = le.AppendUint64(b, in.CIStored)
	b = le.AppendUint64(b, in.CISize)
	b = le.AppendUint32(b, in.TOCSize)
	b = append(b, in.TOCDigest[:]...)
	b = append(b, in.MetaDigest[:]...)
	b = le.AppendUint64(b, uint64(len(m.rows)))
	for _, c := range m.rows {
		b = appendCIv2(b, c)
	}
	if m.digests {
		for _, c := range m.rows {
			b = append(b, c.Digest[:]...)
		}
	}
	sum := sha256.Sum256(b)
	return append(b, sum[:]...), nil
}

// ParseMeta reads what MarshalBinary made. Errors wrap [ErrFormat] or [ErrNewer].
func ParseMeta(b []byte) (*Meta, error) {
	m, err := parseMeta(b)
	if err != nil {
		return nil, fmt.Errorf("stored chunk information: %w", err)
	}
	return m, nil
}

func parseMeta(b []byte) (*Meta, error) {
	le := binary.LittleEndian
	if len(b) < metaHeaderSize+sha256.Size || string(b[:len(metaMagic)]) != metaMagic {
		return nil, fmt.Errorf("%d bytes that do not begin as such a file does: %w", len(b), ErrFormat)
	}
	if v := le.Uint32(b[8:]); v > metaVersion {
		return nil, fmt.Errorf("version %d, this release knows %d: %w", v, metaVersion, ErrNewer)
	}
	body := b[:len(b)-sha256.Size]
	if sha256.Sum256(body) != [32]byte(b[len(body):]) {
		return nil, fmt.Errorf("its checksum does not hold: %w", ErrFormat)
	}
	flags := le.Uint32(b[12:])
	u32 := func(off int) uint32 { return le.Uint32(b[off:]) }
	u64 := func(off int) uint64 { return le.Uint64(b[off:]) }
	info := rafs.BlobInfo{
		ID:        string(bytes.TrimRight(b[16:80], "\x00")),
		ChunkSize: u32(80), ChunkCount: u32(84), Codec: rafs.Codec(u32(88)), Digest: rafs.DigestAlgo(u32(92)), Features: u32(96),
		StoredSize: u64(100), Size: u64(108), MetaSize: u64(116),
		CICodec: rafs.Codec(u32(124)), CIOffset: u64(128), CIStored: u64(136), CISize: u64(144),
		TOCSize: u32(152), TOCDigest: rafs.Digest(b[156:188]), MetaDigest: rafs.Digest(b[188:220]),
	}
	n, rest := u64(220), body[metaHeaderSize:]
	each := uint64(ciSizeV2)
	if flags&metaDigests != 0 {
		each += uint64(len(rafs.Digest{}))
	}
	if n != uint64(info.ChunkCount) || n > rafs.MaxChunks || uint64(len(rest)) != n*each || flags&^metaDigests != 0 {
		return nil, fmt.Errorf("%d bytes for %d chunks, flags %#x: %w", len(rest), n, flags, ErrFormat)
	}
	if err := checkInfo(&info, rafs.MaxStoredSize); err != nil {
		return nil, err
	}
	var digests []byte
	if flags&metaDigests != 0 {
		digests = rest[n*ciSizeV2:]
	}
	return parseChunks(info, cctHeader{entries: uint32(n), features: rafs.FeatureChunkInfoV2}, rest[:n*ciSizeV2], digests)
}
