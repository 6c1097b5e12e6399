package cachefiles

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/state/crash"
)

// checkConfig refuses what the kernel's command parser would cut short (daemon.c, cachefiles_daemon_write).
func checkConfig(c Config) error {
	switch {
	case !filepath.IsAbs(c.Dir):
		return fmt.Errorf("cache directory %q is not an absolute path", c.Dir)
	case strings.ContainsAny(c.Dir, "\n\x00") || len(c.Dir) > 4000:
		return fmt.Errorf("cache directory %.60q has characters the kernel does not take, or too many", c.Dir)
	case c.Limits != (fscache.Limits{}) && c.Limits.Check() != nil:
		return c.Limits.Check()
	case !printable(c.Tag) || len(c.Tag) > 64:
		return fmt.Errorf("cache tag %.60q: only letters, digits and punctuation, at most 64", c.Tag)
	}
	return nil
}

// bind makes a cache of c.Dir.
func bind(f *os.File, c Config) error {
	texts := []string{"dir " + c.Dir, "tag " + c.Tag}
	if c.Limits != (fscache.Limits{}) {
		texts = append(append(texts, limitCommands("b", c.Limits.Space)...), limitCommands("f", c.Limits.Inodes)...)
	}
	for _, text := range texts {
		// EEXIST: a process that died before `bind` said it already.
		if err := command(f, text); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
	crash.Point("cachefiles.bind.before-bind")
	err := command(f, "bind ondemand")
	crash.Point("cachefiles.bind.after-bind")
	switch {
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: the kernel was built without CONFIG_CACHEFILES_ONDEMAND", err)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("%w: the directory's file system has no xattrs, no O_TMPFILE or blocks over 4 KiB: use ext4 or xfs", err)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: the directory's file system is mounted read-only", err)
	}
	return err
}

// limitCommands set watermarks of space ("b") or inodes ("f"). The kernel checks each against the others as they are by then
// (daemon.c, cachefiles_daemon_bcull): in this order all pass, whatever they were.
func limitCommands(of string, w fscache.Watermarks) []string {
	return []string{
		of + "stop 0%", of + "run 99%",
		fmt.Sprintf("%scull %d%%", of, w.Cull), fmt.Sprintf("%srun %d%%", of, w.Run), fmt.Sprintf("%sstop %d%%", of, w.Stop),
	}
}
