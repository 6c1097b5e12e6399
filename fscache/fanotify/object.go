package fanotify

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// inode names a file to the kernel.
type inode struct{ dev, ino uint64 }

// An object is a cache file that was added.
type object struct {
	key   fscache.Key
	path  string // for messages and mount options
	size  int64
	inode inode

	// quiet is a descriptor whose reads and writes raise no events: opened before the mark, or the kernel's own from an
	// event. Nil until there is one, which is only while nothing was read since a successor took the group over.
	quiet atomic.Pointer[os.File]
	// seek finds data and holes, which raises no event on any descriptor. It is quiet, or stands in until there is one:
	// see file.
	seek *os.File

	marked atomic.Bool // changes under changing

	// changing is held by the one who adds, completes, mounts or removes the object, also while the holder works on it, and by nobody else.
	// Taken before Engine.mu.
	changing sync.Mutex
	held     atomic.Bool // changed under changing: the holder has quiet
	complete bool        // guarded by changing
	gone     atomic.Bool // changed under changing: removed

	mu        sync.Mutex
	dirSynced bool // guarded by mu
}

func (o *object) object() fscache.Object { return fscache.Object{Key: o.key, Size: o.size} }

// checkName refuses what is not the name of one file in one directory.
func checkName(what, s string) error {
	switch {
	case s == "":
		return fmt.Errorf("%s is empty", what)
	case s == "." || s == "..", strings.ContainsAny(s, "/\x00"):
		return fmt.Errorf("%s %q cannot be a file name", what, s)
	case len(s) > 255: // NAME_MAX, include/uapi/linux/limits.h
		return fmt.Errorf("%s %.20q... has %d bytes, more than 255", what, s, len(s))
	}
	return nil
}

// checkObject refuses names and sizes no cache file can have.
func checkObject(o fscache.Object) error {
	if err := errors.Join(checkName("domain", o.Key.Domain), checkName("object id", o.Key.ID)); err != nil {
		return err
	}
	if o.Size <= 0 || o.Size%fscache.BlockSize != 0 {
		return fmt.Errorf("object %s: size %d is not a positive multiple of %d", o.Key, o.Size, fscache.BlockSize)
	}
	return nil
}

// openObject opens the cache file of o below root (dir is root's path), sparse and of o's size, making it where absent.
func openObject(root *os.Root, dir string, o fscache.Object) (*object, error) {
	name := filepath.Join(o.Key.Domain, o.Key.ID)
	obj := &object{key: o.Key, path: filepath.Join(dir, name), size: o.Size}
	if err := root.Mkdir(o.Key.Domain, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("directory of domain %s: %w", o.Key.Domain, err)
	}
	f, err := root.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NOATIME, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errAgain // the domain's directory went with its last object
	}
	if err != nil {
		return nil, fmt.Errorf("cache file %s: %w", obj.path, err)
	}
	if err := obj.adjust(f); err != nil {
		_ = f.Close()
		return nil, err
	}
	obj.seek = f
	return obj, nil
}

// inodeOf asks which file a descriptor is of.
func inodeOf(f *os.File) (inode, error) {
	var st unix.Stat_t
	err := control(f, func(fd int) error { return unix.Fstat(fd, &st) })
	return inode{dev: st.Dev, ino: st.Ino}, err
}

// take makes a descriptor that the holder has the object's quiet one. Nobody else has the object yet.
func (o *object) take(f *os.File) {
	_ = o.seek.Close() // only opened
	o.seek = f
	o.held.Store(true)
	o.quiet.Store(f)
}

