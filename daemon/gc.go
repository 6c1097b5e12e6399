package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/rafs/image"
	"holdfast/state"
	"holdfast/state/crash"
)

// What a [Decision] is about.
const (
	WhatImage    = "image"    // what is saved of an image
	WhatObject   = "object"   // what is cached of a blob, or of a mount's bootstrap, in a domain
	WhatLeftover = "leftover" // what is saved of no image on record, or only in part
)

// A Decision is what becomes of a thing that takes room, and why. Only the reference graph decides: what refers to it on record, and never
// what somebody else has removed.
type Decision struct {
	What   string `json:"what"`   // one of the above
	Name   string `json:"name"`   // digest; domain/id; file name
	Bytes  int64  `json:"bytes"`  // that it takes on disk
	Remove bool   `json:"remove"` // else it is kept
	Why    string `json:"why"`
	Failed string `json:"failed,omitempty"` // why it could not be removed; that is on record, and is tried again

	object state.Object
}

// A GCReport says what was decided, and unless it was a dry run, done.
type GCReport struct {
	DryRun    bool       `json:"dry_run"`
	Decisions []Decision `json:"decisions"`
	Freed     int64      `json:"freed"` // bytes; in a dry run, those that would be
}

func (r *GCReport) sum() {
	r.Freed = 0
	for _, x := range r.Decisions {
		if x.Remove && x.Failed == "" {
			r.Freed += x.Bytes
		}
	}
}

// gc removes what nothing on record refers to, and finishes what was being removed when a process died.
func (d *Daemon) gc(ctx context.Context, dryRun bool) (r GCReport, err error) {
	done, err := d.change()
	if err != nil {
		return r, err
	}
	defer done()
	d.sweep()
	if err := d.describe(); err != nil {
		return r, err
	}
	r.DryRun = dryRun
	if r.Decisions, err = d.gcImages(dryRun); err != nil {
		return r, err
	}
	objects, err := d.gcObjects(ctx, dryRun, func(state.Object) bool { return true })
	r.Decisions = append(r.Decisions, objects...)
	if r.Decisions == nil {
		r.Decisions = []Decision{}
	}
	r.sum()
	return r, err
}

// gcImages decides about what is saved of images.
func (d *Daemon) gcImages(dryRun bool) (list []Decision, err error) {
	d.saving.Lock()
	defer d.saving.Unlock()
	g, err := d.state.Graph()
	if err != nil {
		return nil, err
	}
	root := filepath.Join(d.opt.Root, imagesDir)
	entries, err := os.ReadDir(root)
	if err != nil {
		return nil, fmt.Errorf("list saved images: %w", err)
	}
	for _, i := range g.Images {
		x := d.decideImage(g, i)
		if x.Remove && !dryRun {
			x.fail(d.removeImage(i.Digest))
		}
		list = append(list, x)
	}
	for _, e := range entries {
		x, ok := decideEntry(g, root, e)
		if ok && x.Remove && !dryRun {
			crash.Point("daemon.gc.before-remove-leftover")
			x.fail(os.RemoveAll(filepath.Join(root, e.Name())))
		}
		if ok {
			list = append(list, x)
		}
	}
	return list, nil
}

func (x *Decision) fail(err error) {
	if err != nil {
		x.Failed = err.Error()
	}
}

func (d *Daemon) decideImage(g *state.Graph, i state.Image) Decision {
	x := Decision{What: WhatImage, Name: i.Digest, Why: "on record as " + i.Ref + ": holdfast images rm removes it"}
	if dir, err := d.imageDir(i.Digest); err == nil {
		x.Bytes = sizeOf(dir)
	}
	switch mounts := g.Mounted(i.Digest); {
	case len(mounts) > 0:
		x.Why = "mounted " + places(mounts)
	case i.Removing:
		x.Remove, x.Why = true, "its removal was begun and not finished"
	}
	return x
}

// places says where mounts are.
func places(mounts []state.Mount) string {
	var on []string
	for _, m := range mounts {
		at := "on " + m.Dir
		switch m.Stage {
		case state.StageLinger:
			at += " in another mount namespace, it was unmounted in this one"
		case state.StageOffline:
			at += " without a daemon"
		}
		on = append(on, at)
	}
	return strings.Join(on, ", ")
}

// decideEntry decides about an entry of the directory of saved images that is no image's on record. What has no name of ours is not ours.
func decideEntry(g *state.Graph, root string, e fs.DirEntry) (x Decision, ours bool) {
	hexa, rest, part := strings.Cut(e.Name(), image.Unfinished)
	digest := "sha256:" + hexa
	if _, err := ImageDir(root, digest); err != nil || !e.IsDir() {
		return x, false
	}
	_, known := g.Image(digest)
	known = known || len(g.Mounted(digest)) > 0
	x = Decision{What: WhatLeftover, Name: e.Name(), Remove: true, Bytes: sizeOf(filepath.Join(root, e.Name()))}
	switch {
	case !part && known:
		return x, false
	case !part:
		x.Why = "saved of an image that is not on record"
	case known && strings.HasSuffix(rest, image.Replaced) && !isDir(filepath.Join(root, hexa)):
		x.Remove, x.Why = false, "the one that was to replace it was never put in place, and image "+digest+" is on record: mount the image anew"
	default:
		x.Why = "of a save that did not end"
	}
	return x, true
}

