// Package cachefiles is the engine for EROFS over fscache (Linux 5.19 to 7.1): the kernel keeps the cache files and asks,
// through /dev/cachefiles in on-demand mode, for an object's size when it opens it and for bytes when it meets a hole.
//
// It never fetches data, never opens or changes a file below the cache directory itself, and never polls or reads an
// inherited device before `restore`.
//
// What it keeps:
//   - I1: a read is completed only by Answer. Completed without its bytes, its reader gets EIO from the kernel, never a
//     hole's zeros: that is how any errno is given.
//   - I2: a request is known by a token of ours, not by the kernel's message id, which is unique among pending requests
//     only. A request whose id turns up again is gone (its reader was killed) and its answer goes nowhere.
//   - I4: the cache dies with the device's last descriptor. Lifeline is what the daemon gives away before the first mount.
//   - I5: Present is asked of the kernel, never remembered.
//   - I6: only the process that called Open reads the device; one message is read and taken apart at a time.
//   - I8: a domain is a volume ("erofs,<domain>"), an object id a cookie in it; names that do not fit are refused.
//
// Descriptors: the kernel puts an object's descriptor into this process without close-on-exec. It is checked, owned and
// marked in the function that read the message, under syscall.ForkLock. Closing it makes the kernel ask again when it
// needs it (6.8 on), so it is closed only when the object is, and before the device.
//
// Takeover: `restore` makes the kernel deliver again what the last process had read. Its descriptors of objects must be
// gone by then, or their pending opens fail with EEXIST.
//
// Minimum kernels: 6.1.129, 6.6.78 and 6.12.2 of their lines have the fixes that keep a daemon from crashing the host.
// Whether a kernel works is found by trying, in Available; vendors backport.
//
// Kernel facts cite fs/cachefiles/ (daemon.c, ondemand.c, namei.c, key.c), fs/erofs/fscache.c and
// include/uapi/linux/cachefiles.h as of 6.12.
//
// golang.org/x/sys/unix is here for SEEK_DATA, ioctls and syncfs, which the standard library does not have.
package cachefiles
