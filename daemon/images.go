package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"holdfast/fscache"
	"holdfast/fscache/plain"
	"holdfast/rafs"
	"holdfast/rafs/image"
	"holdfast/rafs/source"
	"holdfast/state"
	"holdfast/state/crash"
)

// imagesDir is where images are saved under the root, in directories named by the hex of their digests.
const imagesDir = "images"

// imageDir is where the image with a digest is saved. The digest is checked: it becomes a path.
func (d *Daemon) imageDir(digest string) (string, error) { return ImageDir(d.opt.Root, digest) }

// ImageDir is where a daemon with the given root saves the image with a digest, for image.Load.
func ImageDir(root, digest string) (string, error) {
	hexa, ok := strings.CutPrefix(digest, "sha256:")
	if b, err := hex.DecodeString(hexa); !ok || err != nil || len(b) != sha256.Size {
		return "", fmt.Errorf("image digest %q is not sha256:<64 hex digits>", digest)
	}
	return filepath.Join(root, imagesDir, hexa), nil
}

// A bootstrap is a saved image's metadata. Engines that are asked for it fill it like any other cache object.
type bootstrap struct {
	path   string
	sum    string        // SHA-256 of the file, in hex
	table  *rafs.Table   // nil where the engine is not asked
	source source.Source // as table
}

// bootstrapOf describes the bootstrap of an image that is saved in dir, which need not stay in memory after.
func (d *Daemon) bootstrapOf(dir string, i *image.Image) (*bootstrap, error) {
	b := &bootstrap{path: image.BootstrapPath(dir), sum: strings.TrimPrefix(i.Sum, "sha256:")}
	content := i.Bootstrap
	i.Bootstrap = nil
	if !d.engine.AsksForBootstrap() {
		return b, nil
	}
	var rows []rafs.Chunk
	for at := 0; at < len(content); at += rafs.DefaultChunkSize {
		p := content[at:min(at+rafs.DefaultChunkSize, len(content))]
		n := uint32(len(p))
		rows = append(rows, rafs.Chunk{Offset: uint64(at), BlobOffset: uint64(at), Size: n, Stored: n, Digest: rafs.Blake3.Sum(p)})
	}
	size := uint64(len(content))
	var err error
	if b.table, err = rafs.NewTable(rows, size, size, rafs.Blake3); err != nil {
		return nil, fmt.Errorf("bootstrap %s: %w", b.path, err)
	}
	b.source = source.NewFile(b.path, int64(size))
	return b, nil
}

// imageSize is the size of an image's objects, in bytes.
func imageSize(i *image.Image) (n int64) {
	for _, b := range i.Blobs {
		n += int64(b.Table.Size())
	}
	return n
}

