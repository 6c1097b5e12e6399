// Package cachefiles is the engine for EROFS over fscache (Linux 5.19 to 7.1): the kernel keeps the cache files and asks,
// through /dev/cachefiles in on-demand mode, for an object's size when it opens it and for bytes when it meets a hole.
//
// It never fetches data, never touches a cache file that the kernel has or had open, and never polls or reads an inherited
// device before `restore`, or while a predecessor reads it.
//
// What it keeps:
//   - I1: a read is completed only by Answer. Completed without its bytes, its reader gets EIO from the kernel, never a
//     hole's zeros: that is how any errno is given.
//   - I2: the kernel writes a request straight into a slot of the inbox, and the slot is free again when the kernel has the
//     answer. A request is known by a token of ours, not by the kernel's message id, which is unique among pending requests
//     only. A request whose id turns up again is gone (its reader was killed) and its answer goes nowhere.
//   - I4: the cache dies with the device's last descriptor. Lifeline is what the daemon gives away before the first mount.
//   - I5: Present is asked of the kernel, never remembered. After a boot, before the kernel has an object open, it is asked of
//     the cache file, which ReadAt then reads, and what Drop makes a hole of the kernel asks for again.
//   - I6: only the process that called Open reads the device, in an upgrade from Expect on; one message is read and taken apart
//     at a time. When Freeze has returned nothing is read.
//   - I8: a domain is a volume ("erofs,<domain>"), an object id a cookie in it; names that do not fit are refused.
//
// Descriptors: the kernel puts an object's descriptor into this process without close-on-exec. It is checked, owned and
// marked in the function that read the message, under syscall.ForkLock. The Holder has a copy before the kernel is told that the
// object is open, and lets go of it when the kernel has closed the object, after ours is closed. While anybody has one the object
// stays open in the kernel; when the last is gone the kernel asks again when it needs it (6.8 on) or fails every read (before).
//
// Nothing is read while the process has no descriptor left for an OPEN, which the kernel would fail: what is pending waits.
//
// Mount: the kernel's part of it sleeps uninterruptibly until the bootstrap's open is answered, so a process of its own does it, which has none of
// these descriptors and none of the daemon's locks (erofs.NewApart). The process that answers can die at any moment.
//
// Before it, each blob that has no cache file gets an empty one, with the name and the attribute that the kernel looks for: what the kernel makes
// itself has no name before the last unmount, and a power failure takes it (nameFiles).
//
// Takeover from a process that died, in this order:
//  1. Inherited objects are open objects by the kernel's id of them. Those that the dead process had read the CLOSE of are let go.
//  2. Inherited OPENs whose descriptors are held are answered with the size on record. Delivered again they would fail with EEXIST.
//  3. `restore`, once: the kernel delivers again what was read and not answered, and what is recorded of READs is not needed.
//     Descriptors whose object has no file are let go: whatever is pending for them is then delivered again.
//  4. Where there is no `restore`, Next hands out the READs from the inboxes and the records, and they are completed through the
//     descriptors that are held. An OPEN without its descriptor is refused. READs without it got EIO when it was closed.
//  5. Only then is the device polled and read.
//
// A request of which neither descriptor nor message nor record survived is lost on kernels without `restore`: its reader waits until
// it is killed.
//
// Minimum kernels: 6.1.129, 6.6.78 and 6.12.2 of their lines have the fixes that keep a daemon from crashing the host.
// Whether a kernel works is found by trying, in Available; vendors backport.
//
// Kernel facts cite fs/cachefiles/ (daemon.c, ondemand.c, namei.c, key.c), fs/erofs/fscache.c and
// include/uapi/linux/cachefiles.h as of 6.12. The tests run on 6.12, and on a 6.1 without `restore` (tests/vm/kernel).
//
// golang.org/x/sys/unix is here for SEEK_DATA, ioctls, fallocate, xattrs, O_TMPFILE and syncfs, which the standard library does not have.
package cachefiles
