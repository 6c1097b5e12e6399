package main

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"holdfast/tests/vm/wire"
)

// msize is the 9p message size in bytes: the largest that the kernel's virtio transport takes (128 pages less its own header).
const msize = 500 << 10

// fileLimit is the hard limit of open files, the same as systemd's (256*2048); the soft limit is the kernel's usual 1024.
const fileLimit = 512 << 10

// mountPoint is one mount(2) call.
type mountPoint struct {
	source, dir, fstype string
	flags               uintptr
	data                string
}

func (m mountPoint) mount() error {
	if err := os.MkdirAll(m.dir, 0o755); err != nil {
		return fmt.Errorf("making mount point: %w", err)
	}
	if err := unix.Mount(m.source, m.dir, m.fstype, m.flags, m.data); err != nil {
		return fmt.Errorf("mounting %s (%s) on %s: %w", m.source, m.fstype, m.dir, err)
	}
	return nil
}

func mountAll(ms []mountPoint) error {
	for _, m := range ms {
		if err := m.mount(); err != nil {
			return err
		}
	}
	return nil
}

// mountKernelFS mounts what the kernel itself provides below root.
func mountKernelFS(root string) error {
	return mountAll([]mountPoint{
		{"proc", root + "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", root + "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"devtmpfs", root + "/dev", "devtmpfs", unix.MS_NOSUID, "mode=755"},
	})
}

// prepare turns the initramfs into a machine: the host's root below a tmpfs, the disk, the shares, loopback, limits.
func prepare(t wire.Task) error {
	const (
		lower = "/lower"
		cow   = "/cow"
		root  = "/newroot"
	)
	if err := mountAll([]mountPoint{
		{wire.RootTag, lower, "9p", unix.MS_RDONLY, fmt.Sprintf("trans=virtio,version=9p2000.L,cache=loose,msize=%d", msize)},
		{"tmpfs", cow, "tmpfs", 0, "mode=755"},
	}); err != nil {
		return err
	}
	for _, d := range []string{"/upper", "/work"} {
		if err := os.Mkdir(cow+d, 0o755); err != nil {
			return err
		}
	}
	if err := (mountPoint{"overlay", root, "overlay", 0, "lowerdir=" + lower + ",upperdir=" + cow + "/upper,workdir=" + cow + "/work"}).mount(); err != nil {
		return err
	}
	if err := mountKernelFS(root); err != nil {
		return err
	}
	if err := mountAll(userMounts(root, t)); err != nil {
		return err
	}
	if err := switchRoot(root); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte("holdfast-vm")); err != nil {
		return fmt.Errorf("setting the host name: %w", err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 1024, Max: fileLimit}); err != nil {
		return fmt.Errorf("raising the limit of open files: %w", err)
	}
	return loopbackUp()
}

// userMounts lists what an init system would have mounted, the disk, and the shares.
func userMounts(root string, t wire.Task) []mountPoint {
	ms := []mountPoint{
		{"devpts", root + "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=620,ptmxmode=666"},
		{"tmpfs", root + "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, ""},
		{"tmpfs", root + "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
		{"cgroup2", root + "/sys/fs/cgroup", "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	}
	if t.Disk {
		ms = append(ms, mountPoint{"/dev/vda", root + wire.DiskDir, "ext4", 0, ""})
	}
	for _, s := range t.Shares {
		// cache=mmap: writes go through to the host at once, and files can still be mapped and executed.
		ms = append(ms, mountPoint{s.Tag, filepath.Join(root, s.Dir), "9p", 0,
			fmt.Sprintf("trans=virtio,version=9p2000.L,cache=mmap,msize=%d", msize)})
	}
	return ms
}

// switchRoot makes dir the root of this process. The initramfs cannot be unmounted, which is why this is not pivot_root(2).
func switchRoot(dir string) error {
	if err := os.Chdir(dir); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("moving %s to /: %w", dir, err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("changing root to %s: %w", dir, err)
	}
	return os.Chdir("/")
}

func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bringing loopback up: %w", err)
	}
	defer unix.Close(s)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("bringing loopback up: %w", err)
	}
	return nil
}
