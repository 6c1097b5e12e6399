package blob

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"holdfast/rafs"
	"holdfast/rafs/source"
)

const (
	// A blob's metadata is read with one request if at most so many bytes follow the chunk data: a round trip costs more
	// than the bootstrap among them, which is read for nothing.
	oneRequest = 1 << 20
	// What FindMeta reads of a blob's end at first; a TOC takes 1.3 KiB.
	findRequest = 4096
)

// ReadMeta reads the chunk information of the blob that info, from a bootstrap's blob table, describes, with one range
// request or two. It is checked against the TOC, and the TOC against info.TOCDigest unless that is zero. Where the table
// does not say where the chunk information lies, the TOC at the blob's end does, as with [FindMeta].
//
// info.MetaDigest is not looked at: it names the other blob that SEPARATE blobs have their chunk information in, and those
// are refused. Errors name the blob and the offset; those about content wrap [ErrFormat] or [rafs.ErrUnsupported] and are
// permanent in the sense of [source.IsPermanent].
func ReadMeta(ctx context.Context, src source.Source, info rafs.BlobInfo) (*Meta, error) {
	if info.ChunkCount > 0 && info.CISize == 0 && info.TOCSize == 0 {
		return FindMeta(ctx, src, info)
	}
	return read(src, func(w *window) (*Meta, error) {
		if err := checkInfo(&info, w.size); err != nil {
			return nil, err
		}
		if info.ChunkCount == 0 {
			return &Meta{info: info}, nil
		}
		if off := info.CIOffset; off < w.size && w.size-off <= oneRequest {
			if err := w.load(ctx, off, w.size-off); err != nil {
				return nil, err
			}
		}
		var t toc
		if info.TOCSize > 0 {
			var err error
			if t, err = readTOC(ctx, w, uint64(info.TOCSize), info.TOCDigest); err != nil {
				return nil, err
			}
			if err := checkTOC(t, &info); err != nil {
				return nil, err
			}
		}
		return readChunks(ctx, w, info, t)
	})
}

// FindMeta reads the chunk information of a blob of which no more is known than the id, the codec and the digest
// algorithm, which no blob tells: they are taken from known. The rest comes from the TOC at the blob's end, and is as
// trustworthy as the source. Errors are those of [ReadMeta].
func FindMeta(ctx context.Context, src source.Source, known rafs.BlobInfo) (*Meta, error) {
	return read(src, func(w *window) (*Meta, error) {
		n := min(findRequest, w.size)
		if err := w.load(ctx, w.size-n, n); err != nil {
			return nil, err
		}
		size, err := tocSize(ctx, w)
		if err != nil {
			return nil, err
		}
		t, err := readTOC(ctx, w, size, rafs.Digest{})
		if err != nil {
			return nil, err
		}
		info, err := describe(ctx, w, t, known)
		if err != nil {
			return nil, err
		}
		info.TOCSize = uint32(size)
		if err := checkInfo(&info, w.size); err != nil {
			return nil, err
		}
		if info.ChunkCount == 0 {
			return &Meta{info: info}, nil
		}
		return readChunks(ctx, w, info, t)
	})
}

// read calls fn with a window on src, names the blob in its error and marks what no retry can mend.
func read(src source.Source, fn func(*window) (*Meta, error)) (*Meta, error) {
	m, err := fn(&window{src: src, size: uint64(max(0, src.Size()))})
	if err == nil {
		return m, nil
	}
	err = fmt.Errorf("read chunk information of %s: %w", src, err)
	if errors.Is(err, ErrFormat) || errors.Is(err, rafs.ErrUnsupported) {
		err = source.Permanent(err)
	}
	return nil, err
}

// tocSize reads the tar header that ends every blob with a TOC, and returns the TOC's size with it.
func tocSize(ctx context.Context, w *window) (uint64, error) {
	if w.size < rafs.TarHeaderSize {
		return 0, fmt.Errorf("%d bytes are too few for a blob with a table of contents: %w", w.size, ErrFormat)
	}
	h, err := w.bytes(ctx, w.size-rafs.TarHeaderSize, rafs.TarHeaderSize)
	if err != nil {
		return 0, err
	}
	n, err := parseTarHeader(h, tocSelf)
	if err != nil {
		return 0, fmt.Errorf("offset %d: %w", w.size-rafs.TarHeaderSize, err)
	}
	if n > maxTOCSize-rafs.TarHeaderSize {
		return 0, fmt.Errorf("table of contents of %d bytes: %w", n, ErrFormat)
	}
	return n + rafs.TarHeaderSize, nil
}

