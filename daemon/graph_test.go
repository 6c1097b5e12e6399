package daemon

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"pgregory.net/rapid"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
	"holdfast/rafs/convert"
	"holdfast/rafs/source"
	"holdfast/state"
)

// layeredImages makes an image of each list of layers; a layer is the same blob in all.
func layeredImages(t *testing.T, lists ...[]int) (images []simImage) {
	t.Helper()
	for n, list := range lists {
		var img v1.Image = mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1)
		for _, l := range list {
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			rng := rand.New(rand.NewPCG(uint64(l), 8))
			p := make([]byte, 30_000+l*5000)
			for k := range p {
				p[k] = byte(rng.Uint32N(250))
			}
			err := w.WriteHeader(&tar.Header{Name: fmt.Sprint("layer", l), Mode: 0o644, Size: int64(len(p))})
			if _, err2 := w.Write(p); errors.Join(err, err2, w.Close()) != nil {
				t.Fatal(err, err2)
			}
			if img, err = mutate.AppendLayers(img, static.NewLayer(b.Bytes(), types.OCIUncompressedLayer)); err != nil {
				t.Fatal(err)
			}
		}
		cfg, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		cfg = cfg.DeepCopy()
		cfg.OS, cfg.Architecture, cfg.Author = "linux", "amd64", fmt.Sprint("image ", n)
		if img, err = mutate.ConfigFile(img, cfg); err != nil {
			t.Fatal(err)
		}
		plain := t.TempDir()
		p, err := layout.Write(plain, empty.Index)
		if err == nil {
			err = p.AppendImage(img)
		}
		o := convert.Options{Source: "oci:" + plain, Dest: "oci:" + t.TempDir() + ":test", ChunkSize: 4096}
		if err == nil {
			_, err = convert.Run(t.Context(), o)
		}
		if err != nil {
			t.Fatal(err)
		}
		images = append(images, describeImage(t, o.Dest))
	}
	return images
}

// TestWhatIsMountedLosesNothingWhateverGoes mounts, unmounts, removes and culls images that share blobs in two domains, and has daemons die over it. What
// is mounted keeps all it needs and reads right; no source is asked whose mount is gone; no object has a source of another domain; and in
// the end what nothing refers to is gone, from the record and from the cache.
func TestWhatIsMountedLosesNothingWhateverGoes(t *testing.T) {
	t.Setenv("GOMEMLIMIT", "off")
	images := layeredImages(t, []int{1, 2}, []int{2, 3}, []int{1, 2, 3})
	if images[0].ids[1] != images[1].ids[0] {
		t.Fatal("the images share no blob")
	}
	for name, mode := range map[string]simkernel.Mode{"cachefiles": simkernel.Cachefiles, "fanotify": simkernel.Fanotify} {
		t.Run(name, func(t *testing.T) {
			checks(t, 400/slowdown)
			parent := shmDir(t)
			rapid.Check(t, func(rt *rapid.T) {
				base, err := os.MkdirTemp(parent, "g")
				if err != nil {
					rt.Fatal(err)
				}
				defer os.RemoveAll(base)
				rapid.SyncTest(rt, func(rt *rapid.T) { newComings(rt, mode, base, images).play() })
			})
		})
	}
}

// comings are images that come and go on a host.
type comings struct {
	*simHost
	rt      *rapid.T
	images  []simImage
	dirs    []string
	domains []string

	mu    sync.Mutex
	ended map[string]bool // ids of mounts that were unmounted
}

// A tapped source is one mount's.
type tapped struct {
	source.Source
	c *comings
	m state.Mount
}

func (s *tapped) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	s.c.mu.Lock()
	ended := s.c.ended[s.m.ID]
	s.c.mu.Unlock()
	if ended {
		s.c.fail("the source of %s is asked, and it is no longer mounted on %s", s.m.Ref, s.m.Dir)
	}
	return s.Source.ReadRange(ctx, off, n)
}

func newComings(rt *rapid.T, mode simkernel.Mode, base string, images []simImage) *comings {
	c := &comings{rt: rt, images: images, domains: []string{"one", "two"}, ended: map[string]bool{}}
	c.simHost = newSimHost(mode, base, func(format string, args ...any) {
		panic(fmt.Sprintf(format, args...) + "\n" + c.notes())
	})
	for i := range 4 {
		d := filepath.Join(base, fmt.Sprint("mnt", i))
		c.mkdir(d)
		c.dirs = append(c.dirs, d)
	}
	prefetch := rapid.Bool().Draw(rt, "prefetch")
	c.change = func(o *Options) { o.Prefetch, o.ReadAhead = prefetch, 1 }
	c.tap = func(m state.Mount, s source.Source) source.Source { return &tapped{s, c, m} }
	return c
}

