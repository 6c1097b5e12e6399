// Package inject does to a process and a file system what a bad day does: it kills, freezes and starves processes, fills disks and
// drops what the kernel has cached. Only package drill imports it, and it is all of the drill that makes system calls.
//
// It never chooses whom to harm, never waits, and takes back whatever of it can be taken back: what lasts has a function that ends it.
//
// Invariant: a [Process] is one process for as long as it is held: a signal for it never reaches another that got its number (it holds a
// pidfd, which os.FindProcess opens on Linux 5.4 and later).
//
// Dependency: golang.org/x/sys/unix for prlimit(2), fallocate(2), posix_fadvise(2) and signals.
package inject
