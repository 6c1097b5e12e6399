package plain

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"holdfast/fscache/fanotify"
	"holdfast/fscache/internal/erofs"
)

// Mount mounts a bootstrap with a file for each of its blobs on dir, an absolute path, as read-only EROFS. All files must be complete. Where the
// kernel cannot mount files (before Linux 6.12, or without CONFIG_EROFS_FS_BACKED_BY_FILE), or is known to give wrong bytes of them
// (fanotify.CheckKernel: a reader may be killed while the file system reads, too), they become loop devices, which go with the mount.
func Mount(bootstrap string, devices []string, dir string) error {
	if err := erofs.CheckMountPoint(dir); err != nil {
		return err
	}
	err := error(unix.ENOTBLK)
	if fanotify.CheckKernel() == nil {
		err = mountFiles(bootstrap, devices, dir)
	}
	if errors.Is(err, unix.ENOTBLK) {
		err = mountLoops(bootstrap, devices, dir)
	}
	if err != nil {
		return fmt.Errorf("mounting %s on %s: %w", bootstrap, dir, err)
	}
	return nil
}

func mountFiles(bootstrap string, devices []string, dir string) error {
	fd, err := erofs.NewFromFiles(bootstrap, devices)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return erofs.Attach(fd, dir)
}

// CheckMountPoint refuses what Mount cannot mount on.
func CheckMountPoint(dir string) error { return erofs.CheckMountPoint(dir) }

// Unmount is umount(2) of an EROFS image on dir, and of nothing else. The error wraps fscache.ErrBusy while files in it are open.
func Unmount(dir string) error { return erofs.Unmount(dir) }
