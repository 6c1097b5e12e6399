package fanotify

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

const (
	responseLen = 8  // struct fanotify_response: s32 fd, u32 response
	errnoShift  = 24 // FAN_ERRNO_SHIFT: the errno of a denial is in the top byte (Linux 6.14)
)

// denyErrno is the errno a reader of the cache file gets for each answer but OK. The kernel takes only EPERM, EIO,
// EBUSY, ETXTBSY, EAGAIN, ENOSPC and EDQUOT (fanotify_user.c, process_access_response; others are EINVAL and leave the
// reader asleep). A reader of a file in the mounted image gets EIO for all of them: EROFS hands its pages on as failed
// without saying why (fs/erofs/fileio.c).
var denyErrno = map[fscache.Errno]unix.Errno{
	fscache.EIO:    unix.EIO,
	fscache.ENOSPC: unix.ENOSPC,
	fscache.EAGAIN: unix.EAGAIN,
}

// response returns the u32 of an answer; an Errno without a row is EIO.
func response(e fscache.Errno) uint32 {
	if e == fscache.OK {
		return unix.FAN_ALLOW
	}
	errno, ok := denyErrno[e]
	if !ok {
		errno = unix.EIO
	}
	return unix.FAN_DENY | uint32(errno)<<errnoShift
}

// encodeResponse lays out struct fanotify_response.
func encodeResponse(fd int32, response uint32) (b [responseLen]byte) {
	binary.NativeEndian.PutUint32(b[0:], uint32(fd))
	binary.NativeEndian.PutUint32(b[4:], response)
	return b
}