// adjust checks that f is the object's file, and gives a new one its size.
func (o *object) adjust(f *os.File) error {
	var st unix.Stat_t
	if err := control(f, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return fmt.Errorf("cache file %s: %w", o.path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("cache file %s is not a regular file: move it away", o.path)
	}
	o.inode = inode{dev: st.Dev, ino: st.Ino}
	switch st.Size {
	case o.size:
		return nil
	case 0:
		if err := f.Truncate(o.size); err != nil {
			return fmt.Errorf("cache file %s: %w", o.path, err)
		}
		return nil
	}
	return fmt.Errorf("cache file %s has %d bytes, the object has %d: remove the file if nothing has it mounted", o.path, st.Size, o.size)
}

// mark makes reads of the file raise events, from every description opened afterwards; changing is held.
func (o *object) mark(group *os.File) error {
	err := o.changeMark(group, unix.FAN_MARK_ADD)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("cache file %s: its file system cannot hold files under pre-content events (ext4, xfs and btrfs can): move the cache directory: %w", o.path, err)
	}
	if err != nil {
		return fmt.Errorf("mark on cache file %s: %w", o.path, err)
	}
	o.marked.Store(true)
	return nil
}

// unmark makes the kernel stop asking; changing is held. A predecessor may have done so: ENOENT.
func (o *object) unmark(group *os.File) error {
	if !o.marked.Load() {
		return nil
	}
	if err := o.changeMark(group, unix.FAN_MARK_REMOVE); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("removing the mark of cache file %s: %w", o.path, err)
	}
	o.marked.Store(false)
	return nil
}

// changeMark names the file by descriptor, so that it is the one that was opened whatever happened to its name.
func (o *object) changeMark(group *os.File, op uint) error {
	return control(group, func(groupFD int) error {
		return control(o.file(), func(fd int) error {
			return unix.FanotifyMark(groupFD, op, unix.FAN_PRE_ACCESS, fd, "")
		})
	})
}

// inUse says whether anything else has the file open: a mount, or a reader that waits. It asks for a write lease, which
// the kernel gives only to the one opener of a file (fs/locks.c, check_conflicting_open), and gives it back.
func (o *object) inUse() (bool, error) {
	file := o.file()
	if file != o.seek {
		_ = o.seek.Close() // no longer needed, and it would count as somebody else's; only read from
	}
	return openElsewhere(file)
}

// openElsewhere is inUse of a file.
func openElsewhere(f *os.File) (bool, error) {
	err := control(f, func(fd int) error {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
			return err
		}
		_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK)
		return err
	})
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EBUSY) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("lease on cache file %s: %w", f.Name(), err)
	}
	return false, nil
}

// file returns a descriptor for what raises no event on any: everything but reading and writing.
func (o *object) file() *os.File {
	if q := o.quiet.Load(); q != nil {
		return q
	}
	return o.seek
}

// adopt makes a copy of an event's descriptor the object's quiet one.
func (o *object) adopt(eventFD int) error {
	fd, err := unix.FcntlInt(uintptr(eventFD), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cache file %s: keeping the event's descriptor: %w", o.path, err)
	}
	o.quiet.Store(os.NewFile(uintptr(fd), o.path))
	return nil
}

// open returns the quiet descriptor, or ErrNotOpen.
func (o *object) open() (*os.File, error) {
	if f := o.quiet.Load(); f != nil {
		return f, nil
	}
	return nil, fmt.Errorf("cache file %s: taken over from another process and not read since: %w", o.path, fscache.ErrNotOpen)
}

// check refuses ranges outside the file, and writes that are not of whole blocks.
func (o *object) check(off, n int64, aligned bool) error {
	if off < 0 || n < 0 || n > o.size || off > o.size-n {
		return fmt.Errorf("cache file %s: range %d+%d is outside its %d bytes", o.path, off, n, o.size)
	}
	if aligned && (off%fscache.BlockSize != 0 || n%fscache.BlockSize != 0) {
		return fmt.Errorf("cache file %s: range %d+%d is not of whole blocks of %d bytes", o.path, off, n, fscache.BlockSize)
	}
	return nil
}

func (o *object) writeAt(p []byte, off int64) error {
	if err := o.check(off, int64(len(p)), true); err != nil {
		return err
	}
	f, err := o.open()
	if err != nil {
		return err
	}
	_, err = f.WriteAt(p, off)
	return o.ioError("writing", off, err)
}