// readTOC reads the last size bytes of the blob and checks them against digest unless that is zero.
func readTOC(ctx context.Context, w *window, size uint64, digest rafs.Digest) (toc, error) {
	if size > maxTOCSize || size > w.size {
		return nil, fmt.Errorf("table of contents of %d bytes in a blob of %d bytes: %w", size, w.size, ErrFormat)
	}
	off := w.size - size
	b, err := w.bytes(ctx, off, size)
	if err != nil {
		return nil, err
	}
	if got := rafs.Digest(sha256.Sum256(b)); digest != (rafs.Digest{}) && got != digest {
		return nil, fmt.Errorf("table of contents at offset %d: sha256 is %s, the bootstrap says %s: %w", off, got, digest, ErrFormat)
	}
	t, err := parseTOC(b, w.size)
	if err != nil {
		return nil, fmt.Errorf("offset %d: %w", off, err)
	}
	return t, nil
}

// checkTOC compares the TOC with what the blob table says.
func checkTOC(t toc, info *rafs.BlobInfo) error {
	ci := t.find(tocMeta)
	if ci == nil || t.find(tocHeader) == nil {
		return fmt.Errorf("table of contents: no entry %q or %q: %w", tocMeta, tocHeader, ErrFormat)
	}
	if ci.offset != info.CIOffset || ci.stored != info.CIStored || ci.size != info.CISize || ci.codec != info.CICodec {
		return fmt.Errorf("table of contents: %q is %s, %d bytes for %d at offset %d, the bootstrap says %s, %d for %d at %d: %w",
			tocMeta, ci.codec, ci.stored, ci.size, ci.offset, info.CICodec, info.CIStored, info.CISize, info.CIOffset, ErrFormat)
	}
	return nil
}

// describe completes known with what TOC and CCT header say.
func describe(ctx context.Context, w *window, t toc, known rafs.BlobInfo) (rafs.BlobInfo, error) {
	info := rafs.BlobInfo{
		ID: known.ID, ChunkSize: known.ChunkSize, Codec: known.Codec, Digest: known.Digest,
		Features: rafs.FeatureHasTOC | rafs.FeatureCapTarTOC, StoredSize: w.size,
	}
	if t.find(tocBoot) != nil {
		info.Features |= rafs.FeatureInlinedFsMeta
	}
	data := t.find(tocBlob)
	if data != nil {
		info.Features |= rafs.FeatureHasTarHeader
		info.Size = data.size
	}
	ci := t.find(tocMeta)
	if ci == nil { // a blob without chunks
		info.CIOffset = rafs.TarHeaderSize
		return info, nil
	}
	info.CICodec, info.CIOffset, info.CIStored, info.CISize = ci.codec, ci.offset, ci.stored, ci.size
	if err := checkTOC(t, &info); err != nil {
		return info, err
	}
	b, err := w.bytes(ctx, ci.offset+ci.stored, cctSize)
	if err != nil {
		return info, err
	}
	h, err := parseHeader(b)
	if err != nil {
		return info, fmt.Errorf("offset %d: %w", ci.offset+ci.stored, err)
	}
	if err := rafs.CheckFeatures(h.features); err != nil {
		return info, fmt.Errorf("offset %d: %w", ci.offset+ci.stored, err)
	}
	info.ChunkCount = h.entries
	info.Features |= h.features
	if t.find(tocDigest) != nil {
		info.Features |= rafs.FeatureInlinedChunkDigest
	}
	size, err := info.DataSize()
	if err != nil || data == nil || size != data.stored {
		return info, fmt.Errorf("table of contents: chunk data is not what lies before the chunk information at offset %d: %w", ci.offset, ErrFormat)
	}
	return info, nil
}

