package fanotify

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	groupFlags = unix.FAN_CLASS_PRE_CONTENT | unix.FAN_CLOEXEC | unix.FAN_NONBLOCK |
		unix.FAN_UNLIMITED_QUEUE | unix.FAN_UNLIMITED_MARKS
	eventFlags = unix.O_RDWR | unix.O_LARGEFILE | unix.O_CLOEXEC | unix.O_NOATIME
)

// newGroup makes a pre-content group whose descriptor is in Go's poller.
func newGroup() (*os.File, error) {
	fd, err := unix.FanotifyInit(groupFlags, eventFlags)
	switch {
	case errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("fanotify_init: %w (needs CAP_SYS_ADMIN)", err)
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL):
		return nil, fmt.Errorf("fanotify_init of a pre-content group: %w (needs CONFIG_FANOTIFY and CONFIG_FANOTIFY_ACCESS_PERMISSIONS)", err)
	case err != nil:
		return nil, fmt.Errorf("fanotify_init: %w", err)
	}
	return os.NewFile(uintptr(fd), "fanotify"), nil
}

// adoptGroup takes over a group that another process made, and returns the inode numbers it has marks on. f is closed.
func adoptGroup(f *os.File) (*os.File, map[uint64]bool, error) {
	defer f.Close()
	var group *os.File
	err := control(f, func(fd int) error {
		if link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil || link != "anon_inode:[fanotify]" {
			return fmt.Errorf("inherited fd %d is %q, not a fanotify group (%v)", fd, link, err)
		}
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("dup of the inherited group: %w", err)
		}
		if err := unix.SetNonblock(dup, true); err != nil {
			_ = unix.Close(dup)
			return fmt.Errorf("inherited group: %w", err)
		}
		group = os.NewFile(uintptr(dup), "fanotify")
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	marked, err := markedInodes(group)
	if err != nil {
		_ = group.Close()
		return nil, nil, err
	}
	return group, marked, nil
}

// markedInodes lists the inodes a group watches, from /proc/self/fdinfo (fs/notify/fdinfo.c, fanotify_fdinfo). The
// number alone stands for the file: the device there is the super block's, which on btrfs is not stat's.
func markedInodes(group *os.File) (map[uint64]bool, error) {
	var text []byte
	err := control(group, func(fd int) (err error) {
		text, err = os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("marks of the inherited group: %w", err)
	}
	marked := make(map[uint64]bool)
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		rest, ok := strings.CutPrefix(lines.Text(), "fanotify ino:")
		if !ok {
			continue
		}
		hex, _, _ := strings.Cut(rest, " ")
		ino, err := strconv.ParseUint(hex, 16, 64)
		if err != nil {
			return nil, fmt.Errorf("marks of the inherited group: inode %q: %w", hex, err)
		}
		marked[ino] = true
	}
	return marked, nil
}

// descriptorLimit is how many descriptors a process of this unit can have: the hard limit, which Go programs run at
// (package os raises the soft one), and so did the predecessor.
func descriptorLimit() (int, error) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return 0, fmt.Errorf("RLIMIT_NOFILE: %w", err)
	}
	return int(min(lim.Max, 1<<20)), nil // 1<<20 is the default of fs.nr_open, the limit's limit
}

// control runs op on f's descriptor, which stays open meanwhile.
func control(f *os.File, op func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var opErr error
	if err := raw.Control(func(fd uintptr) { opErr = op(int(fd)) }); err != nil {
		return err
	}
	return opErr
}
