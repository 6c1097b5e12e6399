package fanotify

import (
	"os"
	"os/exec"
	"path/filepath"
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
	image, mnt := filepath.Join(dir, "fs"), filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("truncate", "-s", "400M", image).CombinedOutput(); err != nil {
		t.Fatalf("truncate: %v: %s", err, out)
	}
	if out, err := exec.Command("mkfs.xfs", "-q", "-b", "size=16k", image).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.xfs (Debian package xfsprogs): %v: %s", err, out)
	}
	if out, err := exec.Command("mount", "-o", "loop", image, mnt).CombinedOutput(); err != nil {
		t.Skipf("this kernel mounts no XFS whose blocks are larger than a page, or has no loop device: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Error(err)
		}
	})
	if err := checkHoles(mnt); err == nil || !strings.Contains(err.Error(), "65536 to 81920") {
		t.Errorf("XFS with blocks of 16 KiB: %v", err)
	}
}
