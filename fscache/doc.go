// Package fscache is the kernel's side of holdfast behind one interface: an [Engine] hands out the kernel's requests for
// data and takes the answers. The engines are fscache/cachefiles (EROFS over fscache, Linux 5.19 to 7.1),
// fscache/fanotify (file-backed EROFS under pre-content marks, Linux 6.14 on) and fscache/simkernel, the fake that tests
// drive; all pass the suite in fscache/enginetest. Package fscache/plain is for complete cache files with no engine.
//
// It never fetches or decodes data, and never knows what an image is: it moves verified bytes to where the kernel reads
// them.
//
// Invariants kept here:
//   - I1: a reader is let go only when its bytes are in the cache file, or with an errno;
//   - I2: every request Next returns is answered exactly once, and a second answer is an error of the caller's, found and refused;
//   - I4: the engine's own fd (Lifeline) is never the last one: the daemon hands a copy to the supervisor before the first mount;
//   - I6: only the process that called Open reads the engine's fd.
package fscache
