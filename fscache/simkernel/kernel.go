package simkernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"holdfast/fscache"
)

// A Mode says which interface a Kernel has.
type Mode int

// The two interfaces.
const (
	Cachefiles Mode = iota + 1 // EROFS over fscache, with restore (Linux 6.8 on)
	Fanotify                   // file-backed EROFS under pre-content marks
)

const page = fscache.BlockSize

// A Kernel is the part that outlives processes. Its methods may be called from any goroutine.
type Kernel struct {
	mu      sync.Mutex
	changed sync.Cond // something for Next, or the process ended
	low     lower
	files   map[fscache.Key]*file
	mounts  map[string]*mount
	process *Engine // that has the interface open, or nil
	kept    bool    // somebody else holds the lifeline
}

// A lower is what differs between the interfaces. All methods are called with Kernel.mu held; those that take a
// context give it up while they wait.
type lower interface {
	// opened: a process opened the interface, or got it from a keeper.
	opened(p *Engine)
	// closed: the process's descriptors are gone; last: nobody else holds the interface.
	closed(p *Engine, last bool)
	add(p *Engine, k fscache.Key)
	complete(k fscache.Key)
	writable(p *Engine, k fscache.Key) bool
	// mount and unmount are what mounting does to an image's objects.
	mount(ctx context.Context, m *mount) error
	unmount(m *mount)
	// fetch is a reader's wait for a range that is not in the page cache.
	fetch(ctx context.Context, k fscache.Key, off, n int64) error
	// next takes the next request to hand out, or nil.
	next(p *Engine) *request
	answer(p *Engine, number uint64, e fscache.Errno) error
}

// A file is a cache file.
type file struct {
	size  int64
	pages map[int64][]byte // by offset; absent: a hole
}

// A mount is a mounted image.
type mount struct {
	fscache.Mount
	open  int                              // files held open, readers at work
	cache map[fscache.Key]map[int64][]byte // page cache of its files, by offset
}

// objects are the image's blobs and its bootstrap.
func (m *mount) objects() []fscache.Key {
	keys := []fscache.Key{m.Bootstrap.Key}
	for _, b := range m.Blobs {
		keys = append(keys, b.Key)
	}
	return keys
}

// A request is something somebody in the kernel waits for.
type request struct {
	op     fscache.Op
	key    fscache.Key
	off, n int64
	number uint64     // message id, or event descriptor once read
	read   bool       // a process has it
	done   chan error // what the waiter gets; one slot
}

func newRequest(op fscache.Op, k fscache.Key, off, n int64) *request {
	return &request{op: op, key: k, off: off, n: n, done: make(chan error, 1)}
}

// New makes a kernel with an empty cache. Somebody holds the lifeline (I4) until SetKept(false).
func New(mode Mode) *Kernel {
	k := &Kernel{files: make(map[fscache.Key]*file), mounts: make(map[string]*mount), kept: true}
	k.changed.L = &k.mu
	if mode == Cachefiles {
		k.low = &device{k: k, objects: make(map[fscache.Key]*kobject)}
	} else {
		k.low = &group{k: k, marks: make(map[fscache.Key]bool)}
	}
	return k
}

// SetKept says whether something that outlives the process holds the lifeline.
func (k *Kernel) SetKept(kept bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.kept = kept
	if !kept && k.process == nil {
		k.low.closed(nil, true)
	}
}

// Open starts a process on the interface: the first, or a successor of one that was closed.
func (k *Kernel) Open() (*Engine, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.process != nil {
		return nil, fmt.Errorf("opening the simulated kernel: another process has it: %w", fscache.ErrBusy) // daemon.c:99
	}
	e := &Engine{
		k: k, added: make(map[fscache.Key]int64), quiet: make(map[fscache.Key]bool),
		pending: make(map[uint64]uint64),
	}
	k.process = e
	k.low.opened(e)
	return e, nil
}

// Read fills p from byte off of the file of blob key in the image mounted on dir. The error is EIO as the kernel's, or
// ctx's: the reader was killed. The kernel asks for the pages of p that it does not have, as one range.
func (k *Kernel) Read(ctx context.Context, dir string, key fscache.Key, p []byte, off int64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	m, f, err := k.find(dir, key)
	if err != nil {
		return err
	}
	end := off + int64(len(p))
	if off < 0 || end > f.size {
		return fmt.Errorf("read %s at %d: past the end", key, off)
	}
	m.open++
	defer func() { m.open-- }()
	cached := m.cache[key]
	for at := off &^ (page - 1); at < end; {
		if cached[at] != nil {
			at += page
			continue
		}
		to := at + page
		for to < end && cached[to] == nil {
			to += page
		}
		if err := k.load(ctx, m, key, at, to); err != nil {
			return err
		}
	}
	for at := off; at < end; {
		first := at &^ (page - 1)
		at += int64(copy(p[at-off:], cached[first][at-first:]))
	}
	return nil
}

