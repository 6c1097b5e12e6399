package fanotify

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// maxFsconfigValue is the longest string fsconfig(2) takes, without its NUL (fs/fsopen.c, strndup_user(_value, 256)).
const maxFsconfigValue = 255

// Mount implements fscache.Engine: it mounts the bootstrap's file itself, with each blob's cache file as a device. Reads
// of the bootstrap raise no event, so its file must be complete.
func (e *Engine) Mount(ctx context.Context, m fscache.Mount) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := checkMountPoint(m.Dir); err != nil {
		return err
	}
	if !filepath.IsAbs(m.BootstrapPath) {
		return fmt.Errorf("mounting on %s: bootstrap path %q is not absolute", m.Dir, m.BootstrapPath)
	}
	devices := make([]string, 0, len(m.Blobs))
	for _, b := range m.Blobs {
		o, err := e.object(b.Key)
		if err != nil {
			return fmt.Errorf("mounting on %s: %w", m.Dir, err)
		}
		if o.size != b.Size {
			return fmt.Errorf("mounting on %s: object %s was added with %d bytes, the image says %d", m.Dir, b.Key, o.size, b.Size)
		}
		devices = append(devices, o.path)
	}
	fd, err := newMount(m.BootstrapPath, devices)
	if err != nil {
		return fmt.Errorf("mounting %s on %s: %w", m.BootstrapPath, m.Dir, err)
	}
	defer unix.Close(fd)
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, m.Dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mounting %s on %s: move_mount: %w", m.BootstrapPath, m.Dir, err)
	}
	return nil
}

// Unmount implements fscache.Engine.
func (e *Engine) Unmount(ctx context.Context, dir string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	root, err := isMountRoot(dir)
	if err != nil {
		return fmt.Errorf("unmounting %s: %w", dir, err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("unmounting %s: %w", dir, err)
	}
	if !root || st.Type != unix.EROFS_SUPER_MAGIC_V1 {
		return fmt.Errorf("unmounting %s: no image is mounted there", dir)
	}
	err = unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("unmounting %s: something has files in it open (see fuser -m %s): %w", dir, dir, fscache.ErrBusy)
	}
	if err != nil {
		return fmt.Errorf("unmounting %s: %w", dir, err)
	}
	return nil
}

// checkMountPoint refuses what cannot be mounted on, and what has a mount already: one mount would hide the other.
func checkMountPoint(dir string) error {
	if !filepath.IsAbs(dir) {
		return fmt.Errorf("mount point %q is not an absolute path", dir)
	}
	var st unix.Stat_t
	switch err := unix.Lstat(dir, &st); {
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("mount point %s does not exist: make the directory first: %w", dir, err)
	case err != nil:
		return fmt.Errorf("mount point %s: %w", dir, err)
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("mount point %s is not a directory: %w", dir, unix.ENOTDIR)
	}
	root, err := isMountRoot(dir)
	if err != nil {
		return fmt.Errorf("mount point %s: %w", dir, err)
	}
	if root {
		return fmt.Errorf("mount point %s has something mounted already: unmount it or choose another directory: %w", dir, fscache.ErrBusy)
	}
	return nil
}

// isMountRoot says whether dir is where a mount begins (STATX_ATTR_MOUNT_ROOT, Linux 5.8).
func isMountRoot(dir string) (bool, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_SYMLINK_NOFOLLOW, 0, &st); err != nil {
		return false, err
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

// newMount makes a mount of an EROFS image in plain files that is not attached anywhere, and returns its descriptor.
// fsopen(2) and not mount(2): mount's options end at a page, an image of 60 layers has more.
func newMount(bootstrap string, devices []string) (int, error) {
	fsfd, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	switch {
	case errors.Is(err, unix.ENODEV):
		return -1, fmt.Errorf("the kernel has no EROFS (CONFIG_EROFS_FS): %w", err)
	case errors.Is(err, unix.EPERM):
		return -1, fmt.Errorf("fsopen: %w (needs CAP_SYS_ADMIN)", err)
	case err != nil:
		return -1, fmt.Errorf("fsopen: %w", err)
	}
	defer unix.Close(fsfd)
	if err := unix.FsconfigSetFlag(fsfd, "ro"); err != nil {
		return -1, fmt.Errorf("option ro: %w", err)
	}
	if err := setPath(fsfd, "source", bootstrap); err != nil {
		return -1, err
	}
	for _, d := range devices {
		if err := setPath(fsfd, "device", d); err != nil {
			return -1, err
		}
	}
	err = unix.FsconfigCreate(fsfd)
	switch {
	case errors.Is(err, unix.ENOTBLK):
		return -1, fmt.Errorf("the kernel cannot mount EROFS from a file (CONFIG_EROFS_FS_BACKED_BY_FILE, Linux 6.12): %w", err)
	case err != nil:
		return -1, fmt.Errorf("the kernel refuses the image: %w (its reason is in the kernel log: dmesg | grep erofs)", err)
	}
	fd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return -1, fmt.Errorf("fsmount: %w", err)
	}
	return fd, nil
}

// setPath sets an option to the name of a file. The kernel opens it by that name during FsconfigCreate, so a name too
// long for fsconfig is refused here.
func setPath(fsfd int, option, path string) error {
	if len(path) > maxFsconfigValue {
		return fmt.Errorf("option %s: path %s has %d bytes, the kernel takes %d: use a shorter cache directory or domain", option, path, len(path), maxFsconfigValue)
	}
	if err := unix.FsconfigSetString(fsfd, option, path); err != nil {
		return fmt.Errorf("option %s=%s: %w", option, path, err)
	}
	return nil
}
