package fscache

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// A Space is the room on the cache's file system.
type Space struct {
	Total, Free        int64 // bytes; Free is what may still be written without the reserve of the superuser
	Inodes, FreeInodes int64 // 0 of 0: the file system has no fixed number of them
	Wanted             bool  // the kernel asks for culling (cachefiles: POLLOUT)
}

// SpaceOf asks for the room on the file system of dir, for engines.
func SpaceOf(dir string) (Space, error) {
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	for errors.Is(err, unix.EINTR) {
		err = unix.Statfs(dir, &st)
	}
	if err != nil {
		return Space{}, fmt.Errorf("asking for the free space of %s: %w", dir, err)
	}
	return Space{
		Total: int64(st.Blocks) * st.Bsize, Free: int64(st.Bavail) * st.Bsize,
		Inodes: int64(st.Files), FreeInodes: int64(st.Ffree),
	}, nil
}

// Watermarks say, in percent of what there is in all, how much is to be left free: from Run up nothing is culled, below Cull culling
// begins and goes on until Run is reached, below Stop nothing new is written.
type Watermarks struct{ Run, Cull, Stop int }

// Limits are the watermarks of space and of inodes; whichever of the two is lower counts (fs/cachefiles/cache.c, cachefiles_has_space).
type Limits struct{ Space, Inodes Watermarks }

// DefaultLimits are the kernel's own (fs/cachefiles/daemon.c, cachefiles_daemon_open).
var DefaultLimits = Limits{Space: Watermarks{7, 5, 1}, Inodes: Watermarks{7, 5, 1}}

// Check refuses watermarks that are not in order.
func (w Watermarks) Check() error {
	if w.Stop < 0 || w.Stop >= w.Cull || w.Cull >= w.Run || w.Run >= 100 {
		return fmt.Errorf("stop %d %%, cull %d %%, run %d %%: want 0 <= stop < cull < run < 100", w.Stop, w.Cull, w.Run)
	}
	return nil
}

// Check refuses limits that are not in order.
func (l Limits) Check() error {
	if err := l.Space.Check(); err != nil {
		return fmt.Errorf("watermarks of space: %w", err)
	}
	if err := l.Inodes.Check(); err != nil {
		return fmt.Errorf("watermarks of inodes: %w", err)
	}
	return nil
}

// Ample says whether nothing need be culled.
func (l Limits) Ample(s Space) bool {
	return !below(s.Free, s.Total, l.Space.Run) && !below(s.FreeInodes, s.Inodes, l.Inodes.Run)
}

// Low says whether culling is to begin.
func (l Limits) Low(s Space) bool {
	return below(s.Free, s.Total, l.Space.Cull) || below(s.FreeInodes, s.Inodes, l.Inodes.Cull)
}

// Stopped says whether n bytes more may not be written.
func (l Limits) Stopped(s Space, n int64) bool {
	return below(s.Free-n, s.Total, l.Space.Stop) || below(s.FreeInodes, s.Inodes, l.Inodes.Stop)
}

// below compares as the kernel does (fs/cachefiles/cache.c, cachefiles_add_cache): a hundredth of the whole is rounded down first.
func below(free, total int64, percent int) bool {
	return total > 0 && free < total/100*int64(percent)
}
