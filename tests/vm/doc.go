// Package vm boots a Linux kernel of our own build in QEMU, runs one command in it and hands back the command's output and exit code.
//
// It exists because distribution kernels are built without cachefiles on-demand: what holdfast does to a kernel is tested on one
// that has it. The guest sees the host's file system (read-only by 9p under a tmpfs overlay, so that it may write anywhere and
// changes nothing), an ext4 disk at /cache, and nothing else: there is no network but loopback. A Go test binary built with
// CGO_ENABLED=0, and any other program of the host, runs inside as it is.
//
// EnsureKernel builds the kernel from Debian's source package and a configuration fragment in kernel/, once, and keeps it under
// the user's cache directory by the hash of all that went in. Run boots it. PID 1 in the guest is the program in guest/; it talks
// to Run over one virtio-serial port in the frames of package wire, apart from the kernel log, which goes to a file by the serial line.
// With Config.Systemd that program becomes the host's own systemd and is back as a service of it, which runs the command: for tests of
// what only a real PID 1 does. It starts the journal, which goes to another file, and nothing else of the host's.
//
// Rules:
//   - output and exit code are exact: every byte the command wrote before it ended arrives before Run returns;
//   - no run leaves anything behind: QEMU is killed on every way out of Run, and dies with the process that started it;
//   - a warning, oops or hung task in the kernel log fails the run whatever the command said, unless the caller allows it;
//   - nothing but the directories in Config.Shares and the disk in Config.Disk is ever written by the guest.
//
// The package never runs on anything but x86-64, and product code never imports it.
//
// Dependencies: golang.org/x/sys/unix (in guest/) for the mount and interface calls that package syscall lacks. The QEMU command
// line is written here rather than by a library: github.com/cilium/vimto boots once per test binary and cannot keep a disk between
// two boots, which power-cut tests need.
package vm
