// Package simkernel is a kernel for tests: a model of what EROFS and the two on-demand interfaces do, small enough to
// be stepped through a hundred thousand schedules, with the same [fscache.Engine] on top. It passes fscache/enginetest
// like the real engines; where a rule of the model is not in that suite, it cites the kernel's line.
//
// A [Kernel] outlives processes: cache files, mounts, page cache, requests. An [Engine] is one process that has the
// device or the group open; Close is its end, however it came to it: the kernel sees the same descriptors close.
// Readers are goroutines in Read; there are no timers and no goroutines here, so that tests may run in a synctest
// bubble, and the order of calls decides everything.
//
// It is imported by tests only. It never touches a real mount, and of the file system only looks whether a mount point
// exists.
//
// Not modelled: time (a request waits for ever), partial pages, read-ahead beyond what is read, disk space, a second
// process on the same group.
//
// Line numbers are of Linux 6.12 for cachefiles and EROFS, functions of 6.18 for fanotify.
package simkernel
