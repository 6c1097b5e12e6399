package fanotify

import (
	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// Evict implements fscache.Engine.
func (e *Engine) Evict(k fscache.Key, x fscache.Extent) error {
	o, err := e.object(k)
	if err != nil {
		return err
	}
	if err := o.check(x.Off, x.Len, false); err != nil {
		return err
	}
	err = control(o.file(), func(fd int) error {
		// Only what is clean is dropped (mm/fadvise.c), and the call waits for no write.
		if err := unix.SyncFileRange(fd, x.Off, x.Len, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER); err != nil {
			return err
		}
		return unix.Fadvise(fd, x.Off, x.Len, unix.FADV_DONTNEED)
	})
	return o.ioError("evicting", x.Off, err)
}
