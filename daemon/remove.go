package daemon

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/rafs/image"
	"holdfast/state"
	"holdfast/state/crash"
)

// removeImages takes images off the record, each named by its digest or its reference, and removes what is saved and cached of them that no
// other image refers to. It refuses all if one is mounted.
func (d *Daemon) removeImages(ctx context.Context, names []string) (r GCReport, err error) {
	done, err := d.change()
	if err != nil {
		return r, err
	}
	defer done()
	d.sweep()
	if err := d.describe(); err != nil {
		return r, err
	}
	g, err := d.state.Graph()
	if err != nil {
		return r, err
	}
	images, err := resolve(g, names)
	if err != nil {
		return r, err
	}
	for _, i := range images {
		if err := notMounted(i, g.Mounted(i.Digest)); err != nil {
			return r, err
		}
	}
	blobs := map[string]bool{}
	for _, i := range images {
		x := d.decideImage(g, i)
		x.Remove, x.Why = true, "removed by name, "+i.Ref
		if err := d.retireImage(i, &x); err != nil {
			return r, err
		}
		for _, b := range i.Blobs {
			blobs[b.ID] = true
		}
		r.Decisions = append(r.Decisions, x)
	}
	objects, err := d.gcObjects(ctx, false, func(o state.Object) bool { return blobs[o.ID] })
	r.Decisions = append(r.Decisions, objects...)
	r.sum()
	d.log.Info("images removed", zap.Strings("images", names), zap.Int64("freed", r.Freed))
	return r, err
}

// resolve finds the images that names stand for. One reference may have stood for several in its time.
func resolve(g *state.Graph, names []string) (list []state.Image, err error) {
	for _, name := range names {
		ref := name
		if r, err := image.ParseReference(name); err == nil {
			ref = r.String()
		}
		var found []state.Image
		var digests []string
		for _, i := range g.Images {
			if i.Digest == name || i.Ref == ref {
				found = append(found, i)
				digests = append(digests, i.Digest)
			}
		}
		switch {
		case len(found) == 0:
			return nil, notFound("holdfast images lists them", "no image on record is named %q", name)
		case len(found) > 1:
			return nil, conflict("name it by digest", "%s stands for %d images: %s", name, len(found), strings.Join(digests, ", "))
		}
		if !slices.ContainsFunc(list, func(i state.Image) bool { return i.Digest == found[0].Digest }) {
			list = append(list, found[0])
		}
	}
	return list, nil
}

func notMounted(i state.Image, mounts []state.Mount) error {
	if len(mounts) == 0 {
		return nil
	}
	return conflict("unmount it first", "image %s (%s) is mounted %s", i.Ref, i.Digest, places(mounts))
}

// retireImage puts it on record that an image is being removed, unless it was mounted meanwhile, and does it.
func (d *Daemon) retireImage(i state.Image, x *Decision) error {
	d.saving.Lock()
	defer d.saving.Unlock()
	mounts, err := d.state.RetireImage(i.Digest)
	if err != nil {
		return err
	}
	if err := notMounted(i, mounts); err != nil {
		return err
	}
	x.fail(d.removeImage(i.Digest))
	return nil
}

// removeImage removes what is saved of an image that is on record as being removed, and takes it off the record. d.saving is held.
func (d *Daemon) removeImage(digest string) error {
	now, err := d.state.Graph()
	if err != nil {
		return err
	}
	if i, ok := now.Image(digest); !ok || !i.Removing {
		return nil // it was mounted anew
	}
	dir, err := d.imageDir(digest)
	if err != nil {
		return err
	}
	crash.Point("daemon.remove-image.before-remove")
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove image %s: %w", digest, err)
	}
	crash.Point("daemon.remove-image.after-remove")
	return d.state.ForgetImage(digest)
}

// remove deletes what is cached of an object that is on record as being removed, when it has its turn. Whoever comes to mount it waits for
// that, and begins with nothing cached.
func (d *Daemon) remove(ctx context.Context, k fscache.Key) error {
	e := d.objects.enter(k)
	defer d.objects.leave(k, e)
	select {
	case e.turn <- struct{}{}:
		defer func() { <-e.turn }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	now, err := d.state.Object(k.Domain, k.ID)
	if err != nil {
		return err
	}
	if !now.Removing && now.ID != "" {
		return fmt.Errorf("object %s was mounted meanwhile: %w", k, fscache.ErrBusy)
	}
	return d.deleteCached(ctx, k)
}

// deleteCached deletes what is cached of an object, unless it is mounted; the caller has its turn. What it fails to delete the culler tries
// again.
//
// ORDER: on record as being removed (RetireObjects), deleted, off the record (ForgetObjects): what a process leaves that dies in between is known.
func (d *Daemon) deleteCached(ctx context.Context, k fscache.Key) error {
	if d.objects.get(k) != nil {
		return fmt.Errorf("object %s is mounted: %w", k, fscache.ErrBusy)
	}
	crash.Point("daemon.cull.before-cull")
	err := d.engine.Cull(ctx, k)
	crash.Point("daemon.cull.after-cull")
	if err != nil {
		d.begun.Store(true)
		return err
	}
	d.room.culled.Add(1)
	d.room.made()
	return nil
}

// usage is how many bytes an object takes on disk; 0 where that cannot be told.
func (d *Daemon) usage(o state.Object) int64 {
	n, err := d.engine.Usage(keyOf(o))
	if err != nil {
		d.log.Debug("the room that an object takes is not known", zap.Stringer("object", keyOf(o)), zap.Error(err))
	}
	return n
}
