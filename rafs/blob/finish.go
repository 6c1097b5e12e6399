package blob

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"holdfast/rafs"
)

// nativeFeatures are the features of every blob a Writer makes that has chunks.
const nativeFeatures = rafs.FeatureAligned | rafs.FeatureHasTarHeader | rafs.FeatureHasTOC | rafs.FeatureCapTarTOC

// A seal is what is known of a blob once its last chunk is written.
type seal struct {
	plain   []byte // CI array
	ci      []byte // the same as stored
	ciSum   rafs.Digest
	header  []byte // CCT header, once it is written
	digests []byte
	info    rafs.BlobInfo
}

// Info flushes, and returns what a bootstrap that Finish inlines can say of the blob: rafs.PlaceholderID for the id, no
// TOC digest, and as StoredSize what comes before the bootstrap. No chunk can be added afterwards.
func (w *Writer) Info() (rafs.BlobInfo, error) {
	if err := w.Flush(); err != nil {
		return rafs.BlobInfo{}, err
	}
	if w.sealed == nil {
		s, err := w.seal()
		if err != nil {
			return rafs.BlobInfo{}, err
		}
		w.sealed = s
	}
	info := w.sealed.info
	info.Features |= rafs.FeatureInlinedFsMeta
	return info, nil
}

func (w *Writer) seal() (*seal, error) {
	s := &seal{info: rafs.BlobInfo{
		ID:         rafs.PlaceholderID,
		ChunkSize:  w.o.ChunkSize,
		ChunkCount: uint32(len(w.rows)),
		Codec:      w.o.Codec,
		Digest:     w.o.Digest,
		Features:   nativeFeatures,
		Size:       w.size,
		CIOffset:   w.stored + rafs.TarHeaderSize,
	}}
	s.info.StoredSize = s.info.CIOffset
	if len(w.rows) == 0 {
		return s, nil
	}
	s.info.Features |= rafs.FeatureInlinedChunkDigest
	ci := make([]byte, 0, rafs.AlignUp(uint64(len(w.rows)*ciSizeV1))+cctSize) // with room for what packed appends
	s.digests = make([]byte, 0, len(w.rows)*len(rafs.Digest{}))
	for _, c := range w.rows {
		ci = appendCIv1(ci, c)
		s.digests = append(s.digests, c.Digest[:]...)
	}
	s.plain, s.ciSum = ci, sha256.Sum256(ci)
	c, err := newCompressor(w.o.Codec, rafs.MaxChunkSize)
	if err != nil {
		return nil, err
	}
	_, s.ci = c(nil, ci)
	if len(s.ci) != len(ci) {
		s.info.CICodec = w.o.Codec
	}
	s.info.CIStored, s.info.CISize = uint64(len(s.ci)), uint64(len(ci))
	s.info.StoredSize += s.info.CIStored + cctSize + uint64(len(s.digests)) + 2*rafs.TarHeaderSize
	return s, nil
}

// A Result describes a finished blob.
type Result struct {
	Info  rafs.BlobInfo // ID is the sha256 of the file, hence the OCI digest's hex form
	Size  int64         // bytes of the file
	Stats Stats
	// BlobMeta is the chunk information as it is packed beside bootstraps, for [ParseBlobMeta]; nil if there are no chunks.
	BlobMeta []byte
}

