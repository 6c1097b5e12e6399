package cachefiles

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// What the kernel wants a file and a volume's directory to have, else it puts others in their place (xattr.c, struct cachefiles_xattr and
// cachefiles_vol_xattr, cachefiles_check_auxdata and cachefiles_check_volume_xattr): EROFS has no coherency data of its own.
const (
	xattrName  = "user.CacheFiles.cache"
	typeData   = 1
	objectAttr = 18 // bytes: object size and zero point, big-endian, type, content
	volumeAttr = 4  // all zero
)

// nameFiles gives the blobs of a mount that the kernel is about to open, and has no file of, empty files with their names. A file that the kernel makes has a
// name only when the last mount that uses it is gone (namei.c, cachefiles_create_tmpfile and cachefiles_commit_tmpfile): until then a power failure takes it,
// whatever was synced. One that has a name is kept as far as it was synced, like any file.
//
// What cannot be named is left to the kernel. Where it has an unnamed file of the object after all, that takes the place of this one when
// it gets its name.
func (e *Engine) nameFiles(blobs []fscache.Object) {
	e.making.Lock()
	defer e.making.Unlock()
	for _, b := range blobs {
		e.mu.Lock()
		o := e.objects[b.Key]
		open := o == nil || o.handle != nil
		e.mu.Unlock()
		if open {
			continue
		}
		if err := e.nameFile(o); err != nil {
			e.log.Warn("could not make a cache file for an object before the kernel does: a power failure would take what is fetched until it is unmounted",
				zap.Stringer("object", b.Key), zap.Error(err))
		}
	}
}

func (e *Engine) nameFile(o *object) error {
	o.file.mu.Lock() // openFile may be looking for it
	defer o.file.mu.Unlock()
	if _, err := CacheFile(e.dir.Name(), o.key); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	path := pathIn(e.dir.Name(), o.key, fanOf(o.key))
	if err := e.makeVolume(filepath.Dir(filepath.Dir(path))); err != nil {
		return err
	}
	fan := filepath.Dir(path)
	if err := os.Mkdir(fan, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	fd, err := unix.Open(fan, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("make a file in %s: %w", fan, err)
	}
	defer unix.Close(fd)
	attr := make([]byte, objectAttr)
	binary.BigEndian.PutUint64(attr, uint64(o.size))
	attr[16] = typeData
	if err := unix.Fsetxattr(fd, xattrName, attr, 0); err != nil {
		return fmt.Errorf("set %s of a file for %s: %w", xattrName, path, err)
	}
	if err := unix.Ftruncate(fd, o.size); err != nil {
		return fmt.Errorf("extend a file for %s: %w", path, err)
	}
	// It gets its name when the kernel can find nothing wrong with it.
	err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("name a file %s: %w", path, err)
	}
	return nil
}

// makeVolume makes the directory of a volume where there is none, under another name until it has its attribute. The kernel sets the attribute of one
// that it makes a moment later; with what a power failure leaves in between it could not mount anything of the domain again (volume.c,
// cachefiles_acquire_volume).
func (e *Engine) makeVolume(path string) error {
	_, err := unix.Getxattr(path, xattrName, nil)
	switch {
	case errors.Is(err, unix.ENODATA):
		return setVolume(path)
	case !errors.Is(err, unix.ENOENT):
		return err
	}
	tmp := filepath.Join(e.dir.Name(), "volume.new") // which may be there, of a process that was killed
	if err := os.Mkdir(tmp, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := setVolume(tmp); err != nil {
		return err
	}
	err = unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EEXIST) { // the kernel was first
		return os.Remove(tmp)
	}
	if err != nil {
		return fmt.Errorf("make the directory %s: %w", path, err)
	}
	return nil
}

func setVolume(dir string) error {
	if err := unix.Setxattr(dir, xattrName, make([]byte, volumeAttr), 0); err != nil {
		return fmt.Errorf("set %s of directory %s: %w", xattrName, dir, err)
	}
	return nil
}

// fanOf is which of the directories of its volume the kernel has an object's file in: a byte of the cookie's hash (namei.c), which covers the key of the
// volume with its length before it (fs/netfs/fscache_volume.c and fscache_cookie.c), each padded with zeros to whole words.
func fanOf(k fscache.Key) int {
	volume := volumePrefix + volumeOf(k.Domain)
	key := append([]byte{byte(len(volume))}, volume...)
	key = append(key, 0) // there is always a zero behind it
	return int(hash(hash(0, key), []byte(k.ID)) & (fans - 1))
}

// hash is the kernel's hash of cache keys (fs/netfs/fscache_main.c, fscache_hash). Files are found by it from one boot to the next, so it does not change.
func hash(salt uint32, key []byte) uint32 {
	const golden = 0x61c88647 // GOLDEN_RATIO_32 (include/linux/hash.h)
	x, y := uint32(0), salt
	for len(key) > 0 {
		var word [4]byte
		key = key[copy(word[:], key):]
		x ^= binary.LittleEndian.Uint32(word[:])
		y ^= x
		x = bits.RotateLeft32(x, 7) + y
		y = bits.RotateLeft32(y, 20) * 9
	}
	return (y ^ x*golden) * golden
}
