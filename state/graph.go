package state

import (
	"crypto/rand"
	"errors"
	"fmt"
	"slices"

	"go.etcd.io/bbolt"

	"holdfast/state/crash"
)

// A Graph is who refers to what, as of one instant: mounts to images, and images, in the domains they were used in, to objects. Nothing
// else keeps an image or an object: no file that is there or not.
type Graph struct {
	Mounts  []Mount
	Images  []Image
	Objects []Object

	byID    map[string]Mount   // mounts
	byBlob  map[string][]Image // images that are not being removed
	mounted map[string][]Mount // by image
	unknown []Image            // that may refer to anything
}

// Graph returns the reference graph.
func (d *DB) Graph() (g *Graph, err error) {
	err = d.db.View(func(tx *bbolt.Tx) (err error) {
		g, err = readGraph(tx)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("state: read the reference graph: %w", err)
	}
	return g, nil
}

func readGraph(tx *bbolt.Tx) (*Graph, error) {
	mounts, err1 := all[Mount](tx, bucketMounts)
	images, err2 := all[Image](tx, bucketImages)
	objects, err3 := all[Object](tx, bucketObjects)
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, err
	}
	return newGraph(mounts, images, objects), nil
}

func newGraph(mounts []Mount, images []Image, objects []Object) *Graph {
	g := &Graph{Mounts: mounts, Images: images, Objects: objects, byID: map[string]Mount{}, byBlob: map[string][]Image{}, mounted: map[string][]Mount{}}
	for _, m := range mounts {
		g.byID[m.ID] = m
		g.mounted[m.Image] = append(g.mounted[m.Image], m)
	}
	for _, i := range images {
		if !i.Removing && i.Blobs == nil {
			g.unknown = append(g.unknown, i)
		}
		if !i.Removing {
			for _, b := range i.Blobs {
				g.byBlob[b.ID] = append(g.byBlob[b.ID], i)
			}
		}
	}
	for digest, list := range g.mounted {
		if _, ok := g.Image(digest); !ok { // its record was damaged
			g.unknown = append(g.unknown, Image{Digest: digest, Ref: list[0].Ref})
		}
	}
	return g
}

// Mounted returns the mounts on record of an image.
func (g *Graph) Mounted(digest string) []Mount { return g.mounted[digest] }

// Image returns an image on record.
func (g *Graph) Image(digest string) (Image, bool) {
	i := slices.IndexFunc(g.Images, func(i Image) bool { return i.Digest == digest })
	if i < 0 {
		return Image{}, false
	}
	return g.Images[i], true
}

// Bootstrap returns the mount whose bootstrap an object is.
func (g *Graph) Bootstrap(domain, id string) (Mount, bool) {
	m, ok := g.byID[id]
	return m, ok && m.Domain == domain
}

// Referrers returns the images that refer to an object. One whose blobs are not known refers to all.
func (g *Graph) Referrers(domain, id string) (list []Image) {
	for _, i := range g.byBlob[id] {
		if slices.Contains(i.Domains, domain) {
			list = append(list, i)
		}
	}
	return append(list, g.unknown...)
}

// Needed says whether anything refers to an object.
func (g *Graph) Needed(o Object) bool {
	_, boot := g.Bootstrap(o.Domain, o.ID)
	return boot || len(g.Referrers(o.Domain, o.ID)) > 0
}

// InUse says whether a mount on record has an object, as far as anybody knows.
func (g *Graph) InUse(o Object) bool {
	if _, boot := g.Bootstrap(o.Domain, o.ID); boot {
		return true
	}
	return slices.ContainsFunc(g.Referrers(o.Domain, o.ID), func(i Image) bool {
		return slices.ContainsFunc(g.Mounted(i.Digest), func(m Mount) bool { return m.Domain == o.Domain })
	})
}

// refer records an image and its objects in a mount's domain.
func refer(tx *bbolt.Tx, m Mount, i Image) error {
	old, _, err := get[Image](tx, bucketImages, i.Digest)
	if err != nil {
		return err
	}
	i.Domains = union(old.Domains, i.Domains, []string{m.Domain})
	if err := put(tx, bucketImages, i.Digest, i); err != nil {
		return err
	}
	for _, b := range i.Blobs {
		o, _, err := get[Object](tx, bucketObjects, objectKey(m.Domain, b.ID))
		if err != nil {
			return err
		}
		o.Domain, o.ID, o.Size, o.Removing = m.Domain, b.ID, b.Size, false
		if err := put(tx, bucketObjects, objectKey(o.Domain, o.ID), o); err != nil {
			return err
		}
	}
	return nil
}

// RecordOffline records a mount of an image that is on record, made by a process that is no daemon. Its objects, and the image, are not
// removed from here on.
func (d *DB) RecordOffline(m Mount) error {
	return d.update("record mount "+m.Dir, func(tx *bbolt.Tx) error {
		i, ok, err := get[Image](tx, bucketImages, m.Image)
		switch {
		case err != nil:
			return err
		case !ok || i.Removing:
			return fmt.Errorf("image %s was removed meanwhile: mount it through the daemon", m.Image)
		}
		return errors.Join(refer(tx, m, i), put(tx, bucketMounts, m.ID, m))
	})
}

func union(lists ...[]string) []string {
	all := slices.Concat(lists...)
	slices.Sort(all)
	return slices.Compact(all)
}

