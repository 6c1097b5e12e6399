package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"holdfast/fscache"
	"holdfast/fscache/plain"
	"holdfast/rafs/image"
	"holdfast/state"
)

// CacheDir is where a daemon with the given root has the cache of an engine.
func CacheDir(root, engine string) string { return filepath.Join(root, "cache", engine) }

// An OfflineRequest says what to mount without a daemon.
type OfflineRequest struct {
	Root     string                  // of the daemon that brought the image in
	Release  string                  // this program's
	Image    string                  // reference with absolute paths, as it was mounted or prefetched with, or digest
	Dir      string                  // absolute, clean, exists
	Domain   string                  // "": the one that has most of the image
	Progress func(done, total int64) // bytes checked by digest; called from one goroutine at a time; may be nil
}

// An OfflineMount is an image that was mounted without a daemon.
type OfflineMount struct {
	Image   string `json:"image"` // digest
	Ref     string `json:"ref"`
	Dir     string `json:"dir"`
	Domain  string `json:"domain"`
	Checked int64  `json:"checked"` // bytes that were checked by digest, because nothing on record vouches for them
}

// An IncompleteError says that an image cannot be mounted without a daemon, for it would have holes or wrong bytes.
type IncompleteError struct {
	Ref     string
	Missing int64 // bytes that are not in the cache
	Damaged int64 // bytes of chunks that are in the cache, and whose digest is not theirs
	Size    int64 // of the image's data, in bytes
}

func (e *IncompleteError) Error() string {
	return fmt.Sprintf("image %s is not complete in the cache: of its %d bytes %d are missing and %d damaged: bring them in with the daemon "+
		"(holdfast mount, then holdfast prefetch --wait)", e.Ref, e.Size, e.Missing, e.Damaged)
}

// MountOffline mounts an image that is complete in the cache, with no daemon and no network: its saved bootstrap, and its cache files as
// they are. No byte of it is taken on trust (I1, I5): each file has no holes, and its bytes were written in this boot through the same chunk table, or were
// found right and synced and have not been touched since (plain.File.Stamp), or are checked by digest here. An *IncompleteError says that this is
// not so.
//
// ORDER: on record (state.StageOffline) before anything is looked at, so that a daemon which begins meanwhile changes nothing of what was
// looked at; mounted last. The record goes with the boot, or with Umount of the daemon or UmountOffline.
func MountOffline(ctx context.Context, r OfflineRequest) (OfflineMount, error) {
	m, err := mountOffline(ctx, r)
	if err != nil {
		return m, fmt.Errorf("mount %s on %s without a daemon: %w", r.Image, r.Dir, err)
	}
	return m, nil
}

func mountOffline(ctx context.Context, r OfflineRequest) (m OfflineMount, err error) {
	if err := plain.CheckMountPoint(r.Dir); err != nil {
		return m, err
	}
	on, err := readOffline(r)
	if err != nil {
		return m, err
	}
	img, err := image.Load(on.dir, image.Options{})
	if err != nil {
		return m, err
	}
	defer img.Close()
	if r.Domain, err = chooseDomain(r, on, img); err != nil {
		return m, err
	}
	record := state.Mount{
		ID: newMountID(), Image: on.image.Digest, Ref: on.image.Ref, Dir: r.Dir, Domain: r.Domain,
		Bootstrap: strings.TrimPrefix(img.Sum, "sha256:"), Boot: on.boot, Created: time.Now().UTC(), Stage: state.StageOffline,
	}
	if err := withState(r.Root, r.Release, func(db *state.DB) error { return db.RecordOffline(record) }); err != nil {
		return m, err
	}
	defer func() {
		if err != nil { // if a daemon has begun meanwhile, it keeps a record of nothing until the boot ends
			err = errors.Join(err, withState(r.Root, r.Release, func(db *state.DB) error { return db.ForgetMount(record.ID) }))
		}
	}()
	c, err := openCache(r.Root, r.Domain, on, img)
	if err != nil {
		return m, err
	}
	defer c.close()
	if err := c.settle(ctx, r.Progress); err != nil {
		return m, err
	}
	if err := withState(r.Root, r.Release, c.record); err != nil {
		return m, err
	}
	if err := plain.Mount(image.BootstrapPath(on.dir), c.paths(), r.Dir); err != nil {
		return m, err
	}
	return OfflineMount{Image: img.Digest, Ref: record.Ref, Dir: r.Dir, Domain: r.Domain, Checked: c.checked}, nil
}

// withState opens the state for a moment.
func withState(root, release string, f func(*state.DB) error) error {
	db, _, err := state.Open(filepath.Join(root, "state.db"), release)
	if err != nil {
		return daemonRuns(err)
	}
	return errors.Join(f(db), db.Close())
}

// daemonRuns says what to do where the state is locked.
func daemonRuns(err error) error {
	if errors.Is(err, state.ErrLocked) {
		return fmt.Errorf("a daemon runs with this root: mount through it, with holdfast mount and without --offline: %w", err)
	}
	return err
}

// An onRecord is what state.db says of an image to be mounted offline.
type onRecord struct {
	image   state.Image
	dir     string // where it is saved
	objects map[fscache.Key]state.Object
	mounts  []state.Mount
	boot    string // this one's id
}

