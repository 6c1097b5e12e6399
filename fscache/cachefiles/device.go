package cachefiles

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/internal/spare"
	"holdfast/state/crash"
)

// devicePath is the cachefiles device (fs/cachefiles/main.c, a misc device).
const devicePath = "/dev/cachefiles"

// anonName is what /proc/self/fd shows of an object's descriptor (ondemand.c, cachefiles_ondemand_get_fd).
const anonName = "anon_inode:[cachefiles]"

// A device is an open /dev/cachefiles.
type device struct {
	f     *os.File      // for commands, and the lifeline; never in the poller
	inbox fscache.Inbox // nil: requests are read into private memory

	// Set by start, before anything reads.
	polled *os.File // a copy of f in Go's poller
	raw    syscall.RawConn
	spare  *spare.Reserve // used under raw's read lock, and by the Next that has the turn

	// The slot for the next request. Guarded by raw's read lock, which raw.Read holds.
	slot    int
	buf     []byte // nil: none was taken
	private [CACHEFILES_MSG_MAX_SIZE]byte
}

// noSlot is the slot of a request that is in none.
const noSlot = -1

// A delivery is what one read(2) of the device brought.
type delivery struct {
	m    Message
	anon *os.File // the object's descriptor, of an OPEN
	n    int      // bytes
	slot int      // where they are, to be freed when the request is answered; noSlot: nowhere
}

// errStarved means that every slot of the inbox is lent: what is pending stays in the kernel until one is free.
var errStarved = errors.New("no free slot in the inbox")

// errNoDescriptor means that no descriptor is to be had for an object, should the next message be an OPEN: what is pending stays in the
// kernel until there is one, for it fails an OPEN that is read without (ondemand.c, cachefiles_ondemand_get_fd).
var errNoDescriptor = errors.New("no file descriptor for an object")

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

// start puts a copy of the device into Go's poller, which polls it at once: `restore` must have been written before
// (CVE-2024-39510, CVE-2024-40899, CVE-2024-42250).
func (d *device) start(log *zap.Logger) error {
	var dup int
	err := control(d.f, func(fd int) (err error) {
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
		return err
	}
	polled := os.NewFile(uintptr(dup), devicePath)
	if err := polled.SetReadDeadline(time.Time{}); err != nil {
		_ = polled.Close()
		return fmt.Errorf("%s cannot be polled: %w", devicePath, err)
	}
	raw, err := polled.SyscallConn()
	if err != nil {
		_ = polled.Close()
		return err
	}
	reserve, err := spare.New(log)
	if err != nil {
		_ = polled.Close()
		return err
	}
	d.polled, d.raw, d.spare = polled, raw, reserve
	return nil
}

// interrupt makes a read that waits return os.ErrDeadlineExceeded, and every later one until resume.
func (d *device) interrupt() error {
	if d.polled == nil {
		return nil
	}
	if err := d.polled.SetReadDeadline(time.Unix(1, 0)); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("stop reading %s: %w", devicePath, err)
	}
	return nil
}

// resume undoes interrupt.
func (d *device) resume() error { return d.polled.SetReadDeadline(time.Time{}) }

// read waits for one message. Errors are errStarved, errNoDescriptor, the kernel's errno, a *MalformedError (the message then holds its header,
// if n says so), or those of a file that is closed or past its deadline. The delivery's slot is lent whatever the error.
//
// The kernel writes the message straight into a slot of the inbox: from the instruction at which it is no longer the kernel's to
// deliver it is on record (I2).
func (d *device) read() (got delivery, err error) {
	got.slot = noSlot
	var readErr error
	err = d.raw.Read(func(fd uintptr) bool {
		if !d.lend() {
			readErr = errStarved
			return true
		}
		// The kernel hands the object's descriptor out without close-on-exec: no fork may come in between.
		syscall.ForkLock.RLock()
		defer syscall.ForkLock.RUnlock()
		if !d.spare.Ready() {
			readErr = errNoDescriptor
			return true
		}
		got.n, readErr = unix.Read(int(fd), d.buf)
		d.spare.Done(got.n > 0)
		switch {
		case readErr != nil:
			got.n = 0
			return true // nothing was written (cachefiles_ondemand_daemon_read): the slot serves the next
		case got.n == 0:
			return false // no request (cachefiles_ondemand_daemon_read), not the end of anything
		}
		crash.Point("cachefiles.next.after-read")
		got.slot = d.slot
		if got.m, readErr = DecodeMessage(d.buf[:got.n]); readErr == nil && got.m.Opcode == CACHEFILES_OP_OPEN {
			d.spare.Lowest(int(got.m.Open.FD))
			got.anon, readErr = own(int(got.m.Open.FD))
		}
		d.buf = nil
		return true
	})
	return got, errors.Join(err, readErr)
}

// lend takes a slot, unless there is one. It returns false while all are lent.
func (d *device) lend() bool {
	if d.buf != nil {
		return true
	}
	if d.inbox == nil {
		d.slot, d.buf = noSlot, d.private[:]
		return true
	}
	slot, p, ok := d.inbox.Take()
	if !ok {
		return false
	}
	d.slot, d.buf = slot, p[:CACHEFILES_MSG_MAX_SIZE]
	return true
}

// close closes the device, the lifeline last, and gives back the slot that was taken for a request that did not come.
func (d *device) close() error {
	var err error
	if d.polled != nil {
		err = d.polled.Close()
	}
	if d.buf != nil && d.slot != noSlot {
		d.inbox.Free(d.slot)
	}
	d.buf = nil
	d.spare.Close()
	return errors.Join(err, d.f.Close())
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
