// Package fanotify is the engine for EROFS images mounted from plain files (Linux 6.14 on). Each cache object is a sparse
// file under a pre-content mark; a read of the file makes the kernel put the reader to sleep and hand this engine an
// event, which is answered when the bytes are in the file.
//
// It never fetches data, never reads a cache file except through descriptors that raise no events (a read through any
// other would wait for itself), and never lets a reader on by accident: whatever it cannot make sense of is denied.
//
// What it keeps:
//   - I1: an event is allowed only by Answer(OK); unknown files, malformed events and swept leftovers of a dead process
//     are denied with EIO. What it cannot keep alone: when the group's last descriptor closes, the kernel allows
//     everything and readers get the holes' zeros. The daemon therefore gives Lifeline to somebody else before the
//     first mount (I4).
//   - I2: the kernel matches an answer by descriptor number, oldest event first. A number is free for reuse only after
//     its answer was written, so a number never stands for two of our own events; a predecessor's numbers are swept
//     before the first read.
//   - I5: Present is read from the file (SEEK_DATA), never from memory.
//   - I6: only the process that called Open reads the group.
//   - I8: an object lives in a directory of its domain; names that could leave it are refused.
//
// Kernel facts cite fs/notify/fanotify/fanotify_user.c, fs/erofs/super.c and include/uapi/linux/fanotify.h.
//
// golang.org/x/sys/unix is here for fanotify, fsopen and friends, which the standard library does not have.
package fanotify
