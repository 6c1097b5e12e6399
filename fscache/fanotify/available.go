package fanotify

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"holdfast/fscache/internal/erofs"
)

// Available says whether this engine can work with its cache in dir, by trying: holes of single blocks, a pre-content group, a mark on a file in
// dir, a mount of a tiny image in dir. The error names what is missing. It leaves nothing behind. Whether the kernel has
// known bugs is CheckKernel's to say.
func Available(dir string) error {
	if err := available(dir); err != nil {
		return fmt.Errorf("fanotify engine in %s: %w", dir, err)
	}
	return nil
}

func available(dir string) error {
	if err := checkHoles(dir); err != nil {
		return err
	}
	group, err := newGroup()
	if err != nil {
		return err
	}
	defer group.Close()
	f, err := os.CreateTemp(dir, ".probe-*")
	if err != nil {
		return err
	}
	defer f.Close()
	defer os.Remove(f.Name())
	if _, err := f.Write(tinyImage()); err != nil {
		return err
	}
	err = control(group, func(fd int) error {
		return unix.FanotifyMark(fd, unix.FAN_MARK_ADD, unix.FAN_PRE_ACCESS, unix.AT_FDCWD, f.Name())
	})
	switch {
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("the kernel knows no pre-content events (FAN_PRE_ACCESS: Linux 6.14, CONFIG_FANOTIFY_ACCESS_PERMISSIONS): %w", err)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("its file system cannot hold files under pre-content events (ext4, xfs and btrfs can): %w", err)
	case err != nil:
		return fmt.Errorf("fanotify_mark: %w", err)
	}
	// EROFS reads an image's metadata through the page cache or, in later kernels, through checked reads that raise
	// events; nobody answers here, so the mark goes first.
	err = control(group, func(fd int) error {
		return unix.FanotifyMark(fd, unix.FAN_MARK_REMOVE, unix.FAN_PRE_ACCESS, unix.AT_FDCWD, f.Name())
	})
	if err != nil {
		return fmt.Errorf("fanotify_mark: %w", err)
	}
	mount, err := erofs.NewFromFiles(f.Name(), nil)
	if err != nil {
		return err
	}
	return unix.Close(mount)
}

// tinyImage is an EROFS image of one block with an empty root directory. Layout: fs/erofs/erofs_fs.h (struct
// erofs_super_block at 1024, erofs_inode_compact, erofs_dirent).
func tinyImage() []byte {
	const (
		block, super = 4096, 1024
		rootNid      = 40 // inode at 40*32 bytes, behind the super block
		inlineDir    = 2 << 1
	)
	le := binary.LittleEndian
	b := make([]byte, block)
	le.PutUint32(b[super:], unix.EROFS_SUPER_MAGIC_V1)
	b[super+12] = 12 // log2 of the block size
	le.PutUint16(b[super+14:], rootNid)
	le.PutUint64(b[super+16:], 1) // inodes
	le.PutUint32(b[super+36:], 1) // blocks

	inode := b[rootNid*32:]
	le.PutUint16(inode, inlineDir)
	le.PutUint16(inode[4:], unix.S_IFDIR|0o755)
	le.PutUint16(inode[6:], 2) // links
	dir := inode[32:]
	names := 2 * 12
	for i, name := range []string{".", ".."} {
		le.PutUint64(dir[i*12:], rootNid)
		le.PutUint16(dir[i*12+8:], uint16(names))
		dir[i*12+10] = 2 // EROFS_FT_DIR
		names += copy(dir[names:], name)
	}
	le.PutUint32(inode[8:], uint32(names)) // size
	return b
}