func (c *comings) pick(what string, n int) int { return rapid.IntRange(0, n-1).Draw(c.rt, what) }

func (c *comings) play() {
	defer c.end()
	c.boot(0)
	actions := []func(){c.actMount, c.actMount, c.actMount, c.actUnmount, c.actUnmount, c.actRemove, c.actRemove, c.actGC, c.actCull, c.actRead, c.actRead, c.actCrash, c.actBroken}
	for range 8 + c.pick("steps", 16) {
		if l := c.running(); l == nil {
			c.boot(0)
		} else if c.pick("dies", 4) == 0 {
			l.dieWithin(1 + c.pick("steps until death", 30))
		}
		i := c.pick("action", len(actions))
		c.note("-- %s", runtime.FuncForPC(reflect.ValueOf(actions[i]).Pointer()).Name())
		actions[i]()
		synctest.Wait()
		c.look()
	}
	c.settle()
}

// up is a daemon that serves; it may be about to die.
func (c *comings) up() *Daemon {
	l := c.running()
	if l == nil || !isClosed(l.ready) {
		return nil
	}
	return l.d
}

func (c *comings) actMount() {
	d, dir := c.up(), c.dirs[c.pick("dir", len(c.dirs))]
	im, domain := c.images[c.pick("image", len(c.images))], c.domains[c.pick("domain", 2)]
	if d != nil && !slices.Contains(c.kernel.Mounts(), dir) {
		_, err := d.mount(context.Background(), MountRequest{Image: im.ref, Dir: dir, Domain: domain})
		c.note("mount %.15s on %s in %s: %v", im.digest, filepath.Base(dir), domain, err)
	}
}

func (c *comings) actUnmount() {
	d, dir := c.up(), c.dirs[c.pick("dir", len(c.dirs))]
	if d == nil {
		return
	}
	id := ""
	for _, m := range d.mounts.list() {
		if m.record.Dir == dir {
			id = m.record.ID
		}
	}
	err := d.unmount(context.Background(), dir)
	lingers := slices.ContainsFunc(d.mounts.every(), func(m mountRecord) bool { return m.ID == id })
	if err == nil && !lingers {
		c.mu.Lock()
		c.ended[id] = true
		c.mu.Unlock()
	}
}

func (c *comings) actRemove() {
	d, im := c.up(), c.images[c.pick("image", len(c.images))]
	if d == nil {
		return
	}
	mounted := slices.ContainsFunc(d.mounts.list(), func(m *mount) bool { return m.record.Image == im.digest })
	_, err := d.removeImages(context.Background(), []string{im.digest})
	c.note("remove %.15s: %v", im.digest, err)
	if mounted && err == nil {
		c.fail("a mounted image was removed")
	}
}

func (c *comings) actGC() {
	if d := c.up(); d != nil {
		_, err := d.gc(context.Background(), c.pick("dry run", 3) == 0)
		c.note("gc: %v", err)
	}
}

// actCull has an object culled that no mount has, if there is one.
func (c *comings) actCull() {
	if d := c.up(); d != nil {
		d.room.full()
	}
}

func (c *comings) actCrash() {
	if l := c.running(); l != nil {
		l.kill()
	}
}

func (c *comings) actBroken() { c.setBroken(c.pick("broken", 2) == 0) }

func (c *comings) actRead() {
	if d := c.up(); d != nil {
		for _, m := range d.mounts.list() {
			if c.pick("this", 2) == 0 {
				c.readAll(m, false)
			}
		}
	}
}

// readAll reads all that is mounted, or a page of it, and checks it.
func (c *comings) readAll(m *mount, all bool) {
	im := c.images[slices.IndexFunc(c.images, func(im simImage) bool { return im.digest == m.record.Image })]
	for id, want := range im.blobs {
		if !all {
			want = want[:4096]
		}
		p := make([]byte, len(want))
		r, err := c.kernel.StartRead(m.record.Dir, fscache.Key{Domain: m.record.Domain, ID: id}, p, 0)
		if err != nil {
			c.fail("read %s: %v", m.record.Dir, err)
		}
		for range 100 {
			synctest.Wait()
			ended, err := r.Ended()
			if ended && (err != nil || !bytes.Equal(p, want)) {
				c.fail("reader of %s got %v, or wrong bytes", m.record.Dir, err)
			}
			if ended {
				break
			}
			time.Sleep(time.Second)
			if c.running() == nil {
				c.boot(0)
			}
		}
	}
}