func (o *object) readAt(p []byte, off int64) error {
	if err := o.check(off, int64(len(p)), false); err != nil {
		return err
	}
	f, err := o.open()
	if err != nil {
		return err
	}
	_, err = f.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return o.ioError("reading", off, err)
}

func (o *object) drop(e fscache.Extent) error {
	o.changing.Lock()
	defer o.changing.Unlock()
	if o.complete {
		return fmt.Errorf("cache file %s: the kernel does not ask about it any more, and would read a hole's zeros: %w", o.path, fscache.ErrBusy)
	}
	if err := o.check(e.Off, e.Len, true); err != nil || e.Len == 0 {
		return err
	}
	f, err := o.open()
	if err != nil {
		return err
	}
	err = control(f, func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, e.Off, e.Len)
	})
	return o.ioError("punching a hole into", e.Off, err)
}

// ioError names the file and maps what the caller compares.
func (o *object) ioError(doing string, off int64, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrClosed):
		err = fscache.ErrUnknown // removed, or the engine was closed, meanwhile
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		err = fmt.Errorf("%w: %w", fscache.ErrNoSpace, err)
	}
	return fmt.Errorf("%s cache file %s at %d: %w", doing, o.path, off, err)
}

// hasHoles says whether bytes of the file are not there. Asking raises no event.
func (o *object) hasHoles() (bool, error) {
	var hole int64
	err := control(o.file(), func(fd int) (err error) {
		hole, err = unix.Seek(fd, 0, unix.SEEK_HOLE)
		return err
	})
	return hole < o.size, o.ioError("finding holes of", 0, err)
}

// present lists the file's data extents. Preallocated space that was never written is a hole (ext4 and xfs say so).
func (o *object) present() ([]fscache.Extent, error) {
	var extents []fscache.Extent
	err := control(o.file(), func(fd int) error {
		for off := int64(0); off < o.size; {
			data, err := unix.Seek(fd, off, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) {
				return nil
			}
			if err != nil {
				return err
			}
			hole, err := unix.Seek(fd, data, unix.SEEK_HOLE)
			if err != nil {
				return err
			}
			hole = min(hole, o.size)
			if hole <= data {
				return nil
			}
			extents = append(extents, fscache.Extent{Off: data, Len: hole - data})
			off = hole
		}
		return nil
	})
	return extents, o.ioError("finding the data of", 0, err)
}

// sync makes the file's data durable, and once, that it exists.
func (o *object) sync() error {
	if err := control(o.file(), unix.Fdatasync); err != nil {
		return o.ioError("syncing", 0, err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.dirSynced {
		return nil
	}
	domain := filepath.Dir(o.path)
	for _, dir := range []string{domain, filepath.Dir(domain)} {
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	o.dirSynced = true
	return nil
}

// flush starts the writeback of what is dirty of an extent, and neither waits for it nor takes note of its errors (sync_file_range(2)), so
// that fdatasync still finds them.
func (o *object) flush(e fscache.Extent) error {
	if err := o.check(e.Off, e.Len, false); err != nil || e.Len == 0 {
		return err
	}
	err := control(o.file(), func(fd int) error { return unix.SyncFileRange(fd, e.Off, e.Len, unix.SYNC_FILE_RANGE_WRITE) })
	return o.ioError("starting the writeback of", e.Off, err)
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("syncing a directory: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("syncing directory %s: %w", path, err)
	}
	return nil
}

// close closes the descriptors.
func (o *object) close() error {
	err := o.file().Close()
	if e := o.seek.Close(); !errors.Is(e, os.ErrClosed) {
		err = errors.Join(err, e)
	}
	return err
}

// CacheFile is where an engine with its cache in dir has the cache file of an object.
func CacheFile(dir string, k fscache.Key) (string, error) {
	if err := errors.Join(checkName("domain", k.Domain), checkName("object id", k.ID)); err != nil {
		return "", err
	}
	return filepath.Join(dir, k.Domain, k.ID), nil
}
