package cachefiles

import (
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// volumePrefix is how EROFS names a volume: "erofs,<domain>" (fs/erofs/fscache.c, erofs_fscache_register_volume).
const volumePrefix = "erofs,"

// Longest names, in bytes. A volume is the directory "I<volume key>", a cookie the file "D<cookie key>"; a longer cookie
// key is a kernel BUG (fs/cachefiles/key.c, cachefiles_cook_key).
const (
	maxDomain = 254 - len(volumePrefix)
	maxID     = 252
)

// maxVolume is the longest domain that names its volume itself. EROFS calls a mount "<domain>,<fsid>" in sysfs and cuts that at
// 36 bytes (fs/super.c, s_sysfs_name), and two mounts of one name there are EEXIST: this leaves 16 for the fsid.
const maxVolume = 19

// volumeOf is the domain as the kernel gets it: itself, or if it is too long a hash of it, which nothing else is named.
func volumeOf(domain string) string {
	if len(domain) <= maxVolume && !strings.HasPrefix(domain, "~") {
		return domain
	}
	sum := sha256.Sum256([]byte(domain))
	return "~" + base32.HexEncoding.EncodeToString(sum[:])[:maxVolume-1]
}

// printable says whether s has only printable ASCII, no blank, no slash (fscache refuses it in a volume key) and no comma
// (it ends a mount option where mount options are shown).
func printable(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' || s[i] == '/' || s[i] == ',' {
			return false
		}
	}
	return s != ""
}

func checkName(what, s string, longest int) error {
	switch {
	case len(s) > longest:
		return fmt.Errorf("%s %.20q... has %d bytes, more than %d", what, s, len(s), longest)
	case !printable(s) || s == "." || s == "..":
		return fmt.Errorf("%s %q: only printable ASCII without blank, slash and comma can name a cache object", what, s)
	}
	return nil
}

// checkObject refuses names and sizes no cache object can have.
func checkObject(o fscache.Object) error {
	if err := errors.Join(checkName("domain", o.Key.Domain, maxDomain), checkName("object id", o.Key.ID, maxID)); err != nil {
		return err
	}
	if o.Size <= 0 || o.Size%fscache.BlockSize != 0 {
		return fmt.Errorf("object %s: size %d is not a positive multiple of %d", o.Key, o.Size, fscache.BlockSize)
	}
	return nil
}

// keyOf returns the object an open request is about, or false if it is of no domain that was added. e.mu is held.
func (e *Engine) keyOf(o OpenBody) (fscache.Key, bool) {
	volume, _ := strings.CutPrefix(o.Volume, volumePrefix)
	domain, ok := e.domains[volume]
	return fscache.Key{Domain: domain, ID: o.Cookie}, ok && o.Volume == volumePrefix+volume
}

// check refuses writes outside the object, and those that are not of whole blocks.
func (o *object) check(off, n int64) error {
	if off < 0 || n > o.size || off > o.size-n {
		return fmt.Errorf("object %s: range %d+%d is outside its %d bytes", o.key, off, n, o.size)
	}
	if off%fscache.BlockSize != 0 || n%fscache.BlockSize != 0 {
		return fmt.Errorf("object %s: range %d+%d is not of whole blocks of %d bytes", o.key, off, n, fscache.BlockSize)
	}
	return nil
}

// A handle is one opening of an object by the kernel.
type handle struct {
	id     uint32 // the kernel's
	object *object
	f      *os.File    // write-only, not in the poller: Close waits for nobody, and takes effect when no write is under way
	opened atomic.Bool // copen with a size was written
	held   atomic.Bool // the Holder has a copy

	inherited bool // from a predecessor: whether the kernel still has it open is not known for certain
}

// bounces are buffers for writes from memory that direct I/O does not take.
var bounces = sync.Pool{New: func() any { b := fscache.AlignedBuffer(1 << 20); return &b }}

// writeAt writes whole blocks, which the kernel writes by direct I/O (ondemand.c, cachefiles_ondemand_fd_write_iter).
func (h *handle) writeAt(p []byte, off int64) error {
	if fscache.IsAligned(p) {
		return h.writeAligned(p, off)
	}
	buf := bounces.Get().(*[]byte)
	defer bounces.Put(buf)
	for len(p) > 0 {
		n := copy(*buf, p)
		if err := h.writeAligned((*buf)[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (h *handle) writeAligned(p []byte, off int64) error {
	if _, err := h.f.WriteAt(p, off); err != nil {
		return fmt.Errorf("writing object %s at %d: %w", h.object.key, off, h.cause(err))
	}
	return nil
}

// cause tells what an error of the object's descriptor stands for. The kernel says ENOBUFS for an object that has no
// file, not yet or no longer, and for a cache below its limit of free space; only the former has it for lseek(2) too.
func (h *handle) cause(err error) error {
	switch {
	case errors.Is(err, os.ErrClosed):
		return fscache.ErrNotOpen
	case errors.Is(err, unix.ENOBUFS) && !h.attached():
		return fmt.Errorf("%w: %w", fscache.ErrNotOpen, err)
	case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: %w", fscache.ErrNoSpace, err)
	}
	return err
}

// attached says whether the kernel has a file for the object: from a moment after copen until it drops the object.
func (h *handle) attached() bool { return h.file() == nil }

// file says why the object has no file, or nil.
func (h *handle) file() error {
	return control(h.f, func(fd int) error {
		_, err := unix.Seek(fd, 0, unix.SEEK_CUR)
		return err
	})
}

// complete ends a READ. The reader gets what is in the file now, or EIO where that begins with a hole.
func (h *handle) complete(msg uint32) error {
	err := control(h.f, func(fd int) error {
		return unix.IoctlSetInt(fd, CACHEFILES_IOC_READ_COMPLETE, int(msg))
	})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, os.ErrClosed) {
		return fscache.ErrGone
	}
	if err != nil {
		return fmt.Errorf("completing read %d of object %s: %w", msg, h.object.key, err)
	}
	return nil
}

// present lists the data extents of the object's file.
func (h *handle) present(size int64) (extents []fscache.Extent, err error) {
	err = control(h.f, func(fd int) (err error) {
		extents, err = dataExtents(fd, size)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("finding the data of object %s: %w", h.object.key, h.cause(err))
	}
	return extents, nil
}

// dataExtents lists the data extents of a file's first size bytes.
func dataExtents(fd int, size int64) (extents []fscache.Extent, err error) {
	for off := int64(0); off < size; {
		data, err := unix.Seek(fd, off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			return nil, err
		}
		hole, err := unix.Seek(fd, data, unix.SEEK_HOLE)
		if err != nil {
			return nil, err
		}
		hole = min(hole, size)
		if hole <= data {
			break
		}
		extents = append(extents, fscache.Extent{Off: data, Len: hole - data})
		off = hole
	}
	return extents, nil
}
