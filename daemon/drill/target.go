package drill

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sort"
	"sync"
	"sync/atomic"

	"holdfast/daemon"
	"holdfast/rafs"
	"holdfast/rafs/image"
)

// A target is a mounted image that is read from.
type target struct {
	files   []file
	ends    []int64 // of each file, laid end to end: where a random byte falls
	image   string
	leftOut int

	lock   sync.RWMutex // held for reading while something of the mount is open, for writing while it is mounted anew
	dir    string
	broken bool // it is not mounted any more

	renewing atomic.Bool  // no new reads: it is to be mounted anew
	rounds   atomic.Int64 // how often it was mounted anew
}

// A file is a regular file of an image, and what it must hold: content, or else pieces.
type file struct {
	path    string // in the image
	size    int64
	content *generated
	pieces  []piece
}

func (t *target) add(f file) {
	t.files = append(t.files, f)
	t.ends = append(t.ends, t.bytes()+f.size)
}

func (t *target) bytes() int64 {
	if len(t.ends) == 0 {
		return 0
	}
	return t.ends[len(t.ends)-1]
}

// pick returns the file that a random byte of the image lies in.
func (t *target) pick(r *rand.Rand) *file {
	at := r.Int64N(t.bytes())
	return &t.files[sort.Search(len(t.ends), func(i int) bool { return t.ends[i] > at })]
}

func (t *target) report() Mounted {
	t.lock.RLock()
	defer t.lock.RUnlock()
	m := Mounted{
		Dir: t.dir, Image: t.image, Compare: "chunk digests", Files: len(t.files), Bytes: t.bytes(), LeftOut: t.leftOut,
		Rounds: int(t.rounds.Load()),
	}
	if t.files[0].content != nil {
		m.Compare = "generator"
	}
	return m
}

// existing makes targets of images that are mounted: of those on dirs, or of all. What they must hold is what the daemon saved of them when it
// mounted them: the digest of every chunk.
func existing(ctx context.Context, client *daemon.Client, root string, dirs []string) ([]*target, []string, error) {
	mounts, err := client.Mounts(ctx)
	if err != nil {
		return nil, nil, err
	}
	byDir := map[string]daemon.MountInfo{}
	var all, notes []string
	for _, m := range mounts {
		byDir[m.Dir] = m
		all = append(all, m.Dir)
	}
	if len(dirs) == 0 {
		dirs = all
	}
	var list []*target
	for _, dir := range dirs {
		m, ok := byDir[filepath.Clean(dir)]
		if !ok {
			return nil, nil, fmt.Errorf("no image is mounted on %s: see holdfast status", dir)
		}
		if m.Broken != "" {
			return nil, nil, fmt.Errorf("the image on %s cannot be served, so it cannot be drilled: %s", dir, m.Broken)
		}
		t, err := saved(root, m)
		if err != nil {
			return nil, nil, err
		}
		if len(t.files) == 0 {
			notes = append(notes, dir+" holds no file that can be compared, and was left out")
			continue
		}
		if m.Complete {
			notes = append(notes, dir+" is complete in the cache: reads of it do not reach the daemon, and no fault can be felt there")
		}
		list = append(list, t)
	}
	if len(list) == 0 {
		return nil, nil, fmt.Errorf("nothing to read from is mounted: mount an image, or give --self")
	}
	return list, notes, nil
}

// saved makes a target of a mounted image.
func saved(root string, m daemon.MountInfo) (*target, error) {
	dir, err := daemon.ImageDir(root, m.Image)
	if err != nil {
		return nil, err
	}
	img, err := image.Load(dir, image.Options{})
	if err != nil {
		return nil, fmt.Errorf("find out what %s must hold: %w", m.Dir, err)
	}
	defer img.Close()
	d, err := img.Describe(true)
	if err != nil {
		return nil, fmt.Errorf("find out what %s must hold: %w", m.Dir, err)
	}
	t := &target{dir: m.Dir, image: m.Ref}
	for _, e := range d.Tree {
		if e.Type != "file" || e.Size == 0 {
			continue
		}
		if f, ok := fileOf(e, d.Blobs); ok {
			t.add(f)
		} else {
			t.leftOut++
		}
	}
	return t, nil
}

// fileOf lays the chunks of a file end to end. It fails for a file they do not fill: one with holes.
func fileOf(e image.Entry, blobs []image.BlobDescription) (file, bool) {
	f := file{path: e.Path, size: int64(e.Size)}
	var off int64
	for _, c := range e.Chunks {
		p := piece{off: off, size: int(c.Size), zero: c.Stored == 0}
		algo, err := rafs.ParseDigestAlgo(blobs[c.Blob].DigestAlgo)
		if err != nil || !parseDigest(&p.digest, c.Digest) {
			return f, false
		}
		p.algo = algo
		f.pieces = append(f.pieces, p)
		off += int64(c.Size)
	}
	return f, off == f.size
}
