package daemon

import (
	"errors"
	"net/http"
	"path/filepath"
	"slices"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/fscache/plain"
	"holdfast/rafs/image"
	"holdfast/state"
)

// A PrefetchRequest is the body of POST /v1/prefetch, and, field by field, the query of GET. It names one of Image and Dir.
type PrefetchRequest struct {
	Image  string `json:"image,omitempty"`  // reference or digest of a mounted image, wherever it is mounted
	Dir    string `json:"dir,omitempty"`    // where an image is mounted
	Domain string `json:"domain,omitempty"` // with Image: only where it is mounted in this one
}

// A PrefetchInfo says how much of a mounted image is in the cache. Sizes are bytes.
type PrefetchInfo struct {
	Image   string   `json:"image"` // digest
	Ref     string   `json:"ref"`
	Dirs    []string `json:"dirs"`    // where it is mounted
	Size    int64    `json:"size"`    // of its data
	Present int64    `json:"present"` // of that, in the cache
	Done    bool     `json:"done"`    // all of it is there, and would outlive a power failure
	Failed  string   `json:"failed,omitempty"`
	Trouble string   `json:"trouble,omitempty"` // what a source fails with that is tried again
}

// postPrefetch begins, or hurries, the prefetch of what is named. It goes on whoever asked for it goes away.
func (d *Daemon) postPrefetch(r *http.Request) (int, any, error) {
	var req PrefetchRequest
	if err := errors.Join(noQuery(r), decodeBody(r, &req)); err != nil {
		return 0, nil, err
	}
	done, err := d.change()
	if err != nil {
		return 0, nil, err
	}
	defer done()
	mounts, err := d.named(req)
	if err != nil {
		return 0, nil, err
	}
	for _, m := range mounts {
		if err := d.hurry(m); err != nil {
			return 0, nil, err
		}
	}
	return http.StatusAccepted, d.prefetchInfo(mounts), nil
}

func (d *Daemon) getPrefetch(r *http.Request) (int, any, error) {
	q := r.URL.Query()
	for name, v := range q {
		if name != "image" && name != "dir" && name != "domain" || len(v) != 1 {
			return 0, nil, invalid("the query has image or dir, and domain, once each", "parameter %q given %d times", name, len(v))
		}
	}
	mounts, err := d.named(PrefetchRequest{Image: q.Get("image"), Dir: q.Get("dir"), Domain: q.Get("domain")})
	if err != nil {
		return 0, nil, err
	}
	return http.StatusOK, d.prefetchInfo(mounts), nil
}

// hurry has m brought in without a limit, by the daemons that follow this one too.
// ORDER: on record before it begins, so that whoever was told that it was begun finds it done, whatever dies meanwhile.
func (d *Daemon) hurry(m *mount) error {
	d.culling.Lock() // from here on no part of it is culled
	first := m.hurried.CompareAndSwap(false, true)
	d.culling.Unlock()
	if first {
		if err := d.state.UpdateMount(m.asRecorded()); err != nil {
			m.hurried.Store(false)
			return err
		}
		m.prefetch.pause() // it is begun again, without a limit and in several lanes
		d.log.Info("prefetch was asked for", zap.String("image", m.record.Ref), zap.String("dir", m.record.Dir))
	}
	d.startPrefetch(m)
	return nil
}

// named finds the mounts that a request means, all of one image.
func (d *Daemon) named(r PrefetchRequest) (found []*mount, err error) {
	if (r.Image == "") == (r.Dir == "") {
		return nil, invalid("give the image, or where it is mounted", "one of image and dir is wanted")
	}
	const hint = "mount it first (holdfast mount IMAGE DIR), what is prefetched is what is mounted; see holdfast status"
	ref := r.Image
	if parsed, err := image.ParseReference(r.Image); err == nil {
		ref = parsed.String()
	}
	for _, m := range d.mounts.list() {
		k := m.record
		switch {
		case r.Dir != "" && k.Dir != filepath.Clean(r.Dir):
		case r.Dir == "" && k.Ref != ref && k.Image != ref:
		case r.Domain != "" && k.Domain != r.Domain:
		case m.broken != "":
			return nil, conflict("see holdfast status", "the image on %s cannot be served: %s", k.Dir, m.broken)
		case len(found) > 0 && found[0].record.Image != k.Image:
			return nil, conflict("give the directory of one of them", "two images are mounted under the name %s, on %s and %s", ref, found[0].record.Dir, k.Dir)
		default:
			found = append(found, m)
		}
	}
	switch {
	case len(found) > 0:
		return found, nil
	case r.Dir != "":
		return nil, notFound(hint, "no image of this daemon is mounted on %s", r.Dir)
	}
	return nil, notFound(hint, "image %s is not mounted", ref)
}

// prefetchInfo describes mounts of one image, of which there is at least one. Once it is all there, that is on record.
func (d *Daemon) prefetchInfo(mounts []*mount) PrefetchInfo {
	p := PrefetchInfo{Image: mounts[0].record.Image, Ref: mounts[0].record.Ref, Done: true}
	seen := map[fscache.Key]bool{}
	var failed []error
	for _, m := range mounts {
		p.Dirs = append(p.Dirs, m.record.Dir)
		failed = append(failed, m.prefetch.failure())
		for _, h := range m.blobs {
			if seen[h.o.key] {
				continue
			}
			seen[h.o.key] = true
			present, _ := h.o.presentBytes()
			p.Size += h.o.size()
			p.Present += present
			kept, err := h.o.kept()
			failed = append(failed, err)
			p.Done = p.Done && kept
			if !kept && m.prefetch.running.Load() == 0 && !d.succession.under.Load() && h.o.lostParts() {
				failed = append(failed, errPartsCulled)
			}
			if kept {
				if err := d.vouch(h.o); err != nil {
					d.log.Warn("record that an object was synced: mount --offline will check it by digest", zap.Stringer("object", h.o.key), zap.Error(err))
				}
			}
			if err := h.o.trouble(); err != nil && p.Trouble == "" {
				p.Trouble = err.Error()
			}
		}
	}
	if err := errors.Join(failed...); err != nil && !p.Done {
		p.Failed = err.Error()
	}
	return p
}

// vouch puts it on record that all of an object is right and was synced, so that mount --offline need not read it again, in this boot or
// another.
func (d *Daemon) vouch(o *object) error {
	i := slices.IndexFunc(plain.Kinds, func(k plain.Kind) bool { return k.Engine == d.engine.Name() && k.Verifies })
	if i < 0 || !o.vouched.CompareAndSwap(false, true) {
		return nil
	}
	path, err := plain.Kinds[i].CacheFile(CacheDir(d.opt.Root, d.engine.Name()), o.key)
	if err != nil {
		return err
	}
	f, err := plain.Open(path)
	if err != nil {
		return err
	}
	defer f.Close() // nothing was written
	s := state.Object{Domain: o.key.Domain, ID: o.key.ID, Boot: d.boot, Table: o.print}
	if s.Stamp, err = f.Stamp(); err != nil {
		return err
	}
	return d.state.StampObject(s)
}
