// Package drill is the crash drill that runs in staging: under a load of reads from mounted images it kills, freezes, upgrades, restarts and starves
// the daemon, and finds out what the readers felt of it.
//
// # How it goes
//
// Readers read at random places of the images, some for the first time and some again, and compare every byte: with what a generator yields for the
// image that the drill makes itself (made.go), and with the image's own chunk digests for images that were mounted before (target.go). Meanwhile a
// schedule (schedule.go), the same for the same seed, says which fault comes when. One fault is done at a time; the next comes when a daemon
// answers again and a pause is over. What a read came to is judged by the rules in verdict.go and counted for the fault that it was touched by: the last
// one before it ended, unless that was over before it began. The [Report] says all of it as JSON and as one HTML file.
//
// What is judged, of the invariants in DESIGN.md:
//
//	I1     no read gives a wrong byte or too few; and none fails, but with ENOSPC, EDQUOT or EIO while the disk is full, and with EIO where
//	       the source was cut for as long as the daemon tries (its read deadline)
//	I2     every read is answered, every mount comes back, and after every fault a daemon answers again. That no request is answered twice
//	       cannot be seen from outside: the kernel drops the second answer, or releases another reader, who then reads wrong bytes (I1)
//	bound  no read waits for longer than the bound, not counting the time for which a fault was held
//
// A drill in which no fault was done, not all that was asked for, or nothing was read, is not passed.
//
// # What it never does
//
// It makes no system calls itself (package inject does); it harms no process but the daemon it was told of (and tells its supervisor to restart it), touches no source, disk or mount that
// is not its own unless it was told to, and leaves nothing behind but its report and, in the daemon's cache, what was fetched: the
// daemon has no way to be told to forget it. It decides nothing about production: cmd/holdfast refuses there.
//
// Invariants kept here:
//   - a fault that lasts is taken back before the next one comes, and when the drill is interrupted. A drill that is killed takes nothing back:
//     its daemon may be frozen (send it SIGCONT), and what it mounted below its directory of work stays mounted (holdfast umount);
//   - a fault that cannot be done is reported as not done, with the reason, and never counted as done;
//   - memory is bounded whatever the duration: a histogram and a timeline for each reader, and at most a thousand violations in full.
//
// Dependencies: the types of github.com/opencontainers/image-spec for the image it serves. The latency histogram is 50 lines here:
// github.com/HdrHistogram/hdrhistogram-go has merging and export formats that nobody would read.
package drill
