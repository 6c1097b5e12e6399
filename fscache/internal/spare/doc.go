// Package spare sees to it that a read(2) which makes the kernel open a file descriptor finds a number for it. Where the process has
// reached RLIMIT_NOFILE such a read takes the request all the same and fails it: fanotify denies the reader, cachefiles the open. What is
// left unread only waits.
//
// It never raises the limit, and never reads anything itself. The limit can be lowered from outside (prlimit(2)), and any thread of
// the process can open something, between the question and the read: the limit is therefore asked for anew each time, and where
// numbers are scarce several are set free for the one that is needed.
package spare
