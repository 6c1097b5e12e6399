package cachefiles

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// devicePath is the cachefiles device (fs/cachefiles/main.c, a misc device).
const devicePath = "/dev/cachefiles"

// anonName is what /proc/self/fd shows of an object's descriptor (ondemand.c, cachefiles_ondemand_get_fd).
const anonName = "anon_inode:[cachefiles]"

// A device is an open /dev/cachefiles in Go's poller.
type device struct {
	f   *os.File
	raw syscall.RawConn
	buf [CACHEFILES_MSG_MAX_SIZE]byte // guarded by f's read lock, which raw.Read holds
}

// openDevice opens the device. Nobody else has it then: it has one opener at a time.
func openDevice() (*os.File, error) {
	fd, err := unix.Open(devicePath, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return nil, fmt.Errorf("open %s: %w: the kernel has no cachefiles: it needs CONFIG_CACHEFILES_ONDEMAND and "+
			"CONFIG_EROFS_FS_ONDEMAND (Linux 5.19 to 7.1; removed in 7.2), or modprobe cachefiles", devicePath, err)
	case errors.Is(err, unix.EBUSY):
		return nil, fmt.Errorf("open %s: %w: another process has it, or has objects of it open (cachefilesd? another holdfast? see fuser %s)",
			devicePath, err, devicePath)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return nil, fmt.Errorf("open %s: %w (needs CAP_SYS_ADMIN)", devicePath, err)
	case err != nil:
		return nil, fmt.Errorf("open %s: %w", devicePath, err)
	}
	return os.NewFile(uintptr(fd), devicePath), nil
}

// pollable puts the device into Go's poller, which polls it at once: `restore` must have been written before
// (CVE-2024-39510, CVE-2024-40899, CVE-2024-42250). f is closed.
func pollable(f *os.File) (*device, error) {
	defer f.Close()
	var dup int
	err := control(f, func(fd int) (err error) {
		if dup, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			return fmt.Errorf("dup of %s: %w", devicePath, err)
		}
		// Go polls only what is non-blocking. The device itself never blocks, whatever this flag says.
		if err := unix.SetNonblock(dup, true); err != nil {
			_ = unix.Close(dup)
			return fmt.Errorf("%s: %w", devicePath, err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	d := &device{f: os.NewFile(uintptr(dup), devicePath)}
	if err := d.f.SetReadDeadline(time.Time{}); err != nil {
		_ = d.f.Close()
		return nil, fmt.Errorf("%s cannot be polled: %w", devicePath, err)
	}
	if d.raw, err = d.f.SyscallConn(); err != nil {
		_ = d.f.Close()
		return nil, err
	}
	return d, nil
}

// read waits for one message. For an OPEN, anon is the object's descriptor. Errors are the kernel's errno, a
// *MalformedError (the message then holds its header, if bytes says so), or those of a file that is closed or past its deadline.
func (d *device) read() (m Message, anon *os.File, bytes int, err error) {
	var readErr error
	err = d.raw.Read(func(fd uintptr) bool {
		// The kernel hands the object's descriptor out without close-on-exec: no fork may come in between.
		syscall.ForkLock.RLock()
		defer syscall.ForkLock.RUnlock()
		bytes, readErr = unix.Read(int(fd), d.buf[:])
		switch {
		case readErr != nil:
			return true
		case bytes == 0:
			return false // no request (cachefiles_ondemand_daemon_read), not the end of anything
		}
		if m, readErr = DecodeMessage(d.buf[:bytes]); readErr == nil && m.Opcode == CACHEFILES_OP_OPEN {
			anon, readErr = own(int(m.Open.FD))
		}
		return true
	})
	return m, anon, bytes, errors.Join(err, readErr)
}

// own takes the descriptor that a message names. It must be one of cachefiles': a message that lies must not make us
// close something else.
func own(fd int) (*os.File, error) {
	link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil || link != anonName {
		return nil, fmt.Errorf("fd %d of an open request is %q, not a cachefiles object: %w",
			fd, link, errors.Join(&MalformedError{Field: "fd", Value: uint64(fd), Have: msgLen + openLen}, err))
	}
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), anonName), nil
}

// command writes one command.
func command(f *os.File, text string) error {
	err := control(f, func(fd int) error {
		_, err := unix.Write(fd, []byte(text))
		return err
	})
	if err != nil {
		return fmt.Errorf("cachefiles command %q: %w", text, err)
	}
	return nil
}

// control runs op on f's descriptor, which stays open meanwhile. It returns os.ErrClosed if f is closed.
func control(f *os.File, op func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var opErr error
	if err := raw.Control(func(fd uintptr) { opErr = op(int(fd)) }); err != nil {
		return os.ErrClosed // Go has an error of its own here, which nothing matches
	}
	return opErr
}
