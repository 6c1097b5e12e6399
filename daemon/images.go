package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/rafs"
	"holdfast/rafs/image"
	"holdfast/rafs/source"
	"holdfast/state"
)

// imagesDir is where images are saved under the root, in directories named by the hex of their digests.
const imagesDir = "images"

// imageDir is where the image with a digest is saved. The digest is checked: it becomes a path.
func (d *Daemon) imageDir(digest string) (string, error) {
	hexa, ok := strings.CutPrefix(digest, "sha256:")
	if b, err := hex.DecodeString(hexa); !ok || err != nil || len(b) != sha256.Size {
		return "", fmt.Errorf("image digest %q is not sha256:<64 hex digits>", digest)
	}
	return filepath.Join(d.opt.Root, imagesDir, hexa), nil
}

// save keeps all of an image but its blobs' data, so that it can be served without asking where it came from. What is
// saved of the same image already is replaced: its blobs may have moved. The bootstrap need not stay in memory after.
func (d *Daemon) save(i *image.Image) (dir string, err error) {
	if dir, err = d.imageDir(i.Digest); err != nil {
		return "", err
	}
	d.saving.Lock()
	defer d.saving.Unlock()
	if err := i.Save(dir); err != nil {
		return "", err
	}
	i.Bootstrap = nil
	return dir, nil
}

// A bootstrap is a saved image's metadata as a cache object: engines that are asked for metadata fill it like any other.
type bootstrap struct {
	path   string
	sum    string // SHA-256 of the file, in hex
	table  *rafs.Table
	source source.Source
}

// openBootstrap reads the bootstrap saved in an image's directory and makes a chunk table of it.
func openBootstrap(dir string) (*bootstrap, error) {
	path := image.BootstrapPath(dir)
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open the saved bootstrap: %w", err)
	}
	defer f.Close()
	var rows []rafs.Chunk
	var size uint64
	whole := sha256.New()
	p := getBuffer(rafs.DefaultChunkSize)
	defer p.free()
	for {
		n, err := io.ReadFull(f, p.b)
		if n > 0 {
			whole.Write(p.b[:n])
			rows = append(rows, rafs.Chunk{Offset: size, BlobOffset: size, Size: uint32(n), Stored: uint32(n), Digest: rafs.Blake3.Sum(p.b[:n])})
			size += uint64(n)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("read the saved bootstrap %s: %w", path, err)
		}
	}
	table, err := rafs.NewTable(rows, size, size, rafs.Blake3)
	if err != nil {
		return nil, fmt.Errorf("bootstrap %s: %w", path, err)
	}
	return &bootstrap{path: path, sum: hex.EncodeToString(whole.Sum(nil)), table: table, source: source.NewFile(path, int64(size))}, nil
}

// imageSize is the size of an image's objects, in bytes.
func imageSize(i *image.Image) (n int64) {
	for _, b := range i.Blobs {
		n += int64(b.Table.Size())
	}
	return n
}

// restore takes up the mounts on record, before any request is read. One that is not seen here is let go if nothing
// uses it, and lingers if something does, in another mount namespace perhaps; those of another boot are gone for certain. One whose image cannot be loaded stays on record and gets errors until that is mended and the daemon
// restarted: dropping it would leave a mount that nobody knows of.
func (d *Daemon) restore(ctx context.Context) error {
	records, err := d.state.Mounts()
	if err != nil {
		return err
	}
	points, err := d.mountPoints()
	if err != nil {
		return err
	}
	for _, r := range records {
		m := &mount{record: r}
		if points[r.Dir] != fsType {
			d.log.Warn("mount on record is not here", zap.String("image", r.Ref), zap.String("dir", r.Dir), zap.String("found", points[r.Dir]))
			if err := d.restoreGone(ctx, m); err != nil {
				return err
			}
			continue
		}
		if err := d.mounts.reserve(m); err != nil {
			return err
		}
		if err := d.resume(ctx, m); err != nil {
			m.broken = err.Error()
			d.log.Error("mount on record cannot be served", zap.String("image", r.Ref), zap.String("dir", r.Dir), zap.Error(err))
		}
		d.mounts.give(m)
		if m.broken == "" {
			d.startPrefetch(m)
		}
	}
	return ctx.Err()
}

// restoreGone takes up a mount that is not seen in this mount namespace, and lets it go if it is nowhere else either.
func (d *Daemon) restoreGone(ctx context.Context, m *mount) error {
	if m.record.Boot != d.boot {
		return d.state.ForgetMount(m.record.ID)
	}
	if err := d.resume(ctx, m); err != nil {
		what := fmt.Sprintf("image %s was mounted on %s; whether it still is elsewhere cannot be told, and it is dropped from the record: %v", m.record.Ref, m.record.Dir, err)
		d.log.Error("mount on record cannot be loaded", zap.String("what", what))
		d.damaged = append(d.damaged, what)
		if err := context.Cause(ctx); err != nil {
			return err
		}
		return d.state.ForgetMount(m.record.ID)
	}
	return d.part(m, d.letGo(m))
}

// fsType is what every mount of holdfast's is.
const fsType = "erofs"

// resume loads a mounted image from where it was saved and makes its objects ready.
func (d *Daemon) resume(ctx context.Context, m *mount) (err error) {
	dir, err := d.imageDir(m.record.Image)
	if err != nil {
		return err
	}
	boot, err := openBootstrap(dir)
	if err != nil {
		return err
	}
	if boot.sum != m.record.Bootstrap {
		return fmt.Errorf("bootstrap %s is not the one that was mounted: its SHA-256 is %s, on record is %s: unmount the image and mount it again", boot.path, boot.sum, m.record.Bootstrap)
	}
	if m.image, err = image.Load(dir, d.opt.Image); err != nil {
		return err
	}
	m.image.Bootstrap = nil
	if err := d.holdAll(ctx, m, boot); err != nil {
		err = errors.Join(err, d.letGo(m), m.image.Close())
		m.image, m.bootstrap, m.blobs = nil, nil, nil
		return err
	}
	return nil
}

// images describes the images on record.
func (d *Daemon) images() ([]ImageInfo, error) {
	records, err := d.state.Images()
	if err != nil {
		return nil, err
	}
	mounts := d.mounts.list()
	list := make([]ImageInfo, 0, len(records))
	for _, r := range records {
		list = append(list, imageInfo(r, mounts))
	}
	return list, nil
}

func imageInfo(r state.Image, mounts []*mount) ImageInfo {
	i := ImageInfo{Digest: r.Digest, Ref: r.Ref, Size: r.Size, Created: r.Created, Mounts: []string{}}
	seen := map[fscache.Key]bool{}
	for _, m := range mounts {
		if m.record.Image != r.Digest {
			continue
		}
		i.Mounts = append(i.Mounts, m.record.Dir)
		for _, h := range m.blobs {
			if !seen[h.o.key] {
				seen[h.o.key] = true
				present, _ := h.o.presentBytes()
				i.Present += present
			}
		}
	}
	return i
}
