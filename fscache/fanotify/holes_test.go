package fanotify

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// XFS with blocks of 16 KiB calls the three blocks beside a written one data, and they read as zeros.
func TestFileSystemThatCallsUnwrittenBlocksDataIsRefused(t *testing.T) {
	dir := t.TempDir()
	if err := checkHoles(dir); err != nil {
		t.Fatalf("%s: %v", dir, err)
	}
	mnt := MountXFS(t, 16<<10)
	if err := checkHoles(mnt); err == nil || !strings.Contains(err.Error(), "65536 to 81920") {
		t.Errorf("XFS with blocks of 16 KiB: %v", err)
	}
}

// MountXFS mounts a new XFS, that can share extents and has blocks of so many bytes (0: the default), until the test ends. It is skipped where the
// kernel has no XFS, or none whose blocks are larger than a page, or no loop device.
func MountXFS(t *testing.T, block int) string {
	t.Helper()
	dir := t.TempDir()
	image, mnt := filepath.Join(dir, "fs"), filepath.Join(dir, "mnt")
	mkfs := []string{"mkfs.xfs", "-q", "-m", "reflink=1", image}
	if block > 0 {
		mkfs = slices.Insert(mkfs, 1, "-b", fmt.Sprint("size=", block))
	}
	for _, c := range [][]string{{"mkdir", mnt}, {"truncate", "-s", "400M", image}, mkfs} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v (Debian package xfsprogs): %v: %s", c, err, out)
		}
	}
	if out, err := exec.Command("mount", "-o", "loop", image, mnt).CombinedOutput(); err != nil {
		known, _ := os.ReadFile("/proc/filesystems") // mount(8) has had the module loaded
		_, loop := os.Stat("/dev/loop-control")
		if strings.Contains(string(known), "\txfs\n") && loop == nil && block <= os.Getpagesize() {
			t.Fatalf("mount: %v: %s", err, out)
		}
		t.Skipf("this kernel has no XFS, or none whose blocks are larger than a page, or no loop device: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Error(err)
		}
	})
	return mnt
}
