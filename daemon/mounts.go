package daemon

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/rafs/image"
	"holdfast/state"
)

// mounts is the table of mounted images, and of directories something is being done to.
type mounts struct {
	mu    sync.Mutex
	byDir map[string]*mount

	// lingering are mounts that were unmounted here and are still used elsewhere: containers have mount namespaces of
	// their own. They are served until that ends, which is looked for whenever something is mounted or unmounted.
	lingering []*mount
	parting   sync.Mutex // one at a time looks through what lingers; taken before mu
}

// A mount is an image that is mounted, or being mounted or unmounted.
type mount struct {
	record state.Mount
	ready  bool   // guarded by mounts.mu: mounted, and nobody mounts or unmounts it
	broken string // why it cannot be served, for one on record whose image cannot be loaded

	image     *image.Image
	bootstrap *hold
	blobs     []*hold // by index of image.Blobs
	kept      []*hold // what the kernel still used when the mount was let go
	gate      gate
	prefetch  prefetching
	hurried   atomic.Bool // somebody has asked for all of it, as fast as it comes: more than the record it was mounted with says
}

// asRecorded is what is to be on record about m.
func (m *mount) asRecorded() state.Mount {
	r := m.record
	if m.hurried.Load() {
		r.Prefetch, r.PrefetchBPS = true, 0
	}
	return r
}

func newMounts() *mounts { return &mounts{byDir: map[string]*mount{}} }

// reserve takes dir for a mount to be made.
func (t *mounts) reserve(m *mount) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if old := t.byDir[m.record.Dir]; old != nil {
		what := "another mount is being made or unmade there"
		if old.ready {
			what = "image " + old.record.Ref + " is mounted there"
		}
		return conflict("unmount it first, or choose another directory", "mount on %s: %s", m.record.Dir, what)
	}
	t.byDir[m.record.Dir] = m
	return nil
}

// take returns the mount on dir for its unmounting; give gives it back.
func (t *mounts) take(dir string) (*mount, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	m := t.byDir[dir]
	switch {
	case m == nil:
		return nil, notFound("holdfast umount takes the directory as it was given to mount; see holdfast status", "no image of this daemon is mounted on %s", dir)
	case !m.ready:
		return nil, conflict("try again later", "%s is being mounted or unmounted", dir)
	}
	m.ready = false
	return m, nil
}

func (t *mounts) give(m *mount) {
	t.mu.Lock()
	defer t.mu.Unlock()
	m.ready = true
}

func (t *mounts) drop(m *mount) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.byDir, m.record.Dir)
}

// list returns the mounts that are ready, by directory.
func (t *mounts) list() []*mount {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []*mount
	for _, m := range t.byDir {
		if m.ready {
			all = append(all, m)
		}
	}
	slices.SortFunc(all, func(a, b *mount) int { return cmp.Compare(a.record.Dir, b.record.Dir) })
	return all
}

// every describes all mounts that are ready or linger, for a successor.
func (t *mounts) every() (all []mountRecord) {
	for _, m := range t.list() {
		all = append(all, mountRecord{Mount: m.asRecorded(), Broken: m.broken})
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, m := range t.lingering {
		if m.record.ID == "" { // what was checked without being mounted: a successor needs nothing of it
			continue
		}
		all = append(all, mountRecord{Mount: m.record, Lingering: true})
	}
	return all
}

// empty reports whether there is no mount at all.
func (t *mounts) empty() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.byDir) == 0 && len(t.lingering) == 0
}

// linger adds to the lingering mounts, if m is not among them; gone takes it out.
func (t *mounts) linger(m *mount) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !slices.Contains(t.lingering, m) {
		t.lingering = append(t.lingering, m)
	}
}

func (t *mounts) gone(m *mount) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lingering = slices.DeleteFunc(t.lingering, func(l *mount) bool { return l == m })
}

func (t *mounts) allLingering() []*mount {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.lingering)
}

// close ends the prefetches and closes the images; what is mounted stays mounted. Nothing may be mounting.
func (t *mounts) close() (err error) {
	t.parting.Lock()
	defer t.parting.Unlock()
	for _, m := range append(t.list(), t.allLingering()...) {
		m.prefetch.end()
		if m.image != nil {
			err = errors.Join(err, m.image.Close())
		}
	}
	return err
}

