package cachefiles

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// fans is the number of directories an object's file can be in: they are named by a byte of a hash of the cookie key (namei.c).
const fans = 256

// A file is the cache file of an object that the kernel does not have open, by its path. That it has not is known only of objects
// that it has not opened since this engine bound the cache: a device that has one opener at a time has no other cache on its
// files, and what the kernel closed it renames into place in its own time (namei.c, cachefiles_commit_tmpfile).
//
// After a power failure the file may hold less or other bytes than were written: reading it back is how that is found (I5).
type file struct {
	mu   sync.Mutex
	used bool // the kernel has the file, or had it: hands off
	fan  int  // 1 + the directory it was found in; 0: not looked for
}

// hand gives the file to the kernel: from here on nothing is done by its path. What is under way ends first.
func (f *file) hand() {
	f.mu.Lock()
	f.used = true
	f.mu.Unlock()
}

// onFile runs op on the object's cache file, of which there may be none. ErrUnsupported: it is the kernel's.
func (e *Engine) onFile(o *object, flags int, op func(f *os.File) error) error {
	o.file.mu.Lock()
	defer o.file.mu.Unlock()
	if o.file.used {
		return errors.ErrUnsupported
	}
	f, err := e.openFile(o, flags)
	if errors.Is(err, os.ErrNotExist) {
		return op(nil)
	}
	if err != nil {
		return err
	}
	return errors.Join(op(f), f.Close())
}

// pathIn is where the cache in dir has an object's file, for one value of the hash: DIR/cache/I<volume key>/@<hash>/D<cookie key>
// (cache.c, volume.c, key.c: keys of printable characters stand as they are).
func pathIn(dir string, k fscache.Key, fan int) string {
	return filepath.Join(dir, "cache", "I"+volumePrefix+volumeOf(k.Domain), fmt.Sprintf("@%02x", fan), "D"+k.ID)
}

// CacheFile is where a cache in dir has the file of an object that the kernel does not have open. There may be none, with an error that
// wraps os.ErrNotExist.
func CacheFile(dir string, k fscache.Key) (string, error) {
	if err := errors.Join(checkName("domain", k.Domain, maxDomain), checkName("object id", k.ID, maxID)); err != nil {
		return "", err
	}
	for fan := range fans {
		path := pathIn(dir, k, fan)
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			return path, err
		}
	}
	return "", fmt.Errorf("cache file of object %s: %w", k, os.ErrNotExist)
}

// openFile looks for the file by its name in every directory it can be in. o.file.mu is held.
func (e *Engine) openFile(o *object, flags int) (*os.File, error) {
	first, last := o.file.fan-1, o.file.fan
	if o.file.fan == 0 {
		first, last = 0, fans
	}
	for fan := first; fan < last; fan++ {
		path := pathIn(e.dir.Name(), o.key, fan)
		f, err := os.OpenFile(path, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
			return nil, errors.Join(fmt.Errorf("%s is no regular file: remove it", path), err, f.Close())
		}
		o.file.fan = fan + 1
		return f, nil
	}
	return nil, os.ErrNotExist
}

// fileExtents lists what the file holds.
func (e *Engine) fileExtents(o *object) (extents []fscache.Extent, err error) {
	err = e.onFile(o, os.O_RDONLY, func(f *os.File) error {
		if f == nil {
			return nil
		}
		return control(f, func(fd int) (err error) {
			extents, err = dataExtents(fd, o.size)
			return err
		})
	})
	return extents, err
}

// readFile reads from the file; what it does not have is zero, as a hole is.
func (e *Engine) readFile(o *object, p []byte, off int64) error {
	return e.onFile(o, os.O_RDONLY, func(f *os.File) error {
		n := 0
		if f != nil {
			var err error
			if n, err = f.ReadAt(p, off); err != nil && err != io.EOF {
				return err
			}
			// The kernel reads its files by direct I/O: what the page cache keeps of them is of no use to anybody.
			_ = control(f, func(fd int) error { return unix.Fadvise(fd, off, int64(len(p)), unix.FADV_DONTNEED) })
		}
		clear(p[n:])
		return nil
	})
}

// punchFile makes a hole.
func (e *Engine) punchFile(o *object, x fscache.Extent) error {
	return e.onFile(o, os.O_WRONLY, func(f *os.File) error {
		if f == nil || x.Len == 0 {
			return nil
		}
		return control(f, func(fd int) error {
			return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, x.Off, x.Len)
		})
	})
}
