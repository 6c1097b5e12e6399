package handover

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A LockedError says which process holds a lock.
type LockedError struct {
	Path string
	PID  int // 0 if the file does not say
}

func (e *LockedError) Error() string {
	if e.PID == 0 {
		return fmt.Sprintf("%s is locked by another process", e.Path)
	}
	return fmt.Sprintf("%s is locked by process %d", e.Path, e.PID)
}

// A Lock is held until Close, or until the process ends in whatever way.
type Lock struct{ f *os.File }

// TakeLock locks the file at path, creating it if need be, and writes this process's id into it. If another process holds the lock
// the error is a *LockedError. The file is never removed: one who waits on it and one who creates it anew would both have it.
func TakeLock(path string) (*Lock, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	if err := lockFile(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &Lock{f}, nil
}

func lockFile(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	ctlErr := raw.Control(func(fd uintptr) { err = unix.Flock(int(fd), unix.LOCK_EX|unix.LOCK_NB) })
	err = errors.Join(ctlErr, err)
	if errors.Is(err, unix.EWOULDBLOCK) {
		text, err := io.ReadAll(io.LimitReader(f, 32))
		if err != nil {
			return fmt.Errorf("read who locks %s: %w", f.Name(), err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil || pid < 0 {
			pid = 0 // the holder has not written it yet
		}
		return &LockedError{Path: f.Name(), PID: pid}
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	if err := f.Truncate(0); err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	if _, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0); err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	return nil
}

// Close gives the lock up.
func (l *Lock) Close() error { return l.f.Close() }

// File is the locked file, which a successor gets: the lock is the open file's, and both have it until both have closed it.
func (l *Lock) File() *os.File { return l.f }

// AdoptLock makes a lock of the file of another process's, and writes this process's id into it.
func AdoptLock(f *os.File) (*Lock, error) {
	if err := lockFile(f); err != nil {
		return nil, err
	}
	return &Lock{f}, nil
}