func isDir(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.IsDir()
}

// sizeOf is how many bytes the files below a directory have. What goes meanwhile has none.
func sizeOf(dir string) (n int64) {
	_ = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if fi, err := e.Info(); err == nil && fi.Mode().IsRegular() {
			n += fi.Size()
		}
		return nil
	})
	return n
}

// gcObjects decides about the objects on record that want says.
//
// The order is deleteCached's.
func (d *Daemon) gcObjects(ctx context.Context, dryRun bool, want func(state.Object) bool) (list []Decision, err error) {
	g, err := d.state.Graph()
	if err != nil {
		return nil, err
	}
	unneeded := map[fscache.Key]bool{}
	for _, o := range g.Objects {
		if !want(o) {
			continue
		}
		x := decideObject(g, o)
		x.Bytes = d.usage(x.object)
		unneeded[keyOf(o)] = x.Remove
		list = append(list, x)
	}
	if dryRun || !slices.ContainsFunc(list, func(x Decision) bool { return x.Remove }) {
		return list, nil
	}
	retired, err := d.state.RetireObjects(func(g *state.Graph, o state.Object) bool { return unneeded[keyOf(o)] && !g.Needed(o) })
	if err != nil {
		return nil, err
	}
	going := map[fscache.Key]bool{}
	for _, o := range retired {
		going[keyOf(o)] = true
	}
	var gone []state.Object
	for i := range list {
		x := &list[i]
		switch {
		case !x.Remove:
			continue
		case !going[keyOf(x.object)]:
			x.Remove, x.Why = false, "something came to refer to it meanwhile"
			continue
		case len(gone) > 0:
			_ = sleep(ctx, cullPause) // what is left when ctx ends fails by itself
		}
		if err := d.remove(ctx, keyOf(x.object)); err != nil {
			x.fail(err)
			continue
		}
		gone = append(gone, x.object)
	}
	return list, d.state.ForgetObjects(gone)
}

func keyOf(o state.Object) fscache.Key { return fscache.Key{Domain: o.Domain, ID: o.ID} }

func decideObject(g *state.Graph, o state.Object) Decision {
	x := Decision{What: WhatObject, Name: keyOf(o).String(), object: o}
	if m, ok := g.Bootstrap(o.Domain, o.ID); ok {
		x.Why = "bootstrap of what is mounted " + places([]state.Mount{m})
		return x
	}
	var why []string
	for _, i := range g.Referrers(o.Domain, o.ID) {
		switch mounts := inDomain(g.Mounted(i.Digest), o.Domain); {
		case i.Blobs == nil:
			why = append(why, "what image "+i.Ref+" refers to is not known: mount it anew, or remove it")
		case len(mounts) > 0:
			why = append(why, "image "+i.Ref+" refers to it, mounted "+places(mounts))
		default:
			why = append(why, "image "+i.Ref+" refers to it")
		}
	}
	x.Remove, x.Why = len(why) == 0, strings.Join(why, "; ")
	if x.Remove {
		x.Why = "no image on record refers to it"
	}
	return x
}

func inDomain(mounts []state.Mount, domain string) []state.Mount {
	return slices.DeleteFunc(slices.Clone(mounts), func(m state.Mount) bool { return m.Domain != domain })
}

// describe completes the records of images that a release before schema 2 made, as far as what is saved of them can be read. The others
// refer to everything, as far as anybody knows.
func (d *Daemon) describe() error {
	images, err := d.state.Images()
	if err != nil {
		return err
	}
	for _, i := range images {
		if i.Blobs != nil || i.Removing {
			continue
		}
		dir, err := d.imageDir(i.Digest)
		if err != nil {
			continue
		}
		saved, err := image.Load(dir, d.opt.Image)
		if err != nil {
			d.log.Warn("it cannot be told what an image refers to: no cached data is removed while it is on record", zap.String("image", i.Ref), zap.Error(err))
			continue
		}
		if err := errors.Join(d.state.DescribeImage(i.Digest, blobsOf(saved)), saved.Close()); err != nil {
			return err
		}
	}
	return nil
}

// tidy finishes the removal of images that another process had begun, and describes those that another release recorded. Objects on record as
// being removed are the culler's.
func (d *Daemon) tidy(ctx context.Context) {
	images, err := d.state.Images()
	if err == nil && !slices.ContainsFunc(images, func(i state.Image) bool { return i.Removing || i.Blobs == nil }) {
		return
	}
	done, err2 := d.change()
	if err = cmp.Or(err, err2); err != nil {
		d.log.Warn("what was being removed is left to holdfast gc", zap.Error(err))
		return
	}
	defer done()
	if err := errors.Join(d.describe(), d.finishRemovals()); err != nil && ctx.Err() == nil {
		d.log.Error("finish what was being removed: holdfast gc tries again", zap.Error(err))
	}
}

// finishRemovals removes the images that are on record as being removed.
func (d *Daemon) finishRemovals() error {
	d.saving.Lock()
	defer d.saving.Unlock()
	images, err := d.state.Images()
	for _, i := range images {
		if i.Removing {
			err = errors.Join(err, d.removeImage(i.Digest))
		}
	}
	return err
}
