package erofs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// maxValue is the longest value of an option, in bytes without its NUL (fs/fsopen.c, strndup_user(_value, 256)).
const maxValue = 255

// An Option is a mount option with a value.
type Option struct{ Name, Value string }

// CheckMountPoint refuses what cannot be mounted on, and what has a mount already: one mount would hide the other.
func CheckMountPoint(dir string) error {
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

// New makes a read-only mount that is not attached anywhere, and returns its descriptor. Errors hold the kernel's errno
// and what it said; those of the mount itself are a *RefusedError.
func New(options []Option) (int, error) {
	fsfd, err := fsopen()
	if err != nil {
		return -1, err
	}
	defer unix.Close(fsfd)
	if err := unix.FsconfigSetFlag(fsfd, "ro"); err != nil {
		return -1, fmt.Errorf("option ro: %w", err)
	}
	for _, o := range options {
		if len(o.Value) > maxValue {
			return -1, fmt.Errorf("option %s: %s has %d bytes, the kernel takes %d: use shorter names", o.Name, o.Value, len(o.Value), maxValue)
		}
		if err := unix.FsconfigSetString(fsfd, o.Name, o.Value); err != nil {
			return -1, fmt.Errorf("option %s=%s%s: %w", o.Name, o.Value, complaints(fsfd), err)
		}
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return -1, &RefusedError{Said: complaints(fsfd), Err: err}
	}
	fd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return -1, fmt.Errorf("fsmount: %w", err)
	}
	return fd, nil
}

// NewFromFiles makes a mount of an EROFS image in plain files that is not attached anywhere, and returns its descriptor. The
// kernel opens the files by these names.
func NewFromFiles(bootstrap string, devices []string) (int, error) {
	options := []Option{{Name: "source", Value: bootstrap}}
	for _, d := range devices {
		options = append(options, Option{Name: "device", Value: d})
	}
	fd, err := New(options)
	var refused *RefusedError
	switch {
	case errors.Is(err, unix.ENOTBLK):
		return -1, fmt.Errorf("the kernel cannot mount EROFS from a file (CONFIG_EROFS_FS_BACKED_BY_FILE, Linux 6.12): %w", err)
	case errors.As(err, &refused):
		return -1, fmt.Errorf("%w (the kernel log may say why: dmesg | grep erofs)", err)
	}
	return fd, err
}

// fsopen begins a mount.
func fsopen() (int, error) {
	fd, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	switch {
	case errors.Is(err, unix.ENODEV):
		return -1, fmt.Errorf("the kernel has no EROFS (CONFIG_EROFS_FS): %w", err)
	case errors.Is(err, unix.EPERM):
		return -1, fmt.Errorf("fsopen: %w (needs CAP_SYS_ADMIN)", err)
	case err != nil:
		return -1, fmt.Errorf("fsopen: %w", err)
	}
	return fd, nil
}

// TryOption says whether the kernel's EROFS has an option. One it was built without it accepts and complains about
// (fs/erofs/super.c, erofs_fc_parse_param).
func TryOption(o Option) error {
	fsfd, err := fsopen()
	if err != nil {
		return err
	}
	defer unix.Close(fsfd)
	err = unix.FsconfigSetString(fsfd, o.Name, o.Value)
	said := complaints(fsfd)
	if err != nil {
		return fmt.Errorf("EROFS has no option %s%s: %w", o.Name, said, err)
	}
	if said != "" {
		return fmt.Errorf("EROFS was built without option %s%s", o.Name, said)
	}
	return nil
}

// Attach puts a mount that New made on dir.
func Attach(mount int, dir string) error {
	if err := unix.MoveMount(mount, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return nil
}

// A RefusedError is the file system's own refusal to mount.
type RefusedError struct {
	Said string // what it said, in brackets behind a blank, or nothing
	Err  error
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("the kernel refuses the image%s: %v", e.Said, e.Err)
}

// Unwrap returns the errno.
func (e *RefusedError) Unwrap() error { return e.Err }

// complaints returns what the file system said about a failed mount (fs/fs_context.c, the message log).
func complaints(fsfd int) string {
	var said []string
	var buf [512]byte
	for range 8 { // the log holds 8 messages
		n, err := unix.Read(fsfd, buf[:])
		if err != nil || n <= 0 {
			break
		}
		said = append(said, strings.TrimSpace(strings.TrimPrefix(string(buf[:n]), "e ")))
	}
	if len(said) == 0 {
		return ""
	}
	return " (" + strings.Join(said, "; ") + ")"
}

// MaxName is how much the kernel keeps of a mount's name in sysfs, in bytes (include/linux/fs.h, s_sysfs_name: UUID_STRING_LEN).
const MaxName = 36

// Lives says whether a mount with that name in sysfs exists, in whatever mount namespace (fs/erofs/sysfs.c). Kernels before 6.9 do
// not cut the name.
func Lives(name string) (bool, error) {
	for _, n := range []string{name, name[:min(len(name), MaxName)]} {
		_, err := os.Lstat(filepath.Join("/sys/fs/erofs", n))
		if !errors.Is(err, os.ErrNotExist) {
			return err == nil, err
		}
	}
	return false, nil
}

// Mounted says whether dir is where an EROFS image is mounted.
func Mounted(dir string) (bool, error) {
	root, err := isMountRoot(dir)
	if err != nil {
		return false, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return false, err
	}
	return root && st.Type == unix.EROFS_SUPER_MAGIC_V1, nil
}

// Unmount unmounts the image on dir, and nothing that is not EROFS. fscache.ErrBusy: files in it are open.
func Unmount(dir string) error { return unmount(dir, 0) }

// Detach is Unmount of an image that is in use: what is open in it stays open, and nobody finds it there any more.
func Detach(dir string) error { return unmount(dir, unix.MNT_DETACH) }

func unmount(dir string, flags int) error {
	mounted, err := Mounted(dir)
	if err != nil {
		return fmt.Errorf("unmounting %s: %w", dir, err)
	}
	if !mounted {
		return fmt.Errorf("unmounting %s: no image is mounted there", dir)
	}
	err = unix.Unmount(dir, flags|unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("unmounting %s: something has files in it open (see fuser -m %s): %w", dir, dir, fscache.ErrBusy)
	}
	if err != nil {
		return fmt.Errorf("unmounting %s: %w", dir, err)
	}
	return nil
}
