package fanotify

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// checkHolesIn is checkHoles of a cache directory. On a full disk it cannot be tried, and what has cache files in it was tried when the first of
// them was made: a daemon that starts on a full disk serves what is cached.
func checkHolesIn(dir string) error {
	err := checkHoles(dir)
	if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return err
	}
	entries, err2 := os.ReadDir(dir)
	if err2 == nil && slices.ContainsFunc(entries, os.DirEntry.IsDir) {
		return nil
	}
	return errors.Join(err, err2)
}

// checkHoles says whether the file system of dir tells data from holes block by block, by trying. What it calls data after
// a restart is taken for what was written (I5): where it allocates in larger units, the zeros around a block would be too.
func checkHoles(dir string) error {
	f, err := os.CreateTemp(dir, ".probe-*")
	if err != nil {
		return err
	}
	defer f.Close()
	defer os.Remove(f.Name())
	const at, size = 16 * fscache.BlockSize, 64 * fscache.BlockSize
	if err := f.Truncate(size); err != nil {
		return err
	}
	if _, err := f.WriteAt(make([]byte, fscache.BlockSize), at); err != nil {
		return err
	}
	return control(f, func(fd int) error {
		data, err := unix.Seek(fd, 0, unix.SEEK_DATA)
		if err != nil {
			return fmt.Errorf("its file system does not tell data from holes: SEEK_DATA: %w", err)
		}
		hole, err := unix.Seek(fd, at, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("its file system does not tell data from holes: SEEK_HOLE: %w", err)
		}
		if data != at || hole != at+fscache.BlockSize {
			return fmt.Errorf("its file system calls %d to %d data where %d bytes were written at %d: keep the cache on one with blocks of %d bytes",
				data, hole, fscache.BlockSize, at, fscache.BlockSize)
		}
		return nil
	})
}
