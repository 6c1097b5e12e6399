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
//     first mount (I4), and what was mounted under a group that is gone is for Abandon.
//     No event is read without a descriptor number for it: the kernel would deny its reader. Those that find none wait in the kernel.
//   - I2: the kernel matches an answer by descriptor number, oldest event first. A number is free for reuse only after
//     its answer was written, so a number never stands for two of our own events.
//   - I5: Present is read from the file (SEEK_DATA), never from memory.
//   - I6: only the process that called Open reads the group; one opened with Inherited.Alive after Expect.
//   - I8: an object lives in a directory of its domain; names that could leave it are refused.
//
// # What a process leaves when it dies
//
// An event is read straight into a slot of the inbox, and the file it is of is written behind it before anything else is done; the
// slot is free when the answer was written, and the number after that. So an inbox names every event that is not answered, at
// most one of them without its file, and has never two messages of one number. A successor occupies the numbers first of all, hands the events out again
// (Next), and answers each by its number. An event without its file is handed out for every object it may be of, and is answered when
// all of them are; what is known only by a message and a record that differ, likewise. Numbers that nobody wrote down are swept: denied, before one of ours
// can have them.
//
// A marked object can be written through descriptors only that were opened before the mark. So one is given to the Holder first,
// and dropped when the mark is gone.
//
// Kernel facts cite fs/notify/fanotify/fanotify_user.c, fs/erofs/super.c and include/uapi/linux/fanotify.h.
//
// golang.org/x/sys/unix is here for fanotify, fsopen and friends, which the standard library does not have.
package fanotify
