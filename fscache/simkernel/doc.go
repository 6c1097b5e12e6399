// Package simkernel is a kernel for tests: a model of what EROFS and the two on-demand interfaces do, small enough to
// be stepped through a hundred thousand schedules, with the same [fscache.Engine] on top. It passes fscache/enginetest
// like the real engines, and does step by step what kernels were recorded to do (testdata, fscache/internal/trace); each rule of the
// model cites the kernel's line.
//
// A [Kernel] outlives processes: cache files, mounts, page cache, requests. An [Engine] is one process that has the
// device or the group open; it takes over from one that died, or in a hot upgrade from one that lives, as the real engines do. Kill is
// its end, at whatever step it is: its memory and descriptors are gone; what the inbox and the holder have stays. Readers and mounts
// need no goroutines: what they wait for takes them on. There are no timers and no goroutines here, so that tests may run in a synctest
// bubble, and the order of calls decides everything.
//
// It is imported by tests only. It never touches a real mount, and of the file system only looks whether a mount point
// exists.
//
// Not modelled: time (a request waits for ever), partial pages, read-ahead beyond what is read, inodes, message ids that come
// round (after 2^32).
//
// Line numbers are of Linux 6.12.117 for cachefiles and EROFS, functions of 6.18 for fanotify.
//
// golang.org/x/sys/unix is here for constants and names of errnos.
package simkernel