// load brings [from, to) into the page cache, or at least its first page: what read-ahead failed to get is tried once
// more for the page that is needed (mm/filemap.c, filemap_get_pages: page_cache_sync_ra, then filemap_update_page).
func (k *Kernel) load(ctx context.Context, m *mount, key fscache.Key, from, to int64) error {
	err := k.low.fetch(ctx, key, from, to-from)
	if err != nil && ctx.Err() == nil {
		to = from + page
		err = k.low.fetch(ctx, key, from, page)
	}
	if err != nil {
		return err
	}
	f := k.files[key]
	for at := from; at < to; at += page {
		b := make([]byte, page)
		copy(b, f.pages[at]) // a hole is zeros
		m.cache[key][at] = b
	}
	return nil
}

// Hold opens the file of blob key in the image mounted on dir, and keeps it open until release is called, once.
func (k *Kernel) Hold(dir string, key fscache.Key) (release func(), err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	m, _, err := k.find(dir, key)
	if err != nil {
		return nil, err
	}
	m.open++
	return func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		m.open--
	}, nil
}

func (k *Kernel) find(dir string, key fscache.Key) (*mount, *file, error) {
	m := k.mounts[dir]
	if m == nil || m.cache[key] == nil {
		return nil, nil, fmt.Errorf("open %s: %w", filepath.Join(dir, key.ID), os.ErrNotExist)
	}
	return m, k.files[key], nil
}

// wait gives the kernel up until r is done or ctx is; killed says which.
func (k *Kernel) wait(ctx context.Context, r *request) (err error, killed bool) {
	k.changed.Broadcast()
	k.mu.Unlock()
	defer k.mu.Lock()
	select {
	case err := <-r.done:
		return err, false
	case <-ctx.Done():
	}
	select {
	case err := <-r.done: // answered in the same instant: the answer wins (fanotify_get_response, ondemand.c:589)
		return err, false
	default:
		return ctx.Err(), true
	}
}

// mountOn makes a mount; the caller checked the objects.
func (k *Kernel) mountOn(ctx context.Context, m fscache.Mount) error {
	if err := k.checkMountPoint(m.Dir); err != nil {
		return err
	}
	n := &mount{Mount: m, cache: make(map[fscache.Key]map[int64][]byte)}
	for _, b := range m.Blobs {
		n.cache[b.Key] = make(map[int64][]byte)
	}
	if err := k.low.mount(ctx, n); err != nil {
		return fmt.Errorf("mounting on %s: %w", m.Dir, err)
	}
	k.mounts[m.Dir] = n
	return nil
}

func (k *Kernel) checkMountPoint(dir string) error {
	if !filepath.IsAbs(dir) {
		return fmt.Errorf("mount point %q is not an absolute path", dir)
	}
	st, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("mount point: %w", err)
	}
	if !st.IsDir() {
		return fmt.Errorf("mount point %s: %w", dir, syscall.ENOTDIR)
	}
	if k.mounts[dir] != nil {
		return fmt.Errorf("mount point %s has something mounted already: %w", dir, fscache.ErrBusy)
	}
	return nil
}

func (k *Kernel) unmount(dir string) error {
	m := k.mounts[dir]
	switch {
	case m == nil:
		return fmt.Errorf("unmounting %s: no image is mounted there", dir)
	case m.open > 0:
		return fmt.Errorf("unmounting %s: %w", dir, fscache.ErrBusy)
	}
	delete(k.mounts, dir)
	k.low.unmount(m)
	k.changed.Broadcast()
	return nil
}

// used says whether a mount has the object.
func (k *Kernel) used(key fscache.Key) bool {
	for _, m := range k.mounts {
		if slices.Contains(m.objects(), key) {
			return true
		}
	}
	return false
}

// errRead is what a reader gets whatever the errno of the answer was: fs/erofs/fileio.c, fs/erofs/fscache.c.
var errRead = fmt.Errorf("simulated read: %w", syscall.EIO)

// errnoOf is the error an answer ends a wait with.
func errnoOf(e fscache.Errno) error {
	if e == fscache.OK {
		return nil
	}
	return errRead
}

// present lists a file's data (SEEK_DATA, SEEK_HOLE).
func (f *file) present() []fscache.Extent {
	var extents []fscache.Extent
	for at := int64(0); at < f.size; at += page {
		if f.pages[at] == nil {
			continue
		}
		if n := len(extents); n > 0 && extents[n-1].Off+extents[n-1].Len == at {
			extents[n-1].Len += page
		} else {
			extents = append(extents, fscache.Extent{Off: at, Len: page})
		}
	}
	return extents
}

// check refuses ranges outside the file, and those not of whole pages.
func (f *file) check(off, n int64, aligned bool) error {
	if off < 0 || n < 0 || n > f.size || off > f.size-n {
		return fmt.Errorf("range %d+%d is outside %d bytes", off, n, f.size)
	}
	if aligned && (off%page != 0 || n%page != 0) {
		return errors.New("range is not of whole blocks")
	}
	return nil
}
