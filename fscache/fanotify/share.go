package fanotify

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// Share implements fscache.Engine by FIDEDUPERANGE (include/uapi/linux/fs.h, since 4.5): the file system compares the extents under the locks of
// both files, and shares what is equal. xfs and btrfs can. What comes before it in the kernel, the permission hooks, raises no event: the
// descriptors are quiet.
func (e *Engine) Share(k fscache.Key, x fscache.Extent, with fscache.Key, at int64) (int64, error) {
	o, err := e.object(k)
	if err != nil {
		return 0, err
	}
	from, err := e.object(with)
	if err != nil {
		return 0, err
	}
	return o.share(x, from, at)
}

// shareStep is how much is shared at a time, in bytes: who reads or writes either file waits meanwhile.
const shareStep = 1 << 20

func (o *object) share(x fscache.Extent, from *object, at int64) (shared int64, err error) {
	if err := errors.Join(o.check(x.Off, x.Len, true), from.check(at, x.Len, true)); err != nil {
		return 0, err
	}
	src, err := from.open()
	if err != nil {
		return 0, err
	}
	dst, err := o.open()
	if err != nil {
		return 0, err
	}
	for shared < x.Len {
		n := min(x.Len-shared, shareStep)
		r := unix.FileDedupeRange{
			Src_offset: uint64(at + shared), Src_length: uint64(n),
			Info: []unix.FileDedupeRangeInfo{{Dest_offset: uint64(x.Off + shared)}},
		}
		err := control(src, func(fd int) error {
			return control(dst, func(to int) error {
				r.Info[0].Dest_fd = int64(to)
				return unix.IoctlFileDedupeRange(fd, &r)
			})
		})
		if err == nil {
			err = dedupeStatus(r.Info[0])
		}
		if err != nil {
			return shared, o.ioError(fmt.Sprintf("sharing extents of cache file %s with", from.path), x.Off+shared, err)
		}
		shared += int64(r.Info[0].Bytes_deduped)
	}
	return shared, nil
}

// errDiffers means that there are other bytes, or none.
var errDiffers = errors.New("the extents differ")

// dedupeStatus is what the kernel says of one extent.
func dedupeStatus(i unix.FileDedupeRangeInfo) error {
	switch {
	case i.Status == unix.FILE_DEDUPE_RANGE_DIFFERS:
		return errDiffers
	case i.Status == -int32(unix.EOPNOTSUPP), i.Status == -int32(unix.EINVAL): // the latter: blocks of the file system larger than ours
		return fmt.Errorf("%w: %w", errors.ErrUnsupported, unix.Errno(-i.Status))
	case i.Status < 0:
		return unix.Errno(-i.Status)
	case i.Bytes_deduped == 0:
		return errors.New("the file system shared nothing")
	}
	return nil
}
