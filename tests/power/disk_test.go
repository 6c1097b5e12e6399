package power

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A fileSystem is one to put under the root directory.
type fileSystem struct {
	name    string
	make    []string // the command that makes it, but for the file
	kind    string
	options string // of the mount
}

// diskSize is in bytes: mkfs.xfs makes none below 300 MB.
const diskSize = 320 << 20

// fileSystems are those on which the power is cut. ext4 commits its journal so many seconds after a change at the latest: 5 where nothing is said.
func fileSystems() (all []fileSystem) {
	ext4 := []string{"mkfs.ext4", "-q", "-F", "-N", "16384", "-J", "size=8", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"}
	for _, commit := range []string{"1", "5", "60"} {
		all = append(all, fileSystem{"ext4-commit-" + commit, ext4, "ext4", "commit=" + commit})
	}
	return append(all, fileSystem{"xfs", []string{"mkfs.xfs", "-q", "-f", "-K"}, "xfs", ""})
}

// newDisk makes a file with the file system.
func (fs fileSystem) newDisk(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(diskSize), f.Close()); err != nil {
		return err
	}
	_, err = run(fs.make[0], append(fs.make[1:len(fs.make):len(fs.make)], path)...)
	return err
}

// mount mounts a block device; what the file system has to recover it recovers here.
func (fs fileSystem) mount(device, dir string) error {
	if err := unix.Mount(device, dir, fs.kind, 0, fs.options); err != nil {
		return fmt.Errorf("mount %s with %s: %w", device, fs.name, err)
	}
	return nil
}

// unmount waits until nothing uses the file system any more: the kernel lets go of cache files in its own time.
func unmount(dir string) error {
	return until("unmount "+dir, func() error { return unix.Unmount(dir, 0) })
}

// loop makes a block device of a file, and detach undoes that.
func loop(path string) (device string, err error) { return run("losetup", "--find", "--show", path) }

func detach(device string) error {
	_, err := run("losetup", "--detach", device)
	return err
}

// shutdownCall is EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN, _IOR('X', 125, __u32) (fs/ext4/ext4.h, fs/xfs/libxfs/xfs_fs.h), and noLogFlush the
// flag of both that has nothing written any more, not even the journal that is in memory.
const (
	shutdownCall = 0x8004587d
	noLogFlush   = 2
)

// cutPower has the file system on dir write nothing any more.
func cutPower(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	how := uint32(noLogFlush)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), shutdownCall, uintptr(unsafe.Pointer(&how))); errno != 0 {
		return fmt.Errorf("shut down the file system on %s: %w", dir, errno)
	}
	return nil
}

// bootID is the kernel's, which this process has a file of its own bound over.
const bootID = "/proc/sys/kernel/random/boot_id"

// newBoot changes the boot id in this mount namespace.
func newBoot(n int) error {
	path := ram("boot_id")
	_, err := os.Stat(path)
	first := errors.Is(err, os.ErrNotExist)
	if err := os.WriteFile(path, fmt.Appendf(nil, "%08d-0000-4000-8000-000000000000\n", n), 0o600); err != nil {
		return err
	}
	if first {
		err = unix.Mount(path, bootID, "", unix.MS_BIND, "")
	} else {
		err = nil
	}
	if err != nil {
		return fmt.Errorf("bind a boot id: %w", err)
	}
	b, err := os.ReadFile(bootID)
	if err == nil && !strings.HasPrefix(string(b), fmt.Sprintf("%08d", n)) {
		err = fmt.Errorf("the boot id is %s", b)
	}
	return err
}
