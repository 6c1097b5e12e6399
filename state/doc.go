// Package state keeps what has to survive the host: which images are saved, which are mounted where, and in which boot
// a cache object's presence was last settled. It is one bbolt file, state.db, synced at every commit.
//
// It never calls the kernel engines or the network, and never holds a transaction while something else is waited for.
//
// Invariants kept here:
//   - I5: presence is recorded with the boot it was settled in, so that another boot's is not trusted;
//   - I7: the file has a schema number and every value a version; both are only ever moved forward, in one transaction;
//     a newer one is refused with the release to run; a damaged file, or record, is set aside under a name and reported,
//     never deleted;
//   - I9: the file is treated as input: reading it cannot bring the process down.
//
// go.etcd.io/bbolt is there because it gives what this needs and would be hard to write: transactions that survive power
// loss in a single file, without a server, and a lock against a second process.
package state