// change keeps an upgrade away while something is mounted or unmounted, until done is called.
func (d *Daemon) change() (done func(), err error) {
	if !d.changing.TryRLock() {
		return nil, errUpgrading()
	}
	if d.succession.under.Load() {
		d.changing.RUnlock()
		return nil, errUpgrading()
	}
	return d.changing.RUnlock, nil
}

func errUpgrading() error {
	return conflict("try again in a moment", "the daemon is being upgraded, or is ending: nothing is mounted or unmounted meanwhile")
}

// newMountID names a mount as no other is.
func newMountID() string { return "m" + strings.ToLower(rand.Text()[:15]) }

// mount mounts an image. After an error nothing is left of the attempt but what was downloaded of the image's metadata.
func (d *Daemon) mount(ctx context.Context, r MountRequest) (_ *mount, err error) {
	done, err := d.change()
	if err != nil {
		return nil, err
	}
	defer done()
	m := &mount{record: state.Mount{
		ID: newMountID(), Ref: r.Image, Dir: r.Dir, Domain: r.Domain,
		Prefetch: d.opt.Prefetch, PrefetchBPS: d.opt.PrefetchBPS, Boot: d.boot, Created: time.Now().UTC(),
	}}
	if r.Prefetch != nil {
		m.record.Prefetch = *r.Prefetch
	}
	if r.PrefetchBPS != nil {
		m.record.PrefetchBPS = *r.PrefetchBPS
	}
	if err := d.admissible(r, cmp.Or(r.Domain, LocalDomain)); err != nil {
		return nil, err
	}
	if err := d.mounts.reserve(m); err != nil {
		return nil, err
	}
	d.sweep()
	var undo undo
	defer func() {
		if err != nil {
			err = errors.Join(err, undo.run())
		}
	}()
	undo.add(func() error { d.mounts.drop(m); return nil })
	if m.image, err = image.Open(ctx, r.Image, d.opt.Image); err != nil {
		return nil, unusable(err)
	}
	undo.add(func() error { return d.part(m, d.letGo(m)) })
	if r.Domain == "" { // the credentials have just been of use: the image was fetched with them
		if m.record.Domain, err = d.domainOf(ctx, r.Image); err != nil {
			return nil, err
		}
	}
	if err := d.attach(ctx, m, &undo); err != nil {
		return nil, err
	}
	d.mounts.give(m)
	d.tune()
	d.startPrefetch(m)
	d.log.Info("mounted", zap.String("image", m.record.Ref), zap.String("digest", m.record.Image), zap.String("dir", m.record.Dir), zap.String("domain", m.record.Domain))
	return m, nil
}

// attach saves the opened image, puts the mount on record, makes its objects ready and mounts it.
// ORDER: the image is saved before it is on record, and on record before it is mounted, so that whatever is found
// mounted after a crash can be served.
func (d *Daemon) attach(ctx context.Context, m *mount, undo *undo) error {
	boot, err := d.enter(m)
	if err != nil {
		return err
	}
	if err := d.holdAll(ctx, m, boot); err != nil {
		return err
	}
	if err := d.engine.Mount(ctx, d.engineMount(m, boot)); err != nil {
		return mountFailed(err)
	}
	return nil
}

// enter saves an opened image and puts its mount on record. An image that is removed meanwhile is removed before that or not at all.
func (d *Daemon) enter(m *mount) (*bootstrap, error) {
	m.record.Image, m.record.Ref = m.image.Digest, m.image.Ref
	dir, err := d.imageDir(m.image.Digest)
	if err != nil {
		return nil, err
	}
	d.saving.Lock()
	defer d.saving.Unlock()
	// All but the blobs' data, so that it can be served without asking where it came from. Where its blobs are is each mount's own record.
	if err := m.image.Save(dir); err != nil {
		return nil, err
	}
	boot, err := d.bootstrapOf(dir, m.image)
	if err != nil {
		return nil, err
	}
	m.record.Bootstrap = boot.sum
	saved := state.Image{Digest: m.image.Digest, Ref: m.record.Ref, Size: imageSize(m.image), Created: m.record.Created, Blobs: blobsOf(m.image)}
	return boot, d.state.RecordMount(m.record, saved)
}

