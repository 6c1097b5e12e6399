package plain

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// A File is a cache file that is open for reading. Its methods may be called from any goroutine.
type File struct {
	f    *os.File
	path string
}

// Open opens a cache file. There may be none, with an error that wraps os.ErrNotExist.
func Open(path string) (*File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file: remove it", path)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &File{f, path}, nil
}

// Close closes the file.
func (f *File) Close() error { return f.f.Close() }

// Path is what the file was opened by.
func (f *File) Path() string { return f.path }

// ReadAt implements io.ReaderAt.
func (f *File) ReadAt(p []byte, off int64) (int, error) { return f.f.ReadAt(p, off) }

// Extents lists what of the first size bytes of the file is data, in order. Space that was allocated and never written is none.
func (f *File) Extents(size int64) (extents []fscache.Extent, err error) {
	err = f.control(func(fd int) error {
		for off := int64(0); off < size; {
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
			hole = min(hole, size)
			if hole <= data {
				return nil
			}
			extents = append(extents, fscache.Extent{Off: data, Len: hole - data})
			off = hole
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("find the data of %s: %w", f.path, err)
	}
	return extents, nil
}

// Sync makes the file, and that it is in its directory, outlive a power failure. What was read before it is what is kept.
func (f *File) Sync() error {
	if err := f.f.Sync(); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(f.path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Stamp is a text that is another one after anything was written to the file, punched out of it, or put in its place: inode, generation
// of its times, size. It holds across boots, where the file system brought them back: a file whose stamp after a boot is the one it had when it
// was synced has the bytes that were synced. The kernel sets ctime at every such change, and nobody else can.
func (f *File) Stamp() (string, error) {
	var st unix.Statx_t
	err := f.control(func(fd int) error {
		return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st)
	})
	if err != nil {
		return "", fmt.Errorf("stat %s: %w", f.path, err)
	}
	return fmt.Sprintf("%d %d %d.%09d %d.%09d", st.Ino, st.Size, st.Ctime.Sec, st.Ctime.Nsec, st.Btime.Sec, st.Btime.Nsec), nil
}

func (f *File) control(op func(fd int) error) error {
	raw, err := f.f.SyscallConn()
	if err != nil {
		return err
	}
	var opErr error
	if err := raw.Control(func(fd uintptr) { opErr = op(int(fd)) }); err != nil {
		return err
	}
	return opErr
}