func readOffline(r OfflineRequest) (on onRecord, err error) {
	e, err := state.ReadState(filepath.Join(r.Root, "state.db"))
	switch {
	case errors.Is(err, os.ErrNotExist):
		return on, fmt.Errorf("nothing is on record under %s: give the --root of the daemon that had the image mounted", r.Root)
	case err != nil:
		return on, daemonRuns(err)
	}
	i, err := recordedImage(e, r.Image)
	if err != nil {
		return on, err
	}
	if i.Removing {
		return on, fmt.Errorf("image %s is being removed: mount it through the daemon, which brings it in again", i.Ref)
	}
	on.image = i
	if on.dir, err = ImageDir(r.Root, i.Digest); err != nil {
		return on, err
	}
	on.mounts = e.Mounts
	on.objects = map[fscache.Key]state.Object{}
	for _, o := range e.Objects {
		on.objects[fscache.Key{Domain: o.Domain, ID: o.ID}] = o
	}
	on.boot, err = state.BootID()
	return on, err
}

// chooseDomain returns the domain that was asked for, or else the one in whose cache most of the image is, of those that it is on record in.
func chooseDomain(r OfflineRequest, on onRecord, img *image.Image) (best string, err error) {
	if r.Domain != "" {
		return r.Domain, checkDomain(r.Domain)
	}
	domains := map[string]bool{}
	for _, m := range on.mounts {
		if m.Image == img.Digest {
			domains[m.Domain] = true
		}
	}
	for k := range on.objects {
		for _, b := range img.Blobs {
			if k.ID == b.Info.ID {
				domains[k.Domain] = true
			}
		}
	}
	missing := int64(math.MaxInt64)
	for _, domain := range slices.Sorted(maps.Keys(domains)) {
		c, err := openCache(r.Root, domain, on, img)
		if err != nil {
			return "", err
		}
		c.close()
		if c.missing < missing {
			best, missing = domain, c.missing
		}
	}
	if best == "" {
		return "", errors.New("nothing on record says in which domain it was mounted: give it with --domain")
	}
	return best, nil
}

// recordedImage finds the image with a digest, or the one that had a reference last.
func recordedImage(e state.StateExport, name string) (found state.Image, err error) {
	byDigest := map[string]state.Image{}
	for _, i := range e.Images {
		byDigest[i.Digest] = i
		if i.Digest == name || i.Ref == name && i.Created.After(found.Created) {
			found = i
		}
	}
	for _, m := range e.Mounts {
		if i, ok := byDigest[m.Image]; ok && m.Ref == name && m.Created.After(found.Created) {
			found, found.Ref, found.Created = i, m.Ref, m.Created
		}
	}
	if found.Digest == "" {
		var known []string
		for _, i := range e.Images {
			known = append(known, i.Ref+" ("+i.Digest+")")
		}
		return found, fmt.Errorf("no image of this name is on record; there are: %s", cmp.Or(strings.Join(known, ", "), "none"))
	}
	return found, nil
}

// UmountOffline unmounts what MountOffline mounted, while no daemon runs. It reports whether dir is on record as such a mount.
func UmountOffline(root, release, dir string) (bool, error) {
	e, err := state.ReadState(filepath.Join(root, "state.db"))
	if err != nil {
		return false, err
	}
	boot, err := state.BootID()
	if err != nil {
		return false, err
	}
	found := offlineMounts(e.Mounts, boot, dir)
	if len(found) == 0 {
		return false, nil
	}
	if err := umountIfThere(dir, plain.Unmount); err != nil {
		return true, err
	}
	return true, withState(root, release, func(db *state.DB) error { return forgetAll(db, found) })
}

// offlineMounts are the mounts on record that were made without a daemon in this boot: on dir, or all if it is "".
func offlineMounts(records []state.Mount, boot, dir string) (found []state.Mount) {
	for _, m := range records {
		if m.Stage == state.StageOffline && m.Boot == boot && (dir == "" || m.Dir == dir) {
			found = append(found, m)
		}
	}
	return found
}

// umountIfThere unmounts dir unless somebody else has.
func umountIfThere(dir string, unmount func(string) error) error {
	points, err := mountPoints()
	if err != nil {
		return err
	}
	if points[dir] != fsType {
		return nil
	}
	return unmount(dir)
}

func forgetAll(db *state.DB, records []state.Mount) (err error) {
	for _, m := range records {
		err = errors.Join(err, db.ForgetMount(m.ID))
	}
	return err
}

// unmountOffline is UmountOffline while this daemon runs.
func (d *Daemon) unmountOffline(ctx context.Context, dir string) (bool, error) {
	records, err := d.state.Mounts()
	if err != nil {
		return false, err
	}
	found := offlineMounts(records, d.boot, dir)
	if len(found) == 0 {
		return false, nil
	}
	err = umountIfThere(dir, func(dir string) error { return d.engine.Unmount(ctx, dir) })
	if err != nil {
		return true, unmountFailed(err)
	}
	return true, forgetAll(d.state, found)
}

// usedOffline says where an image is mounted that was mounted without a daemon and has an object's cache file as a device; "" if none
// is. Such a file is not to be written to, punched or truncated: its readers would get what that leaves.
func (d *Daemon) usedOffline(k fscache.Key) (string, error) {
	records, err := d.state.Mounts()
	if err != nil {
		return "", err
	}
	for _, m := range offlineMounts(records, d.boot, "") {
		if m.Domain != k.Domain {
			continue
		}
		dir, err := d.imageDir(m.Image)
		if err != nil {
			return "", err
		}
		img, err := image.Load(dir, d.opt.Image)
		if err != nil {
			return m.Dir, nil // what it uses cannot be told: nothing of its domain is touched
		}
		img.Close() // nothing was opened
		for _, b := range img.Blobs {
			if b.Info.ID == k.ID {
				return m.Dir, nil
			}
		}
	}
	return "", nil
}
