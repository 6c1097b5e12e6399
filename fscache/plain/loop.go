package plain

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"holdfast/fscache/internal/erofs"
)

// loopTries bounds how often somebody else may take the loop device that the kernel said was free.
const loopTries = 64

// mountLoops is Mount by a read-only loop device for each file, which go with the mount (LO_FLAGS_AUTOCLEAR).
func mountLoops(bootstrap string, devices []string, dir string) error {
	var names []string
	for _, path := range append([]string{bootstrap}, devices...) {
		loop, err := attachLoop(path)
		if err != nil {
			return fmt.Errorf("loop device for %s: %w", path, err)
		}
		defer loop.Close() // the mount has it open by then, or nobody
		names = append(names, loop.Name())
	}
	fd, err := erofs.NewFromFiles(names[0], names[1:])
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return erofs.Attach(fd, dir)
}

// attachLoop makes a loop device of a file (Linux 5.8, LOOP_CONFIGURE); it is one for as long as somebody has it open.
func attachLoop(path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: the kernel needs CONFIG_BLK_DEV_LOOP", err)
	}
	defer control.Close()
	config := &unix.LoopConfig{Fd: uint32(file.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR}}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], path)
	for range loopTries {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free one: %w", err)
		}
		loop, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDONLY, 0)
		if err != nil {
			return nil, err
		}
		if err = unix.IoctlLoopConfigure(int(loop.Fd()), config); err == nil {
			return loop, nil
		}
		if err = errors.Join(err, loop.Close()); !errors.Is(err, unix.EBUSY) {
			return nil, err
		}
	}
	return nil, errors.New("others take every one that is free")
}
