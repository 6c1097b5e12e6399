package simkernel

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"holdfast/fscache"
)

// A Mode says which interface a Kernel has.
type Mode int

// The interfaces.
const (
	Cachefiles               Mode = iota + 1 // EROFS over fscache with restore: Linux 6.8 on, and late updates of 6.1 and 6.6
	Fanotify                                 // file-backed EROFS under pre-content marks: Linux 6.14 on
	CachefilesWithoutRestore                 // EROFS over fscache before 6.8, and vendors' kernels
)

const page = fscache.BlockSize

// A Kernel is the part that outlives processes. Its methods may be called from any goroutine.
type Kernel struct {
	mu        sync.Mutex
	changed   sync.Cond // something for Next, or a process ended
	mode      Mode
	device    *device // one of the two is nil
	group     *group
	low       lower // that one
	files     map[fscache.Key]*file
	mounts    map[string]*mount
	processes []*Engine // that are alive, oldest first
	reader    *Engine   // who read a request last
	kept      bool      // somebody else holds the lifeline
	room      int64     // see SetRoom
	wrong     []string  // see Violations
}

// A lower is what EROFS and readers see of the interface. All methods are called with Kernel.mu held. What takes a waiter
// calls done once, at once or later, with Kernel.mu held; never after cancel.
type lower interface {
	// mount and unmount are what mounting does to an image's objects.
	mount(w *waiter, m *mount, done func(error))
	unmount(m *mount)
	// fetch is a reader's wait for a range that is not in the page cache.
	fetch(w *waiter, k fscache.Key, off, n int64, done func(error))
	// cancel: who waits was killed.
	cancel(w *waiter)
	// released: the descriptors of a process are closed. last: nobody else holds the interface.
	released(p *Engine)
	last()
	// obligations lists what was read and waits for an answer.
	obligations() []fscache.Pending
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
	lost  bool                             // nothing of it can be read any more
	cache map[fscache.Key]map[int64][]byte // page cache of its files, by offset
}

// objects are the image's bootstrap and its blobs.
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
	object *kobject    // cachefiles
	number uint64      // message id, or event descriptor once read
	read   bool        // a process has it
	done   func(error) // nil: who waited was killed (FAN_EVENT_CANCELED)
}

// A waiter is what can be killed while it waits for a request.
type waiter struct {
	request *request
	again   bool // if that fails, it asks once more
}

// finish ends the wait for a request.
func (r *request) finish(err error) {
	if done := r.done; done != nil {
		r.done = nil
		done(err)
	}
}

// New makes a kernel with an empty cache. Somebody holds the lifeline (I4) until SetKept(false).
func New(mode Mode) *Kernel {
	k := &Kernel{mode: mode, files: make(map[fscache.Key]*file), mounts: make(map[string]*mount), kept: true}
	k.changed.L = &k.mu
	if mode == Fanotify {
		k.group = &group{k: k, marks: make(map[fscache.Key]bool)}
		k.low = k.group
	} else {
		k.device = newDevice(k, mode == Cachefiles)
		k.low = k.device
	}
	return k
}

// SetKept says whether something that outlives the processes holds the lifeline.
func (k *Kernel) SetKept(kept bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.kept = kept
	if !kept && len(k.processes) == 0 {
		k.low.last()
	}
}

// Keep is the supervisor taking a copy of an object's descriptor that a process has, for as long as until Let. It fails
// if there is none. For fanotify's descriptors, which keep nothing open that matters, it does nothing.
func (k *Kernel) Keep(h fscache.Held) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.device == nil {
		return nil
	}
	return k.device.keep(h.Handle)
}

// Let is the supervisor closing what it has of Keep.
func (k *Kernel) Let(h fscache.Held) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.device != nil {
		k.device.let(h.Handle)
	}
	k.changed.Broadcast()
}

// Mounts lists where images are mounted.
func (k *Kernel) Mounts() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Sorted(maps.Keys(k.mounts))
}

// Obligations lists what processes, dead ones too, have read and not answered, of readers that still wait.
func (k *Kernel) Obligations() []fscache.Pending {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.low.obligations()
}

// Violations lists what no correct process does, whether or not a reader noticed: an answer onto a hole, an answer that reached
// another's request, two processes that read.
func (k *Kernel) Violations() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.wrong
}

func (k *Kernel) violation(format string, args ...any) {
	k.wrong = append(k.wrong, fmt.Sprintf(format, args...))
}

// reads notes that a process read a request (I6).
func (k *Kernel) reads(p *Engine) {
	if r := k.reader; r != nil && r != p && !r.frozen {
		k.violation("two processes read requests (I6)")
	}
	k.reader = p
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

// mountOn begins a mount; the caller checked the objects.
func (k *Kernel) mountOn(w *waiter, m fscache.Mount, done func(error)) {
	if err := k.checkMountPoint(m.Dir); err != nil {
		done(err)
		return
	}
	n := &mount{Mount: m, cache: make(map[fscache.Key]map[int64][]byte)}
	for _, b := range m.Blobs {
		n.cache[b.Key] = make(map[int64][]byte)
	}
	k.low.mount(w, n, func(err error) {
		switch {
		case err != nil:
			err = fmt.Errorf("mounting on %s: %w", m.Dir, err)
		case k.mounts[m.Dir] != nil:
			k.low.unmount(n)
			err = fmt.Errorf("mount point %s has something mounted already: %w", m.Dir, fscache.ErrBusy)
		default:
			k.mounts[m.Dir] = n
		}
		done(err)
	})
	k.changed.Broadcast()
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

// abandon makes what is mounted on dir unreadable, and unmounts it lazily.
func (k *Kernel) abandon(dir string) error {
	m := k.mounts[dir]
	if dir == "" {
		return nil
	}
	if m == nil {
		return fmt.Errorf("abandoning %s: no image is mounted there", dir)
	}
	m.lost = true
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

// hole says whether a range that a reader was let on has one.
func (f *file) hole(off, n int64) bool {
	for at := off; at < min(off+n, f.size); at += page {
		if f.pages[at] == nil {
			return true
		}
	}
	return false
}

// write puts whole pages in the file.
func (f *file) write(p []byte, off int64) {
	b := append([]byte(nil), p...)
	for i := int64(0); i < int64(len(p)); i += page {
		f.pages[off+i] = b[i : i+page : i+page]
	}
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
