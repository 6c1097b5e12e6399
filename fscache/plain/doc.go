// Package plain is about cache files as files: what of one is there, and mounts of files that are complete, which no engine and no
// daemon is needed for. It also has the kernel check files from now on (fs-verity, dm-verity).
//
// It never writes to a cache file, and never asks for anything that is not there: a file that it mounts has to be complete, for a
// hole would read as zeros (I1). Whoever mounts checks that; Mount cannot know what the bytes should be.
//
// golang.org/x/sys/unix is here for SEEK_DATA, statx and ioctl(2), which the standard library does not have.
package plain
