package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
	"holdfast/rafs/blob"
	"holdfast/rafs/convert"
	"holdfast/rafs/image"
)

// A simImage is an image, and what its objects must hold.
type simImage struct {
	ref    string
	digest string
	blobs  map[string][]byte // by id
	ids    []string
}

// simImages makes n images.
func simImages(t *testing.T, n int) (list []simImage) {
	t.Helper()
	for i := range n {
		tree := t.TempDir()
		rng := rand.New(rand.NewPCG(uint64(i), 9))
		for f := range 3 {
			p := make([]byte, 20_000+f*9_000)
			for k := range p {
				p[k] = byte(rng.Uint32N(250))
			}
			if err := os.WriteFile(filepath.Join(tree, fmt.Sprint(f)), p, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		list = append(list, describeImage(t, makeImage(t, tree, convert.Options{ChunkSize: 4096})))
	}
	return list
}

// describeImage opens an image and reads what its objects must hold.
func describeImage(t *testing.T, ref string) simImage {
	t.Helper()
	dec, err := blob.NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	im := simImage{ref: ref, blobs: map[string][]byte{}}
	img, err := image.Open(t.Context(), im.ref, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	im.digest = img.Digest
	for _, b := range img.Blobs {
		want := make([]byte, b.Table.Size())
		for i := range b.Table.Len() {
			c := b.Table.At(i)
			if c.Zero() {
				continue
			}
			stored := make([]byte, c.Stored)
			r, err := b.Source.ReadRange(t.Context(), int64(c.BlobOffset), int64(c.Stored))
			if err == nil {
				_, err = io.ReadFull(r, stored)
				err = errors.Join(err, r.Close(), dec.Decode(c, b.Table.Algo(), stored, want[c.Offset:][:c.Size]))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		im.blobs[b.Info.ID] = want
		im.ids = append(im.ids, b.Info.ID)
	}
	return im
}

// shmDir is a directory on tmpfs, where a commit to a database costs little.
func shmDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "holdfast-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// A simRead is a read of a mounted image.
type simRead struct {
	*simkernel.Reader
	dir  string
	p    []byte
	want []byte
}

// read begins to read n bytes at off of an image's first blob.
func (h *simHost) read(im simImage, dir string, off, n int64) *simRead {
	r := &simRead{dir: dir, p: make([]byte, n), want: im.blobs[im.ids[0]][off : off+n]}
	var err error
	h.note("reader of %.6s %d+%d on %s", im.ids[0], off, n, filepath.Base(dir))
	if r.Reader, err = h.kernel.StartRead(dir, fscache.Key{Domain: LocalDomain, ID: im.ids[0]}, r.p, off); err != nil {
		h.fail("read: %v", err)
	}
	return r
}

// over says whether a read has ended, and checks what it got.
func (h *simHost) over(r *simRead) bool {
	ended, err := r.Ended()
	switch {
	case !ended:
		return false
	case err != nil:
		h.fail("reader of %s got %v", r.dir, err)
	case !bytes.Equal(r.p, r.want):
		h.fail("reader of %s got wrong bytes", r.dir)
	}
	return true
}

// eachHost runs a test in a bubble over both interfaces, on a host with one image and a directory to mount it on.
func eachHost(t *testing.T, f func(h *simHost, im simImage, dir string)) {
	t.Setenv("GOMEMLIMIT", "off")
	images := simImages(t, 2)
	for name, mode := range map[string]simkernel.Mode{"cachefiles": simkernel.Cachefiles, "fanotify": simkernel.Fanotify} {
		t.Run(name, func(t *testing.T) {
			base := shmDir(t)
			dir := filepath.Join(base, "mnt")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			synctest.Test(t, func(t *testing.T) {
				h := newSimHost(mode, base, t.Fatalf)
				h.others = images[1:]
				defer h.end()
				f(h, images[0], dir)
			})
		})
	}
}

// end kills what runs and ends everything.
func (h *simHost) end() {
	h.setDown(false)
	if l := h.running(); l != nil {
		l.kill()
	}
	h.close()
	if v := h.kernel.Violations(); len(v) > 0 {
		h.fail("%s", v[0])
	}
}

func (h *simHost) mkdir(dir string) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		h.fail("%v", err)
	}
}

func (h *simHost) mount(im simImage, dir string) {
	if _, err := h.running().d.mount(context.Background(), MountRequest{Image: im.ref, Dir: dir}); err != nil {
		h.fail("mount: %v", err)
	}
}

func TestWhatAPredecessorHadInFlightIsOnRecordAtEveryMoment(t *testing.T) {
	eachHost(t, func(h *simHost, im simImage, dir string) {
		h.boot(0)
		h.mount(im, dir)
		h.setDown(true)
		r := h.read(im, dir, 0, 4096)
		synctest.Wait() // it was read, and is too young for the record
		h.running().kill()
		for range 8 { // each life is shorter than the time until a request of its own would be recorded
			l := h.boot(0)
			time.Sleep(recordInterval + time.Millisecond)
			l.kill() // boot looks whether it is written down
		}
		h.setDown(false)
		h.boot(0)
		synctest.Wait()
		if !h.over(r) {
			h.fail("the reader waits")
		}
	})
}

// agree waits until all records agree, and fails if they do not.
func (h *simHost) agree() {
	time.Sleep(time.Second)
	synctest.Wait()
	l := h.running()
	report, err := l.d.report(context.Background())
	if err != nil || len(report.Findings) > 0 {
		h.fail("records disagree: %v, %v", report.Findings, err)
	}
	if n := len(report.Session.Objects); n != len(l.engine.Holding()) {
		h.fail("%d objects on record, the engine has %v", n, l.engine.Holding())
	}
}
