package plain

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Of struct fsverity_enable_arg (include/uapi/linux/fsverity.h).
const (
	fsverityVersion = 1
	fsveritySHA256  = 1 // FS_VERITY_HASH_ALG_SHA256
	blockSize       = 4096
)

// Seal has the kernel check what is read of a file from now on, and says how. With fs-verity (a file system that has it: ext4 with feature
// verity, btrfs, f2fs) the file can no longer be written to, and the answer is "fs-verity sha256:<digest>", as the tool fsverity prints
// it. Elsewhere veritysetup writes a tree of digests beside the file, in a file whose name ends with .verity, which is opened with
// "veritysetup open FILE NAME FILE.verity ROOT"; the answer is "dm-verity sha256:<root>". Where there is neither, the error says what is missing of
// both. Nobody may have the file open for writing.
func Seal(path string) (string, error) {
	digest, err := enableVerity(path)
	if err == nil {
		return "fs-verity sha256:" + digest, nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOTTY) {
		return "", fmt.Errorf("fs-verity of %s: %w", path, err)
	}
	tool, err2 := exec.LookPath("veritysetup")
	if err2 != nil {
		return "", fmt.Errorf("%s cannot be sealed: no fs-verity on its file system (%w; ext4 needs feature verity, the kernel CONFIG_FS_VERITY), "+
			"and no veritysetup for dm-verity (install cryptsetup-bin): leave --verity out, or export to another file system", path, err)
	}
	root, err := formatVerity(tool, path)
	if err != nil {
		return "", fmt.Errorf("dm-verity of %s: %w", path, err)
	}
	return "dm-verity sha256:" + root, nil
}

// enableVerity enables fs-verity and returns the file's digest by it.
func enableVerity(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	arg := unix.FsverityEnableArg{Version: fsverityVersion, Hash_algorithm: fsveritySHA256, Block_size: blockSize}
	if err := ioctl(f, unix.FS_IOC_ENABLE_VERITY, unsafe.Pointer(&arg)); err != nil && !errors.Is(err, unix.EEXIST) {
		return "", err
	}
	answer := struct {
		unix.FsverityDigest
		digest [64]byte
	}{FsverityDigest: unix.FsverityDigest{Size: 64}}
	if err := ioctl(f, unix.FS_IOC_MEASURE_VERITY, unsafe.Pointer(&answer)); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", answer.digest[:min(int(answer.Size), len(answer.digest))]), nil
}

func ioctl(f *os.File, request uint, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(request), uintptr(arg))
	runtime.KeepAlive(f)
	if errno != 0 {
		return errno
	}
	return nil
}

// formatVerity has veritysetup write path.verity, and returns the root digest.
func formatVerity(tool, path string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(tool, "format", "--hash=sha256", "--data-block-size=4096", "--hash-block-size=4096", path, path+".verity")
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	for line := range strings.Lines(stdout.String()) {
		if root, ok := strings.CutPrefix(line, "Root hash:"); ok {
			f, err := os.Open(path + ".verity")
			if err != nil {
				return "", err
			}
			return strings.TrimSpace(root), errors.Join(os.Chmod(f.Name(), 0o644), f.Sync(), f.Close())
		}
	}
	return "", fmt.Errorf("veritysetup printed no root hash: %.200q", stdout.String())
}