// blobsOf lists what an image refers to.
func blobsOf(i *image.Image) []state.Blob {
	list := make([]state.Blob, 0, len(i.Blobs))
	for _, b := range i.Blobs {
		list = append(list, state.Blob{ID: b.Info.ID, Size: int64(b.Table.Size())})
	}
	return list
}

// part ends what is left of a mount that was unmounted here, or lets it linger. It stays on record for as long as it lingers:
// a daemon that did not know of it would deny its readers, and give up the lifeline that keeps them from reading zeros (I4).
// ORDER: unmounted first, off the record last, so that a crash between leaves a record of nothing, which is dropped.
func (d *Daemon) part(m *mount, err error) error {
	if len(m.kept) == 0 {
		err = errors.Join(err, m.image.Close(), d.state.ForgetMount(m.record.ID))
		d.discardBootstrap(m)
		d.mounts.gone(m)
		d.room.kick() // what it used may be culled now
		return err
	}
	if m.record.Stage != state.StageLinger { // else it is known, and looked at again every few seconds
		d.log.Info("an unmounted image is still used, in another mount namespace perhaps; it is served on",
			zap.String("image", m.record.Ref), zap.String("dir", m.record.Dir), zap.Stringer("object", m.kept[0].o.key))
	}
	if e := d.stage(m, state.StageLinger); e != nil {
		d.log.Error("record that an unmounted image is still used", zap.String("image", m.record.Ref), zap.Error(e))
	}
	d.mounts.linger(m)
	d.sweepLater()
	return err
}

// sweep lets go what need not linger any more. What is looked at stays known meanwhile: who asks whether the daemon is used, or
// what there is to hand over, must not find a gap.
func (d *Daemon) sweep() {
	if !d.mounts.parting.TryLock() {
		return // somebody is at it
	}
	defer d.mounts.parting.Unlock()
	for _, m := range d.mounts.allLingering() {
		if err := d.part(m, d.letGoHolds(m, m.kept)); err != nil {
			d.log.Error("let an unmounted image go", zap.String("image", m.record.Ref), zap.Error(err))
		}
	}
}

// sweepEvery is how long an unmounted image stays, at most, after its last user went, whom nobody announces.
const sweepEvery = 5 * time.Second

// sweepLater has what lingers swept for as long as anything does.
func (d *Daemon) sweepLater() {
	if len(d.mounts.allLingering()) == 0 || d.sweeping.Swap(true) {
		return
	}
	d.background.Go(func() {
		tick := time.NewTicker(sweepEvery)
		defer tick.Stop()
		for len(d.mounts.allLingering()) > 0 {
			select {
			case <-tick.C:
			case <-d.base.Done():
				return
			}
			if done, err := d.change(); err == nil { // else at the next tick
				d.sweep()
				done()
			}
		}
		d.sweeping.Store(false)
		d.sweepLater() // something may have come to linger in between
	})
}

func (d *Daemon) engineMount(m *mount, boot *bootstrap) fscache.Mount {
	em := fscache.Mount{Dir: m.record.Dir, BootstrapPath: boot.path}
	if m.bootstrap != nil {
		em.Bootstrap = fscache.Object{Key: m.bootstrap.o.key, Size: m.bootstrap.o.size()}
	}
	for _, h := range m.blobs {
		em.Blobs = append(em.Blobs, fscache.Object{Key: h.o.key, Size: h.o.size()})
	}
	return em
}

// startPrefetch brings m in from now on, if its record says so, unless that is under way or m is being unmounted. unmount and close wait for it.
func (d *Daemon) startPrefetch(m *mount) {
	r := m.asRecorded()
	if !r.Prefetch {
		return
	}
	m.prefetch.begin(d.base, func(ctx context.Context) error {
		objects := make([]*object, len(m.blobs))
		for i, h := range m.blobs {
			objects[i] = h.o
		}
		p := newPrefetch(d.filler, &m.gate, r.PrefetchBPS)
		if m.hurried.Load() {
			p.lanes, p.step, p.flush = hurriedLanes, hurriedStep, true
		}
		return p.run(ctx, m.image.Plan(), objects)
	})
}

