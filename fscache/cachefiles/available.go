package cachefiles

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/internal/erofs"
)

// Available says whether this engine can work with its cache in dir, which must exist, by trying: direct I/O and holes in
// dir, EROFS's options, the device, a cache in dir for a moment. The error names what is missing. The device has one
// opener at a time, so another engine's shows as busy and is not disturbed; a process that inherited the device opens its
// engine without asking. It leaves nothing behind.
func Available(dir string) error {
	if err := available(dir); err != nil {
		return fmt.Errorf("cachefiles engine in %s: %w", dir, err)
	}
	return nil
}

func available(dir string) error {
	c := Config{Dir: dir, Tag: defaultTag}
	if err := checkConfig(c); err != nil {
		return err
	}
	if err := tryDirectIO(dir); err != nil {
		return err
	}
	if err := mountable(); err != nil {
		return err
	}
	f, err := openDevice()
	if err != nil {
		return err
	}
	defer f.Close()
	for _, name := range []string{"cache", "graveyard"} { // what `bind` makes (cache.c, cachefiles_add_cache)
		path := filepath.Join(dir, name)
		if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
			defer os.Remove(path)
		}
	}
	if err := bind(f, c); err != nil {
		return err
	}
	return f.Close()
}

// mountable says whether EROFS can be mounted over fscache. Where it cannot, no mount depends on a cache.
func mountable() error {
	for _, option := range []string{"fsid", "domain_id"} {
		if err := erofs.TryOption(erofs.Option{Name: option, Value: "probe"}); err != nil {
			return fmt.Errorf("%w: EROFS over fscache needs CONFIG_CACHEFILES_ONDEMAND and CONFIG_EROFS_FS_ONDEMAND (Linux 5.19 to 7.1; removed in 7.2)", err)
		}
	}
	return nil
}

// Unused reports whether nothing depends on an inherited device, and nothing will: no cache is bound to it (cachefiles_daemon_inuse says EIO then,
// fs/cachefiles/daemon.c), and either the kernel cannot mount EROFS over fscache at all, or unwanted says that another engine is asked for. Such is
// the device that a socket unit holds on a host whose kernel has the cachefiles of NFS only. It changes nothing, and anyone may call it before
// [Open] takes the device over; a device that is doubtful is used.
func Unused(f *os.File, unwanted bool) bool {
	return checkDevice(f) == nil && (unwanted || mountable() != nil) && errors.Is(command(f, "inuse holdfast"), unix.EIO)
}

// tryDirectIO checks what `bind` does not: that files in dir take direct I/O and tell where their holes are.
func tryDirectIO(dir string) error {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("its file system has no O_TMPFILE or no direct I/O (ext4 and xfs have): move the cache directory: %w", err)
	}
	if err != nil {
		return fmt.Errorf("trying its file system: %w", err)
	}
	defer unix.Close(fd)
	const at = 1 << 20
	if _, err := unix.Pwrite(fd, fscache.AlignedBuffer(fscache.BlockSize), at); err != nil {
		return fmt.Errorf("direct I/O in its file system: %w", err)
	}
	if data, err := unix.Seek(fd, 0, unix.SEEK_DATA); err != nil || data == 0 {
		return fmt.Errorf("its file system does not tell holes from data (ext4 and xfs do): move the cache directory (SEEK_DATA: %d, %v)", data, err)
	}
	return nil
}
