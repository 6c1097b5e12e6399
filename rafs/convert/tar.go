package convert

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"

	"holdfast/rafs/tree"
)

// paxXattr starts the PAX records that hold extended attributes, as star, GNU tar, bsdtar and container tools write them.
const paxXattr = "SCHILY.xattr."

// tarBlock is the unit of tars, in bytes.
const tarBlock = 512

// readTar reads a layer from an uncompressed tar, which may be empty, to its end.
func (r *layerReader) readTar(ctx context.Context, in io.Reader) error {
	pos := &counter{ctx: ctx, r: in}
	tr := tar.NewReader(pos)
	for {
		at := pos.n
		h, err := tr.Next()
		if err == io.EOF && pos.n%tarBlock == 0 {
			break
		}
		if err == io.EOF { // the package takes a file cut inside padding for complete
			err = io.ErrUnexpectedEOF
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) { // such paths are judged by cleanPath
			return fmt.Errorf("header between offsets %d and %d of the uncompressed tar: %w", at, pos.n, readError(err))
		}
		if err := r.tarEntry(ctx, h, tr); err != nil {
			return fmt.Errorf("entry %.256q before offset %d of the uncompressed tar: %w", h.Name, pos.n, readError(err))
		}
	}
	// What follows the end mark is no part of the archive, but of the blob and its digest.
	if _, err := io.Copy(io.Discard, pos); err != nil {
		return fmt.Errorf("after the end of the tar: %w", readError(err))
	}
	return nil
}

// readError explains what the tar package says of a file that ends early.
func readError(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: the tar ends here: is the file complete?", err)
	}
	return err
}

func (r *layerReader) tarEntry(ctx context.Context, h *tar.Header, tr io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	p, err := cleanPath(h.Name)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeLink {
		target, err := cleanPath(h.Linkname)
		if err != nil {
			return fmt.Errorf("target %.256q: %w", h.Linkname, err)
		}
		return r.layer.link(p, target)
	}
	in, err := tarInode(h)
	if err != nil {
		return err
	}
	if err := r.tarXattrs(in, h.PAXRecords); err != nil {
		return err
	}
	if in.IsFile() {
		if err := r.tarFile(ctx, in, h, tr); err != nil {
			return err
		}
	}
	return r.layer.put(p, in)
}

// maxSparse bounds the sum of the sizes of a layer's sparse files, in bytes. The tar package gives their holes as zeros, so
// that a kilobyte of tar costs the time it takes to read that many.
const maxSparse = 4 << 40

// tarFile reads the content of a regular file.
func (r *layerReader) tarFile(ctx context.Context, in *tree.Inode, h *tar.Header, tr io.Reader) error {
	if isSparse(h) {
		if uint64(h.Size) > r.sparse {
			return fmt.Errorf("its size is %d bytes, and the layer's sparse files may have %d together", h.Size, uint64(maxSparse))
		}
		r.sparse -= uint64(h.Size)
	}
	return r.chunks.add(ctx, in, uint64(h.Size), func(b []byte, _ uint64) error {
		_, err := io.ReadFull(tr, b)
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	})
}

// isSparse reports whether the entry is a sparse file in one of GNU tar's formats.
func isSparse(h *tar.Header) bool {
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return h.Typeflag == tar.TypeGNUSparse
}

// tarInode returns the inode that a header describes, without attributes and content.
func tarInode(h *tar.Header) (*tree.Inode, error) {
	if h.Uid < 0 || h.Gid < 0 || h.Uid > math.MaxUint32 || h.Gid > math.MaxUint32 {
		return nil, fmt.Errorf("owner %d:%d: want 32 bit numbers", h.Uid, h.Gid)
	}
	in := &tree.Inode{
		Mode: uint32(h.Mode) & 0o7777, UID: uint32(h.Uid), GID: uint32(h.Gid),
		Mtime: h.ModTime.Unix(), MtimeNsec: uint32(h.ModTime.Nanosecond()),
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		in.Mode |= tree.ModeFile
	case tar.TypeDir:
		in.Mode |= tree.ModeDir
	case tar.TypeSymlink:
		in.Mode |= tree.ModeLink
		in.Target = h.Linkname
	case tar.TypeFifo:
		in.Mode |= tree.ModeFifo
	case tar.TypeChar, tar.TypeBlock:
		in.Mode |= tree.ModeChar
		if h.Typeflag == tar.TypeBlock {
			in.Mode ^= tree.ModeChar ^ tree.ModeBlock
		}
		if h.Devmajor < 0 || h.Devminor < 0 || h.Devmajor > math.MaxUint32 || h.Devminor > math.MaxUint32 {
			return nil, fmt.Errorf("device number %d:%d: want 32 bit numbers", h.Devmajor, h.Devminor)
		}
		in.Major, in.Minor = uint32(h.Devmajor), uint32(h.Devminor)
	default:
		return nil, fmt.Errorf("entry of type %q: only files, directories, links, device nodes and fifos can be in an image", h.Typeflag)
	}
	return in, nil
}

func (r *layerReader) tarXattrs(in *tree.Inode, pax map[string]string) error {
	for k, v := range pax {
		name, ok := strings.CutPrefix(k, paxXattr)
		if !ok {
			continue
		}
		if err := r.setXattr(in, name, []byte(v)); err != nil {
			return err
		}
	}
	return nil
}

// setXattr gives in an attribute. Name spaces that EROFS cannot hold (those of other systems, and of NFS and the like) are
// left out and counted.
func (r *layerReader) setXattr(in *tree.Inode, name string, value []byte) error {
	switch {
	case strings.HasPrefix(name, "user."), strings.HasPrefix(name, "trusted."), strings.HasPrefix(name, "security."),
		name == "system.posix_acl_access", name == "system.posix_acl_default":
	default:
		r.skippedXattrs++
		return nil
	}
	in.SetXattr(name, value)
	return r.layer.account(entryMemory/8 + len(name) + len(value))
}

// A counter counts the bytes read through it, until its context is cancelled.
type counter struct {
	ctx context.Context // of the one call that this reader serves
	r   io.Reader
	n   int64
}

func (c *counter) Read(p []byte) (int, error) {
	if err := context.Cause(c.ctx); err != nil {
		return 0, err
	}
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}