// restore takes up the mounts on record, before any request is read. One that is not seen here is let go if nothing
// uses it, and lingers if something does, in another mount namespace perhaps; those of another boot are for remount. One whose image cannot be
// loaded stays on record and gets errors until that is mended and the daemon
// restarted: dropping it would leave a mount that nobody knows of.
func (d *Daemon) restore(ctx context.Context) error {
	here, gone, err := d.sortMounts(ctx)
	if err != nil {
		return err
	}
	if d.opt.Bereft && d.opt.Session != nil {
		if err := d.opt.Session.SetBereft(false); err != nil {
			return err
		}
	}
	// After what was abandoned, which must not be known to the engine by then. Readers wait until all are taken up: every processor loads some.
	g, loading := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, m := range here {
		g.Go(func() error { return d.takeUp(loading, m) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	// After what is here: what that uses too is not in use elsewhere for it.
	for _, m := range gone {
		if err := d.restoreGone(ctx, m); err != nil {
			return err
		}
	}
	return nil
}

// sortMounts says which of the mounts on record are seen here, by directory, and which are not. It is done with those that nobody can serve or needs
// to, and those of another boot are for remount.
func (d *Daemon) sortMounts(ctx context.Context) (here map[string]*mount, gone []*mount, err error) {
	records, err := d.state.Mounts()
	if err != nil {
		return nil, nil, err
	}
	points, err := d.mountPoints()
	if err != nil {
		return nil, nil, err
	}
	here = map[string]*mount{}
	offline := map[string]time.Time{} // what is on a directory is such a mount, not one that was there before it
	for _, r := range offlineMounts(records, d.boot, "") {
		offline[r.Dir] = r.Created
	}
	for _, r := range records {
		crash.Point("daemon.restore.before-mount")
		m := &mount{record: r}
		there := points[r.Dir] == fsType && !offline[r.Dir].After(r.Created)
		switch {
		case r.Boot != d.boot && (r.Stage == state.StageLinger || r.Stage == state.StageOffline): // what used it went with the boot
			err = d.state.ForgetMount(r.ID)
		case r.Stage == state.StageOffline: // nobody asks a daemon for anything of it
		case r.Boot != d.boot, r.Stage == state.StageAgain && !there:
			d.earlier = append(d.earlier, r)
		case d.opt.Bereft && !d.needsNobody(m):
			err = d.abandon(ctx, m, there)
		case r.Stage == state.StageLinger: // what is there now is another
			gone = append(gone, m)
		case !there:
			d.log.Warn("mount on record is not here", zap.String("image", r.Ref), zap.String("dir", r.Dir), zap.String("found", points[r.Dir]))
			gone = append(gone, m)
		default:
			if old := here[r.Dir]; old != nil { // only one of two on one directory can be the one that is seen
				if old.record.Created.After(r.Created) {
					old, m = m, old
				}
				gone = append(gone, old)
			}
			here[r.Dir] = m
		}
		if err != nil {
			return nil, nil, err
		}
	}
	return here, gone, nil
}

// takeUp serves a mount on record that is there.
func (d *Daemon) takeUp(ctx context.Context, m *mount) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if err := d.mounts.reserve(m); err != nil {
		return err
	}
	if err := d.stage(m, ""); err != nil {
		return err
	}
	if _, err := d.load(ctx, m); err != nil {
		m.broken = err.Error()
		d.log.Error("mount on record cannot be served", zap.String("image", m.record.Ref), zap.String("dir", m.record.Dir), zap.Error(err))
	}
	d.mounts.give(m)
	if m.broken == "" {
		d.startPrefetch(m)
	}
	return nil
}

// needsNobody reports whether all of a mount was in the cache for certain before its lifeline went, so that its readers got, and get, the right bytes
// without it. Whatever of a mount was missing then is missing still: nobody could write it.
func (d *Daemon) needsNobody(m *mount) bool {
	l, err := d.loaded(m.record.Image)
	if err != nil || d.engine.AsksForBootstrap() {
		return false
	}
	on := onRecord{boot: d.boot, objects: map[fscache.Key]state.Object{}}
	for _, b := range l.image.Blobs {
		k := fscache.Key{Domain: m.record.Domain, ID: b.Info.ID}
		if on.objects[k], err = d.state.Object(k.Domain, k.ID); err != nil {
			return false
		}
	}
	for _, kind := range plain.Kinds {
		if kind.Engine != d.engine.Name() {
			continue
		}
		c, err := openKind(kind, d.opt.Root, m.record.Domain, on, l.image)
		if err != nil {
			return false
		}
		defer c.close()
		return c.written()
	}
	return false
}

// abandon ends a mount with something missing whose lifeline is gone, which nobody can serve any more (I1): the engine makes it unreadable. What is
// not there may be used elsewhere; its directory is another's.
func (d *Daemon) abandon(ctx context.Context, m *mount, there bool) error {
	what := fmt.Sprintf("image %s on %s was mounted under a descriptor that nobody holds any more: ", m.record.Ref, m.record.Dir)
	lost := fscache.Mount{}
	if there {
		lost.Dir = m.record.Dir
		what += "it cannot be read, and is unmounted; end what uses it and mount it again"
	} else {
		what += "it is not there; what uses it elsewhere, if anything does, gets errors"
	}
	if l, err := d.loaded(m.record.Image); err != nil {
		what += "; its image cannot be loaded: " + err.Error()
	} else {
		for _, b := range l.image.Blobs {
			lost.Blobs = append(lost.Blobs, fscache.Object{Key: fscache.Key{Domain: m.record.Domain, ID: b.Info.ID}, Size: int64(b.Table.Size())})
		}
	}
	if err := d.engine.Abandon(ctx, lost); err != nil {
		what += "; that failed: " + err.Error()
	}
	d.log.Error("mount lost its lifeline", zap.String("what", what))
	d.lost = append(d.lost, what)
	return d.state.ForgetMount(m.record.ID)
}

// restoreGone takes up a mount that is not seen in this mount namespace, and lets it go if it is nowhere else either.
func (d *Daemon) restoreGone(ctx context.Context, m *mount) error {
	if _, err := d.load(ctx, m); err != nil {
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

// stage puts it on record how far a mount is.
func (d *Daemon) stage(m *mount, s state.Stage) error {
	if m.record.Stage == s {
		return nil
	}
	m.record.Stage = s
	return d.state.UpdateMount(m.asRecorded())
}

// fsType is what every mount of holdfast's is.
const fsType = "erofs"

// A shelf has the images that were loaded since the daemon began: one that is mounted many times is read and checked once. It is emptied when
// the mounts on record have been taken up.
type shelf struct {
	mu   sync.Mutex
	load map[string]func() (loaded, error) // by digest
}

// A loaded image is as it was saved.
type loaded struct {
	image *image.Image
	boot  *bootstrap
}

// loaded loads an image, or finds it on the shelf.
func (d *Daemon) loaded(digest string) (loaded, error) {
	d.shelf.mu.Lock()
	load := d.shelf.load[digest]
	if load == nil {
		load = sync.OnceValues(func() (l loaded, err error) {
			dir, err := d.imageDir(digest)
			if err != nil {
				return l, err
			}
			if l.image, err = image.Load(dir, d.opt.Image); err != nil {
				return l, err
			}
			l.boot, err = d.bootstrapOf(dir, l.image)
			return l, errors.Join(err, l.image.Close()) // nobody reads its blobs through it
		})
		d.shelf.load[digest] = load
	}
	d.shelf.mu.Unlock()
	return load()
}

// clear empties the shelf.
func (s *shelf) clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.load)
}

// load loads a mounted image from where it was saved and makes its objects ready.
func (d *Daemon) load(ctx context.Context, m *mount) (*bootstrap, error) {
	l, err := d.loaded(m.record.Image)
	if err != nil {
		return nil, err
	}
	if m.image, err = l.image.At(m.record.Ref, d.opt.Image); err != nil {
		return nil, err
	}
	if l.boot.sum != m.record.Bootstrap {
		return nil, d.back(m, fmt.Errorf("bootstrap %s is not the one that was mounted: its SHA-256 is %s, on record is %s: unmount the image and mount it again",
			l.boot.path, l.boot.sum, m.record.Bootstrap))
	}
	if err := d.holdAll(ctx, m, l.boot); err != nil {
		return nil, d.back(m, err)
	}
	return l.boot, nil
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
	i := ImageInfo{Digest: r.Digest, Ref: r.Ref, Size: r.Size, Created: r.Created, Domains: r.Domains, Mounts: []string{}}
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
