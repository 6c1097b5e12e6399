package inject

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// DropCache makes the kernel forget the pages it has of a range of a file, as far as nobody uses them, so that the next read asks the file system.
func DropCache(f *os.File, off, n int64) error {
	if err := unix.Fadvise(int(f.Fd()), off, n, unix.FADV_DONTNEED); err != nil {
		return fmt.Errorf("drop cached pages of %s: %w", f.Name(), err)
	}
	return nil
}

// Space returns how many bytes of a file system are free for anybody, and how many it has.
func Space(path string) (free, size int64, err error) {
	var s unix.Statfs_t
	if err := unix.Statfs(path, &s); err != nil {
		return 0, 0, fmt.Errorf("ask how full the file system of %s is: %w", path, err)
	}
	return int64(s.Bavail) * s.Bsize, int64(s.Blocks) * s.Bsize, nil
}

// Fill takes all that is free of a file system, by allocating blocks of a new file at path, without writing them. undo removes the file.
func Fill(path string) (taken int64, undo func() error, err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, nil, fmt.Errorf("fill the disk: %w", err)
	}
	undo = func() error { return errors.Join(f.Close(), os.Remove(path)) }
	for step := int64(1 << 30); step >= 4096; {
		err := unix.Fallocate(int(f.Fd()), 0, taken, step)
		switch {
		case err == nil:
			taken += step
		case errors.Is(err, unix.ENOSPC):
			step /= 2
		case errors.Is(err, unix.EINTR):
		default:
			return 0, nil, errors.Join(fmt.Errorf("fill the disk through %s: %w", path, err), undo())
		}
	}
	return taken, undo, nil
}

// Errno returns the kernel's name of the error number in err, or err's own words if there is none.
func Errno(err error) string {
	var n syscall.Errno
	if errors.As(err, &n) {
		if name := unix.ErrnoName(n); name != "" {
			return name
		}
	}
	return err.Error()
}

// IsMountPoint reports whether a file system is mounted on a directory: whether it lies on another device than its parent.
func IsMountPoint(dir string) bool {
	var own, above unix.Stat_t
	return unix.Stat(dir, &own) == nil && unix.Stat(filepath.Join(dir, ".."), &above) == nil && own.Dev != above.Dev
}
