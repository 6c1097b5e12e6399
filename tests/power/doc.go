// Package power takes the power away from under holdfast, and says what that cost.
//
// It has tests only. Each makes a file system, puts root (state and cache) on it, mounts two images from a registry, reads one and
// prefetches the other, and cuts the power at a random moment. What is left of the disk is mounted again, as another boot with an empty
// run directory; a daemon is started on it, and both images are read in full. Three ways to cut:
//
//   - TestPowerIsCutFromADeviceThatLogs (test machine): device-mapper's log-writes target logs every write and flush. One load gives many
//     cuts: the disk is made anew from the log up to any entry, and of what was not flushed by then only some writes are kept, as a
//     disk's own cache does;
//   - TestPowerIsCutFromAFileSystem (natively, where there is no device mapper): the file system is told to stop without writing its
//     journal or anything else (EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN);
//   - TestMachineIsKilled (natively): QEMU is killed, its disk written past the host's cache, and another machine boots from it.
//
// What must hold:
//
//   - P1: every byte of every image is right, read in full after the cut;
//   - P2: what was known to be durable before the cut (`prefetch --wait` had returned) is not fetched again: the registry serves none of it;
//   - P3: state.db opens, and what had been mounted is mounted again.
//
// Each prints a figure: of what had been fetched by the cut, how much was kept.
//
// The environment says what to run:
//
//	HOLDFAST_BIN     the holdfast binary; built by the test where it is not set
//	HOLDFAST_ENGINE  the engine, which then must work; otherwise the test is skipped where no engine works
//	HOLDFAST_POWER   how many times the power is cut on each file system; where it is not set 2, in the test machine 1
//	HOLDFAST_SEED    of everything random; printed with each failure
//
// Mounts are made in a mount namespace of the test's own, in which the kernel tells a boot id of the test's choice.
package power