// look checks what holds at every moment at which nothing is under way.
func (c *comings) look() {
	if v := c.kernel.Violations(); len(v) > 0 {
		c.fail("%s", v[0])
	}
	d := c.up()
	if d == nil || c.running() == nil {
		return
	}
	g, err := d.state.Graph()
	if err != nil {
		return // it has just died
	}
	known := map[fscache.Key]state.Object{}
	for _, o := range g.Objects {
		known[keyOf(o)] = o
	}
	ids := map[string]string{} // domains of mounts
	for _, m := range d.mounts.list() {
		if i, ok := g.Image(m.record.Image); !ok || i.Removing {
			c.fail("the image mounted on %s is not on record", m.record.Dir)
		}
		if dir, err := d.imageDir(m.record.Image); err != nil || !isDir(dir) {
			c.fail("what is saved of the image mounted on %s is gone (%v)", m.record.Dir, err)
		}
		for _, h := range m.blobs {
			if o, ok := known[h.o.key]; !ok || o.Removing {
				c.fail("object %s, mounted on %s, is not on record: %+v", h.o.key, m.record.Dir, o)
			}
		}
	}
	for _, m := range d.mounts.every() {
		ids[m.ID] = m.Domain // those that linger too
	}
	for _, o := range d.objects.all() {
		o.mu.Lock()
		uses := slices.Clone(o.uses)
		o.mu.Unlock()
		for _, u := range uses {
			s, ok := u.src.(*tapped) // a bootstrap's is another
			if ok && (s.m.Domain != o.key.Domain || ids[s.m.ID] != o.key.Domain) {
				c.fail("object %s has the source of mount %s in domain %s", o.key, s.m.Dir, s.m.Domain)
			}
		}
	}
}

// unmountUnknown unmounts, as a person would, what a process that died over it began to mount and the kernel went on with.
func (c *comings) unmountUnknown(d *Daemon) {
	for _, dir := range c.kernel.Mounts() {
		if slices.ContainsFunc(d.mounts.list(), func(m *mount) bool { return m.record.Dir == dir }) {
			continue
		}
		if err := c.running().engine.Unmount(context.Background(), dir); err != nil {
			c.fail("unmount %s: %v", dir, err)
		}
	}
	synctest.Wait()
}

// settle takes the faults away, reads everything, and looks whether what is left is what is referred to.
func (c *comings) settle() {
	c.setBroken(false)
	for c.running() == nil {
		c.boot(0)
	}
	c.running().dieWithin(0)
	time.Sleep(10 * time.Second)
	synctest.Wait()
	d := c.up()
	for _, m := range d.mounts.list() {
		c.readAll(m, true)
	}
	c.unmountUnknown(d)
	report, err := d.gc(context.Background(), false)
	if err != nil {
		c.fail("gc: %v", err)
	}
	for _, x := range report.Decisions {
		if x.Failed != "" {
			c.fail("gc of %s: %s; mounted %q", x.Name, x.Failed, c.kernel.Mounts())
		}
	}
	c.look()
	g, err := d.state.Graph()
	if err != nil {
		c.fail("%v", err)
	}
	needed := map[fscache.Key]bool{}
	for _, i := range g.Images {
		for _, domain := range i.Domains {
			for _, b := range i.Blobs {
				needed[fscache.Key{Domain: domain, ID: b.ID}] = true
			}
		}
	}
	got := map[fscache.Key]bool{}
	for _, o := range g.Objects {
		if _, boot := g.Bootstrap(o.Domain, o.ID); !boot {
			got[keyOf(o)] = true
		}
	}
	for k := range got { // what was culled is not on record until it is mounted again
		if !needed[k] {
			c.fail("on record are %v, referred to are %v", got, needed)
		}
	}
	for _, domain := range c.domains {
		for _, im := range c.images {
			for id := range im.blobs {
				k := fscache.Key{Domain: domain, ID: id}
				if n, err := d.engine.Usage(k); !got[k] && n != 0 || err != nil {
					c.fail("%s is not on record, and takes %d bytes (%v)", k, n, err)
				}
			}
		}
	}
	entries, err := os.ReadDir(filepath.Join(c.root, imagesDir))
	if err != nil || len(entries) != len(g.Images) {
		c.fail("%d images are saved and %d on record (%v)", len(entries), len(g.Images), err)
	}
	c.agree()
}