// DescribeImage completes the record of an image that a release before schema 2 made: it refers to these blobs, in each domain in which
// there may be an object of one.
func (d *DB) DescribeImage(digest string, blobs []Blob) error {
	return d.update("describe image "+digest, func(tx *bbolt.Tx) error {
		i, ok, err := get[Image](tx, bucketImages, digest)
		if err != nil || !ok || i.Blobs != nil {
			return err
		}
		objects, err := all[Object](tx, bucketObjects)
		if err != nil {
			return err
		}
		i.Blobs = append([]Blob{}, blobs...)
		for _, o := range objects {
			if slices.ContainsFunc(blobs, func(b Blob) bool { return b.ID == o.ID }) {
				i.Domains = append(i.Domains, o.Domain)
			}
		}
		i.Domains = union(i.Domains)
		return put(tx, bucketImages, digest, i)
	})
}

// RetireImage records that an image is being removed: from here on it refers to nothing. It does nothing, and returns them, while mounts
// on record refer to it, and nothing if it is not on record.
func (d *DB) RetireImage(digest string) (mounted []Mount, err error) {
	err = d.update("retire image "+digest, func(tx *bbolt.Tx) error {
		defer crash.Point("state.retire-image.before-commit")
		g, err := readGraph(tx)
		if err != nil {
			return err
		}
		i, ok := g.Image(digest)
		if mounted = g.Mounted(digest); !ok || len(mounted) > 0 {
			return nil
		}
		i.Removing = true
		return put(tx, bucketImages, digest, i)
	})
	crash.Point("state.retire-image.after-commit")
	return mounted, err
}

// ForgetImage takes an image off the record, when what was saved of it is removed. One that was mounted again meanwhile stays.
func (d *DB) ForgetImage(digest string) error {
	err := d.update("forget image "+digest, func(tx *bbolt.Tx) error {
		defer crash.Point("state.forget-image.before-commit")
		i, ok, err := get[Image](tx, bucketImages, digest)
		if err != nil || !ok || !i.Removing {
			return err
		}
		return tx.Bucket(bucketImages).Delete([]byte(digest))
	})
	crash.Point("state.forget-image.after-commit")
	return err
}

// RetireObjects records that what is cached of the objects that want says is being removed, all but those that a mount on record has, and
// returns those and the ones that were being removed before. Where images refer to one, it is brought in again when it is mounted.
func (d *DB) RetireObjects(want func(*Graph, Object) bool) (retired []Object, err error) {
	err = d.update("retire objects", func(tx *bbolt.Tx) error {
		defer crash.Point("state.retire-objects.before-commit")
		g, err := readGraph(tx)
		if err != nil {
			return err
		}
		for _, o := range g.Objects {
			if !want(g, o) || g.InUse(o) {
				continue
			}
			if !o.Removing {
				o.Removing = true
				if err := put(tx, bucketObjects, objectKey(o.Domain, o.ID), o); err != nil {
					return err
				}
			}
			retired = append(retired, o)
		}
		return nil
	})
	crash.Point("state.retire-objects.after-commit")
	return retired, err
}

// ForgetObjects takes objects off the record, when what was cached of them is removed. Those that were mounted meanwhile stay.
func (d *DB) ForgetObjects(list []Object) error {
	err := d.update("forget objects", func(tx *bbolt.Tx) error {
		defer crash.Point("state.forget-objects.before-commit")
		for _, o := range list {
			key := objectKey(o.Domain, o.ID)
			now, ok, err := get[Object](tx, bucketObjects, key)
			if err != nil {
				return err
			}
			if !ok || !now.Removing {
				continue
			}
			if err := tx.Bucket(bucketObjects).Delete([]byte(key)); err != nil {
				return err
			}
		}
		return nil
	})
	crash.Point("state.forget-objects.after-commit")
	return err
}

// nameDomains is the migration from schema 1 to 2: an image's record says in which domains it was used. Those of its mounts are known; which
// blobs it has, and so the others, is not (see DescribeImage).
func nameDomains(tx *bbolt.Tx) error {
	if tx.Bucket(bucketMounts) == nil || tx.Bucket(bucketImages) == nil {
		return nil
	}
	used := map[string][]string{}
	err := tx.Bucket(bucketMounts).ForEach(func(_, v []byte) error {
		var m Mount
		if decode(v, &m) == nil {
			used[m.Image] = append(used[m.Image], m.Domain)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for digest, domains := range used {
		i, ok, err := get[Image](tx, bucketImages, digest)
		if !ok || err != nil { // the sweep sets aside what is damaged
			continue
		}
		i.Domains = union(domains)
		if err := put(tx, bucketImages, digest, i); err != nil {
			return err
		}
	}
	return nil
}

// keySecret is a key of the meta bucket.
var keySecret = []byte("secret")

// Secret returns 32 random bytes that are this file's alone, made when first asked for: with them a name can be derived from what must not be
// guessed from it.
func (d *DB) Secret() (secret []byte, err error) {
	err = d.db.View(func(tx *bbolt.Tx) error {
		secret = slices.Clone(tx.Bucket(bucketMeta).Get(keySecret))
		return nil
	})
	if err != nil || len(secret) == secretLen {
		return secret, err
	}
	err = d.update("make a secret", func(tx *bbolt.Tx) error {
		meta := tx.Bucket(bucketMeta)
		if secret = slices.Clone(meta.Get(keySecret)); len(secret) == secretLen {
			return nil
		}
		secret = make([]byte, secretLen)
		rand.Read(secret) // never fails (Go 1.24)
		return meta.Put(keySecret, secret)
	})
	return secret, err
}

const secretLen = 32