// Finish flushes, writes everything after the chunk data, with bootstrap inlined unless it is empty, and ends the
// Writer, error or not. The blob may have no chunk of its own.
func (w *Writer) Finish(bootstrap []byte) (Result, error) {
	if _, err := w.Info(); err != nil {
		w.Close()
		return Result{}, err
	}
	defer w.stop()
	info := w.sealed.info
	if len(bootstrap) > 0 {
		info.Features |= rafs.FeatureInlinedFsMeta
	}
	// The digest of image.blob covers its tar header, as builders have it; so it is written first.
	if err := w.write(appendTarHeader(nil, tocBlob, w.stored)); err != nil {
		return Result{}, err
	}
	entries := toc{{name: tocBlob, digest: rafs.Digest(w.sum.Sum(nil)), stored: w.stored, size: w.size}}
	pos := info.CIOffset
	tail := w.appendMeta(nil, info, &entries)
	if len(bootstrap) > 0 {
		var err error
		if tail, err = w.appendBootstrap(tail, pos, bootstrap, &entries); err != nil {
			return Result{}, err
		}
	}
	start := len(tail)
	for i := range entries {
		tail = entries[i].append(tail)
	}
	tail = appendTarHeader(tail, tocSelf, uint64(len(tail)-start))
	info.TOCSize = uint32(len(tail) - start)
	info.TOCDigest = sha256.Sum256(tail[start:])
	if err := w.write(tail); err != nil {
		return Result{}, err
	}
	info.ID = hex.EncodeToString(w.sum.Sum(nil))
	info.StoredSize = pos + uint64(len(tail))
	return Result{Info: info, Size: int64(info.StoredSize), Stats: w.Stats(), BlobMeta: w.sealed.packed()}, nil
}

// packed returns the CI array, padded, and its header.
func (s *seal) packed() []byte {
	if len(s.plain) == 0 {
		return nil
	}
	pad := rafs.AlignUp(uint64(len(s.plain))) - uint64(len(s.plain))
	return append(append(s.plain, make([]byte, pad)...), s.header...)
}

// appendMeta appends CI array, header and digests, each with its tar header, if there are chunks.
func (w *Writer) appendMeta(tail []byte, info rafs.BlobInfo, entries *toc) []byte {
	s := w.sealed
	if info.ChunkCount == 0 {
		return tail
	}
	h := cctHeader{features: info.Features, codec: info.CICodec, entries: info.ChunkCount, offset: info.CIOffset, stored: info.CIStored, size: info.CISize}
	s.header = h.append(nil)
	tail = append(append(tail, s.ci...), s.header...)
	tail = appendTarHeader(tail, tocMeta, info.CIStored+cctSize)
	*entries = append(*entries,
		tocEntry{name: tocMeta, codec: info.CICodec, digest: s.ciSum, offset: info.CIOffset, stored: info.CIStored, size: info.CISize},
		tocEntry{name: tocHeader, digest: sha256.Sum256(s.header), offset: info.CIOffset + info.CIStored, stored: cctSize, size: cctSize},
		tocEntry{name: tocDigest, digest: sha256.Sum256(s.digests), offset: info.CIOffset + uint64(len(tail)), stored: uint64(len(s.digests)), size: uint64(len(s.digests))})
	return appendTarHeader(append(tail, s.digests...), tocDigest, uint64(len(s.digests)))
}

// appendBootstrap appends the bootstrap, zstd compressed whatever the chunks are, to a tail that starts at offset pos.
func (w *Writer) appendBootstrap(tail []byte, pos uint64, bootstrap []byte, entries *toc) ([]byte, error) {
	c, err := newCompressor(rafs.CodecZstd, rafs.MaxChunkSize)
	if err != nil {
		return nil, err
	}
	e := tocEntry{name: tocBoot, digest: sha256.Sum256(bootstrap), offset: pos + uint64(len(tail)), size: uint64(len(bootstrap))}
	_, stored := c(nil, bootstrap)
	if len(stored) != len(bootstrap) {
		e.codec = rafs.CodecZstd
	}
	e.stored = uint64(len(stored))
	*entries = append(*entries, e)
	return appendTarHeader(append(tail, stored...), tocBoot, e.stored), nil
}

// write writes p through to the output and the digest of the file.
func (w *Writer) write(p []byte) error {
	if _, err := w.out.Write(p); err != nil {
		return fmt.Errorf("write blob: after its chunk data: %w", err)
	}
	if err := w.out.Flush(); err != nil {
		return fmt.Errorf("write blob: after its chunk data: %w", err)
	}
	return nil
}
