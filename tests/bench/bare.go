package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// A bareHandler is the floor that holdfast is measured against: the least code that can serve a file-backed EROFS mount
// whose data is not there yet. One thread reads an event, fill puts the bytes in their place, the answer is written.
// No table of objects, no sharing of fetches, no recovery.
type bareHandler struct {
	group int
	stop  int // an eventfd that ends the loop
	wg    sync.WaitGroup
	err   error
}

// fill puts the bytes [off, off+n) of the object into the file f, which raises no events.
type fill func(f int, off, n int64) error

// startBare marks the sparse file at path and serves it until Close.
func startBare(path string, do fill) (*bareHandler, error) {
	group, err := unix.FanotifyInit(unix.FAN_CLASS_PRE_CONTENT|unix.FAN_CLOEXEC|unix.FAN_UNLIMITED_QUEUE|unix.FAN_UNLIMITED_MARKS,
		unix.O_RDWR|unix.O_LARGEFILE|unix.O_CLOEXEC|unix.O_NOATIME)
	if err != nil {
		return nil, fmt.Errorf("fanotify_init: %w", err)
	}
	if err := unix.FanotifyMark(group, unix.FAN_MARK_ADD, unix.FAN_PRE_ACCESS, unix.AT_FDCWD, path); err != nil {
		unix.Close(group)
		return nil, fmt.Errorf("fanotify_mark %s: %w", path, err)
	}
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		unix.Close(group)
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	b := &bareHandler{group: group, stop: stop}
	b.wg.Add(1)
	go b.loop(do) // ends when Close writes to the eventfd; Close waits
	return b, nil
}

// Close ends the handler. Nothing may be mounted on its file any more: holes would read as zeros.
func (b *bareHandler) Close() error {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	if _, err := unix.Write(b.stop, one[:]); err != nil {
		return err
	}
	b.wg.Wait()
	return errors.Join(b.err, unix.Close(b.group), unix.Close(b.stop))
}

func (b *bareHandler) loop(do fill) {
	defer b.wg.Done()
	buf := make([]byte, 4096)
	fds := []unix.PollFd{{Fd: int32(b.group), Events: unix.POLLIN}, {Fd: int32(b.stop), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
			b.err = err
			return
		}
		if fds[1].Revents != 0 {
			return
		}
		if fds[0].Revents == 0 {
			continue
		}
		n, err := unix.Read(b.group, buf)
		if err != nil {
			b.err = err
			return
		}
		for p := buf[:n]; len(p) >= 48; p = p[binary.NativeEndian.Uint32(p):] {
			b.serve(p, do)
		}
	}
}

// serve answers one event: metadata of 24 bytes, of which the fd is at 16, then a range record with its offset at 8.
func (b *bareHandler) serve(event []byte, do fill) {
	fd := int(int32(binary.NativeEndian.Uint32(event[16:])))
	off := int64(binary.NativeEndian.Uint64(event[24+8:]))
	n := int64(binary.NativeEndian.Uint64(event[24+16:]))
	response := uint32(unix.FAN_ALLOW)
	if err := do(fd, off, n); err != nil {
		fmt.Fprintln(os.Stderr, "bare handler:", err)
		response = unix.FAN_DENY
	}
	var answer [8]byte
	binary.NativeEndian.PutUint32(answer[0:], uint32(fd))
	binary.NativeEndian.PutUint32(answer[4:], response)
	if _, err := unix.Write(b.group, answer[:]); err != nil {
		fmt.Fprintln(os.Stderr, "bare handler: answer:", err)
	}
	unix.Close(fd)
}

// mountBare mounts bootstrap with one blob file, with nobody watching either.
func mountBare(bootstrap, blob, dir string) error {
	if err := unix.Mount(bootstrap, dir, "erofs", unix.MS_RDONLY, "device="+blob); err != nil {
		return fmt.Errorf("mount %s on %s: %w", bootstrap, dir, err)
	}
	return nil
}