// readChunks reads CI array, header and digests where info and t (nil: the blob has no TOC) say they are.
func readChunks(ctx context.Context, w *window, info rafs.BlobInfo, t toc) (*Meta, error) {
	want := uint64(info.ChunkCount)
	if info.CIStored > w.size || info.CIStored > want*ciSizeV2+cctSize {
		return nil, fmt.Errorf("chunk information at offset %d: %d bytes stored for %d chunks: %w", info.CIOffset, info.CIStored, want, ErrFormat)
	}
	raw, err := w.bytes(ctx, info.CIOffset, info.CIStored+cctSize)
	if err != nil {
		return nil, err
	}
	h, err := parseHeader(raw[info.CIStored:])
	if err != nil {
		return nil, fmt.Errorf("offset %d: %w", info.CIOffset+info.CIStored, err)
	}
	if err := checkHeader(&h, &info); err != nil {
		return nil, fmt.Errorf("offset %d: %w", info.CIOffset+info.CIStored, err)
	}
	if err := checkDigest(t, tocHeader, raw[info.CIStored:]); err != nil {
		return nil, err
	}
	ci, err := expandCI(raw[:info.CIStored], info)
	if err != nil {
		return nil, fmt.Errorf("chunk information at offset %d: %w: %w", info.CIOffset, ErrFormat, err)
	}
	if err := checkDigest(t, tocMeta, ci); err != nil {
		return nil, err
	}
	digests, err := readDigests(ctx, w, info, t)
	if err != nil {
		return nil, err
	}
	m, err := parseChunks(info, h, ci, digests)
	if err != nil {
		return nil, fmt.Errorf("chunk information at offset %d: %w", info.CIOffset, err)
	}
	return m, nil
}

func expandCI(stored []byte, info rafs.BlobInfo) ([]byte, error) {
	if info.CICodec == rafs.CodecNone {
		if info.CIStored != info.CISize {
			return nil, errLength
		}
		return stored, nil
	}
	d, err := NewDecoder()
	if err != nil {
		return nil, err
	}
	ci := make([]byte, info.CISize)
	if err := d.expand(info.CICodec, stored, ci); err != nil {
		return nil, fmt.Errorf("%s: %w", info.CICodec, err)
	}
	return ci, nil
}

// readDigests reads the inlined digest array, or returns nil if the blob has none.
func readDigests(ctx context.Context, w *window, info rafs.BlobInfo, t toc) ([]byte, error) {
	e := t.find(tocDigest)
	if e == nil {
		return nil, nil
	}
	if e.codec != rafs.CodecNone || e.size != uint64(info.ChunkCount)*uint64(len(rafs.Digest{})) {
		return nil, fmt.Errorf("table of contents: %q is %s, %d bytes, for %d chunks: %w", e.name, e.codec, e.size, info.ChunkCount, ErrFormat)
	}
	b, err := w.bytes(ctx, e.offset, e.stored)
	if err != nil {
		return nil, err
	}
	return b, checkDigest(t, tocDigest, b)
}

// checkDigest compares b with the digest of the TOC's entry called name, if there is a TOC.
func checkDigest(t toc, name string, b []byte) error {
	e := t.find(name)
	if e == nil {
		return nil
	}
	if got := rafs.Digest(sha256.Sum256(b)); got != e.digest {
		return fmt.Errorf("%s at offset %d: sha256 is %s, the table of contents says %s: %w", name, e.offset, got, e.digest, ErrFormat)
	}
	return nil
}

// A window reads ranges of a blob, and remembers the one that was loaded.
type window struct {
	src  source.Source
	size uint64
	off  uint64
	buf  []byte
}

// load reads a range that later calls of bytes are served from.
func (w *window) load(ctx context.Context, off, n uint64) error {
	b, err := w.bytes(ctx, off, n)
	w.off, w.buf = off, b
	return err
}

// bytes returns n bytes at off, which the caller must not change. The caller has bounded n.
func (w *window) bytes(ctx context.Context, off, n uint64) ([]byte, error) {
	if off > w.size || n > w.size-off {
		return nil, fmt.Errorf("range [%d, +%d) is outside the blob's %d bytes: %w", off, n, w.size, ErrFormat)
	}
	if off >= w.off && off-w.off <= uint64(len(w.buf)) && n <= uint64(len(w.buf))-(off-w.off) {
		return w.buf[off-w.off:][:n:n], nil
	}
	if n == 0 {
		return nil, nil
	}
	r, err := w.src.ReadRange(ctx, int64(off), int64(n))
	if err != nil {
		return nil, fmt.Errorf("offset %d: %w", off, err)
	}
	defer r.Close()
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, fmt.Errorf("offset %d, %d bytes: %w", off, n, err)
	}
	return b, nil
}