// unmount unmounts what is mounted on dir and forgets it. While files in it are open it changes nothing.
func (d *Daemon) unmount(ctx context.Context, dir string) error {
	done, err := d.change()
	if err != nil {
		return err
	}
	defer done()
	m, err := d.mounts.take(filepath.Clean(dir))
	if err != nil {
		if there, err := d.unmountOffline(ctx, filepath.Clean(dir)); there || err != nil {
			return err
		}
		return err
	}
	if m.broken != "" && d.vanished(m) {
		d.mounts.drop(m)
		return d.state.ForgetMount(m.record.ID)
	}
	if m.broken != "" {
		d.mounts.give(m)
		return conflict("unmount it with umount(8); the daemon drops its record when it next starts", "%s cannot be unmounted through the daemon: %s", dir, m.broken)
	}
	if err := d.engine.Unmount(ctx, m.record.Dir); err != nil && !d.vanished(m) {
		d.mounts.give(m)
		return unmountFailed(err)
	}
	m.prefetch.end()
	d.usedUntilNow(m)
	err = d.part(m, d.letGo(m))
	d.mounts.drop(m)
	d.room.kick() // its domain may be over its quota, and what it had can be culled now
	d.sweep()
	d.log.Info("unmounted", zap.String("image", m.record.Ref), zap.String("dir", m.record.Dir), zap.Error(err))
	return err
}

// vanished reports whether somebody else has unmounted m.
func (d *Daemon) vanished(m *mount) bool {
	points, err := d.mountPoints()
	_, there := points[m.record.Dir]
	return err == nil && !there
}

// admissible refuses requests to mount that cannot work, before anything is fetched for them.
func (d *Daemon) admissible(r MountRequest, domain string) error {
	if r.Image == "" {
		return invalid("give an image: oci:PATH[:TAG], docker://REF or rafs:BOOTSTRAP[,BLOBDIR]", "no image named")
	}
	if err := checkDomain(domain); err != nil {
		return err
	}
	if r.PrefetchBPS != nil && *r.PrefetchBPS < 0 {
		return invalid("give bytes a second, or 0 for no limit", "prefetch limit of %d is negative", *r.PrefetchBPS)
	}
	if !filepath.IsAbs(r.Dir) || filepath.Clean(r.Dir) != r.Dir {
		return invalid("the daemon has a working directory of its own: give the directory's absolute, clean path", "mount on %q: not an absolute, clean path", r.Dir)
	}
	for _, own := range []string{d.opt.Root, filepath.Dir(d.opt.Socket)} {
		if rel, err := filepath.Rel(r.Dir, own); err == nil && filepath.IsLocal(rel) {
			return invalid("choose a directory that does not hold it", "mount on %s: it would hide the daemon's own directory %s", r.Dir, own)
		}
	}
	fi, err := os.Lstat(r.Dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return notFound("make the directory first", "mount on %s: there is no such directory", r.Dir)
	case err != nil:
		return invalid("", "mount on %s: %w", r.Dir, err)
	case fi.Mode()&os.ModeSymlink != 0:
		return invalid("give the path it leads to", "mount on %s: it is a symbolic link", r.Dir)
	case !fi.IsDir():
		return invalid("give a directory", "mount on %s: it is not a directory", r.Dir)
	}
	points, err := d.mountPoints()
	if err != nil {
		return err
	}
	if fstype, ok := points[r.Dir]; ok {
		return conflict("unmount it first, or choose another directory", "mount on %s: a file system (%s) is mounted there", r.Dir, fstype)
	}
	return nil
}

// undo collects what takes a half-done thing back.
type undo []func() error

func (u *undo) add(f func() error) { *u = append(*u, f) }

// run undoes everything, last first.
func (u *undo) run() (err error) {
	for _, f := range slices.Backward(*u) {
		err = errors.Join(err, f())
	}
	return err
}

// mountFailed and unmountFailed say what the engine's errors mean to who asked.
func mountFailed(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, fscache.ErrBusy) || errors.Is(err, os.ErrExist) {
		return conflict("", "%w", err)
	}
	return fmt.Errorf("mount: %w", err)
}

func unmountFailed(err error) error {
	if errors.Is(err, fscache.ErrBusy) {
		return conflict("close the files in it (fuser -vm DIR shows who has some open), then try again", "%w", err)
	}
	return fmt.Errorf("unmount: %w", err)
}
