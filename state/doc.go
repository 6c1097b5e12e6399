// Package state keeps what has to survive a process, and what has to survive the host, in three kinds of file, by lifetime:
//
//   - state.db ([DB]) survives the host: which images are saved, which are mounted where, which cache objects there may be and what refers to
//     them ([Graph]), and in which boot an object's presence was last settled. bbolt, synced at every commit.
//   - session.db ([Session]) survives the process and mirrors what this boot's kernel has: which objects' descriptors the supervisor
//     holds and under which names, which requests were read and not answered. bbolt on tmpfs, where a sync costs nothing. Another
//     boot's is emptied: what it mirrors is gone.
//   - the inboxes ([Inbox]), one for each life of the process, are mappings of files on tmpfs into which the kernel's read(2) writes
//     requests. A slot is zeroed, then lent, then the kernel fills it, and it is free again when the answer is with the kernel. The file
//     is locked for as long as its process lives; [ReadInboxes] reads those that nobody has a lock on.
//
// A request is in the inbox from the instant that the kernel hands it over, at no cost. The record of requests in flight follows,
// written behind by [Session.SetPending], for those that take long: it says more than the kernel's message does, and is on record
// when the inbox of a process that died twice over was removed. A successor takes the union of both. It can have too much in it (what was
// answered with the last breath, what ended since the last write), which the kernel refuses to be told again, and never too little.
//
// Both databases are opened, looked at, migrated, swept and set aside by one implementation (store.go). Everything their pages lead to
// is checked before bbolt gets them (pages.go); bbolt believes a page what it says.
//
// It never calls the kernel engines or the network, never holds a transaction while something else is waited for, and does not know
// what a request or a message means.
//
// Invariants kept here:
//   - I2: a message in a lent slot is found by the successor, at whichever instruction the process died; an object's descriptor is on
//     record before the supervisor has it; what SetPending and RecordObject return from is committed;
//   - I5: presence is recorded with the boot it was settled in, so that another boot's is not trusted;
//   - I7: every file has a schema number, or layout version, and every record a version; they are only ever moved forward, in one
//     transaction; newer ones are refused with the release to run, and left untouched; a damaged file, or record, is set aside under a
//     name and reported, never deleted, never guessed at;
//   - I8: an object is on record for its domain, and an image refers to it in that domain only if it was mounted there;
//   - I9: the files are treated as input: reading one cannot bring the process down, and takes time and memory by its size, not by what
//     it says.
//
// go.etcd.io/bbolt is there because it gives what this needs and would be hard to write: transactions that survive power
// loss in a single file, without a server, and a lock against a second process. golang.org/x/sys/unix is for the inbox's mapping
// and for locks.
package state
