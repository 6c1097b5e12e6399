package cachefiles

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

func TestDomainSharesABlobWithoutASecondRead(t *testing.T) {
	needDevice(t)
	one, two := newImage(t, "shared", "boot1", "blob"), newImage(t, "shared", "boot2", "blob")
	e := openEngine(t, t.TempDir(), nil)
	add(t, e, one, two)
	var opens, reads atomic.Int32
	serve(t, e, func(r fscache.Request) bool {
		if r.Object == one.blob.Key {
			switch r.Op {
			case fscache.OpOpen:
				opens.Add(1)
			case fscache.OpRead:
				reads.Add(1)
			}
		}
		return false
	}, one, two)
	checkPage(t, mount(t, e, one), one.blob.Key, 7)
	before := reads.Load()
	checkPage(t, mount(t, e, two), two.blob.Key, 7)
	if opens.Load() != 1 || before == 0 || reads.Load() != before {
		t.Errorf("%d opens, %d reads for the first mount, %d with the second", opens.Load(), before, reads.Load())
	}
}

func TestRefusedOpenFailsTheMountAndNothingElse(t *testing.T) {
	needDevice(t)
	cache := t.TempDir()
	good, bad := newImage(t, "refused", "good", "blob"), newImage(t, "refused", "bad", "blob2")
	e := openEngine(t, cache, nil)
	add(t, e, good, bad)
	var refuse atomic.Value
	refuse.Store(fscache.Key{})
	serve(t, e, func(r fscache.Request) bool {
		if r.Op != fscache.OpOpen || r.Object != refuse.Load() {
			return false
		}
		if err := e.Answer(r, fscache.ENOSPC); err != nil {
			t.Errorf("Answer: %v", err)
		}
		return true
	}, good, bad)
	there := mount(t, e, good)
	for _, k := range []fscache.Key{bad.boot.Key, bad.blob.Key} {
		refuse.Store(k)
		dir := t.TempDir()
		err := e.Mount(t.Context(), bad.mount(dir))
		if err == nil || !strings.Contains(err.Error(), dir) || !errors.Is(err, unix.ENOSPC) {
			t.Errorf("mount while %s is refused: %v, want an error with the directory and ENOSPC", k, err)
		}
		if err := e.Unmount(t.Context(), dir); err == nil {
			t.Errorf("there was a mount although %s was refused", k)
		}
		checkPage(t, there, good.blob.Key, 3)
	}
	refuse.Store(fscache.Key{})
	checkPage(t, mount(t, e, bad), bad.blob.Key, 0)
}

func TestMountOfTheSameBootstrapTwiceSaysSo(t *testing.T) {
	needDevice(t)
	im := newImage(t, "twice", "boot", "blob")
	e := openEngine(t, t.TempDir(), nil)
	add(t, e, im)
	serve(t, e, nil, im)
	mount(t, e, im)
	err := e.Mount(t.Context(), im.mount(t.TempDir()))
	if !errors.Is(err, unix.EEXIST) || !strings.Contains(err.Error(), "twice") {
		t.Errorf("second mount: %v, want EEXIST and the domain", err)
	}
}

func TestOpenOfAnUnknownObjectFailsThatMountOnly(t *testing.T) {
	needDevice(t)
	known, stranger := newImage(t, "known", "boot", "blob"), newImage(t, "stranger", "boot", "blob")
	e := openEngine(t, t.TempDir(), nil)
	add(t, e, known)
	serve(t, e, nil, known)
	if err := <-startMount(t, stranger, t.TempDir()); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOBUFS) {
		t.Errorf("mount of what was not added: %v, want EIO or ENOBUFS", err)
	}
	checkPage(t, mount(t, e, known), known.blob.Key, 0)
}

func TestWriteBeforeTheSizeIsToldIsErrNotOpen(t *testing.T) {
	needDevice(t)
	im := newImage(t, "early", "boot", "blob")
	e := openEngine(t, t.TempDir(), nil)
	add(t, e, im)
	page := content(im.blob.Key, 0, 4096)
	if err := e.WriteAt(im.blob.Key, page, 0); !errors.Is(err, fscache.ErrNotOpen) {
		t.Errorf("write before anything is mounted: %v", err)
	}
	var early error
	serve(t, e, func(r fscache.Request) bool {
		if r.Op == fscache.OpOpen && r.Object == im.blob.Key {
			early = e.WriteAt(r.Object, page, 0)
		}
		return false
	}, im)
	dir := mount(t, e, im)
	if !errors.Is(early, fscache.ErrNotOpen) {
		t.Errorf("write before copen: %v, want ErrNotOpen", early)
	}
	if err := e.WriteAt(im.blob.Key, page, 0); err != nil {
		t.Errorf("write after Mount: %v", err)
	}
	if err := e.Unmount(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	soon(t, "writes after umount are ErrNotOpen", func() bool {
		return errors.Is(e.WriteAt(im.blob.Key, page, 0), fscache.ErrNotOpen)
	})
}

func TestBlobsCanBeWrittenWhenMountReturns(t *testing.T) {
	needDevice(t)
	cache := t.TempDir()
	var images []image
	for i := range 40 { // the kernel gives an object its file a moment after its size was told: not a moment to rely on
		images = append(images, newImage(t, "atonce", fmt.Sprintf("boot%d", i), fmt.Sprintf("blob%d", i)))
	}
	e := openEngine(t, cache, nil)
	add(t, e, images...)
	serve(t, e, nil, images...)
	for _, im := range images {
		dir := mount(t, e, im)
		if err := e.WriteAt(im.blob.Key, content(im.blob.Key, 0, 4096), 0); err != nil {
			t.Errorf("write to %s: %v", im.blob.Key, err)
		}
		if err := e.Unmount(t.Context(), dir); err != nil {
			t.Fatal(err)
		}
	}
}

func TestUnalignedMemoryIsWritten(t *testing.T) {
	needDevice(t)
	im := newImage(t, "unaligned", "boot", "blob")
	e := openEngine(t, t.TempDir(), nil)
	add(t, e, im)
	serve(t, e, nil, im)
	dir := mount(t, e, im)
	whole := make([]byte, blobSize+8)
	for skip := range 8 {
		if p := whole[skip : skip+blobSize]; !fscache.IsAligned(p) {
			copy(p, content(im.blob.Key, 0, blobSize))
			if err := e.WriteAt(im.blob.Key, p, 0); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	got, err := os.ReadFile(filepath.Join(dir, im.blob.Key.ID))
	if err != nil || !bytes.Equal(got, content(im.blob.Key, 0, blobSize)) {
		t.Errorf("read back: %v, right bytes: %v", err, bytes.Equal(got, content(im.blob.Key, 0, blobSize)))
	}
}

func TestDescriptorsGoWithTheirObjects(t *testing.T) {
	needDevice(t)
	cache, im := t.TempDir(), newImage(t, "fds", "boot", "blob")
	e := openEngine(t, cache, nil)
	add(t, e, im)
	serve(t, e, nil, im)
	for range 3 {
		dir := mount(t, e, im)
		if n := objectDescriptors(t); n != 2 {
			t.Errorf("%d objects' descriptors while mounted, want 2", n)
		}
		if err := e.Unmount(t.Context(), dir); err != nil {
			t.Fatal(err)
		}
		soon(t, "all descriptors of objects closed after umount", func() bool { return objectDescriptors(t) == 0 })
	}
}

// objectDescriptors counts this process's descriptors of cachefiles objects, all of which must be close-on-exec.
func objectDescriptors(t *testing.T) int {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, l := range links {
		if to, err := os.Readlink(l); err != nil || to != anonName {
			continue
		}
		n++
		info, err := os.ReadFile("/proc/self/fdinfo/" + filepath.Base(l))
		if err == nil && !strings.Contains(string(info), "flags:\t02") { // O_CLOEXEC is 02000000
			t.Errorf("descriptor %s is not close-on-exec: %s", filepath.Base(l), info)
		}
	}
	return n
}

func TestMountWaitsWhileNoDescriptorIsLeft(t *testing.T) {
	needDevice(t)
	im, dir := newImage(t, "emfile", "boot", "blob"), t.TempDir()
	core, logs := observer.New(zap.ErrorLevel)
	e := openWith(t, Config{Dir: t.TempDir(), Log: zap.New(core)})
	add(t, e, im)
	serve(t, e, nil, im)
	// Mounting takes descriptors too, so another process does it, when told.
	cmd := exec.Command("sh", "-c", `read go && exec mount -t erofs none "$1" -o fsid=boot,domain_id=emfile,device=blob`, "sh", dir)
	cmd.Stderr = os.Stderr
	tell, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	// As low as this not even what is in reserve can be used.
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1, Max: before.Max}); err != nil {
		t.Fatal(err)
	}
	_, tellErr := tell.Write([]byte("go\n"))
	said := func() bool { return logs.FilterMessageSnippet("LimitNOFILE=").Len() > 0 }
	for end := time.Now().Add(patience); !said() && time.Now().Before(end); time.Sleep(time.Millisecond) {
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &before); err != nil || tellErr != nil || !said() {
		t.Fatalf("%v, %v; the engine said that no descriptor is left: %v", err, tellErr, said())
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("mount once there are descriptors: %v", err)
	}
	checkPage(t, dir, im.blob.Key, 0)
}

func TestFullCacheIsErrNoSpace(t *testing.T) {
	needDevice(t)
	cache := smallFileSystem(t)
	im := newImage(t, "full", "boot", "blob")
	e := openEngine(t, cache, nil)
	add(t, e, im)
	serve(t, e, nil, im)
	dir := mount(t, e, im)
	checkPage(t, dir, im.blob.Key, 0)
	fillUp(t, filepath.Join(cache, "ballast"))
	if err := e.WriteAt(im.blob.Key, content(im.blob.Key, 64<<10, 4096), 64<<10); !errors.Is(err, fscache.ErrNoSpace) {
		t.Errorf("write into a full cache: %v, want ErrNoSpace", err)
	}
	checkPage(t, dir, im.blob.Key, 0)
	if err := os.Remove(filepath.Join(cache, "ballast")); err != nil {
		t.Fatal(err)
	}
	checkPage(t, dir, im.blob.Key, 16)
}

// smallFileSystem mounts an ext4 of 32 MiB.
func smallFileSystem(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	disk := filepath.Join(t.TempDir(), "disk")
	// In two steps: mount -o loop keeps the loop device open for writing, which not every kernel lets it mount.
	script := `truncate -s 32M "$1" && mkfs.ext4 -q -m 0 "$1" && dev=$(losetup -f --show "$1") && mount "$dev" "$2"; losetup -d "$dev"`
	if out, err := exec.Command("sh", "-c", script, "sh", disk, dir).CombinedOutput(); err != nil {
		t.Fatalf("a small disk: %v: %s", err, out)
	}
	t.Cleanup(func() { // after the engine's, which was opened later
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmounting the small disk: %v", err)
		}
	})
	return dir
}

// fillUp writes a file until nothing is left.
func fillUp(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for buf := make([]byte, 1<<20); ; {
		if _, err := f.Write(buf); errors.Is(err, unix.ENOSPC) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil && !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
}

// manyDevices is an image with an empty root and one device slot for each blob. Layout: fs/erofs/erofs_fs.h.
func manyDevices(blobs []fscache.Object) []byte {
	const super, slot, rootNid = 1024, 128, (1024 + 128) / 32
	le := binary.LittleEndian
	blocks := 1 + (len(blobs)*slot+4095)/4096
	b := fscache.AlignedBuffer(blocks * 4096)
	le.PutUint32(b[super:], 0xe0f5e1e2)
	b[super+12] = 12 // log2 of the block size
	le.PutUint16(b[super+14:], rootNid)
	le.PutUint64(b[super+16:], 1) // inodes
	le.PutUint32(b[super+36:], uint32(blocks))
	le.PutUint32(b[super+80:], 0x8) // EROFS_FEATURE_INCOMPAT_DEVICE_TABLE
	le.PutUint16(b[super+86:], uint16(len(blobs)))
	le.PutUint16(b[super+88:], 4096/slot) // where the table starts, in slots
	for i, o := range blobs {
		copy(b[4096+i*slot:], o.Key.ID)
		le.PutUint32(b[4096+i*slot+64:], uint32(o.Size/4096))
	}
	inode := b[rootNid*32:]
	le.PutUint16(inode, 2<<1) // EROFS_INODE_FLAT_INLINE
	le.PutUint16(inode[4:], 0o040755)
	le.PutUint16(inode[6:], 2)
	names := 2 * 12
	for i, name := range []string{".", ".."} {
		le.PutUint64(inode[32+i*12:], rootNid)
		le.PutUint16(inode[32+i*12+8:], uint16(names))
		inode[32+i*12+10] = 2 // EROFS_FT_DIR
		names += copy(inode[32+names:], name)
	}
	le.PutUint32(inode[8:], uint32(names))
	return b
}

func TestMountWith250Blobs(t *testing.T) {
	needDevice(t)
	cache, dir := t.TempDir(), t.TempDir()
	im := image{}
	m := fscache.Mount{Dir: dir}
	e := openEngine(t, cache, nil)
	for i := range 250 {
		o := fscache.Object{Key: fscache.Key{Domain: "many", ID: fmt.Sprintf("%064x", i)}, Size: blobSize}
		m.Blobs = append(m.Blobs, o)
		if err := e.Add(context.Background(), o); err != nil {
			t.Fatal(err)
		}
	}
	im.bytes = manyDevices(m.Blobs)
	m.Bootstrap = fscache.Object{Key: fscache.Key{Domain: "many", ID: "boot"}, Size: int64(len(im.bytes))}
	im.boot = m.Bootstrap
	if err := e.Add(context.Background(), im.boot); err != nil {
		t.Fatal(err)
	}
	serve(t, e, nil, im)
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	if err := e.Mount(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	for _, b := range m.Blobs {
		if have, err := e.Present(b.Key); err != nil || len(have) != 0 {
			t.Fatalf("Present(%s): %v, %v", b.Key, have, err)
		}
	}
	if n := objectDescriptors(t); n != 251 {
		t.Errorf("%d objects are open, want 251", n)
	}
	if err := e.Unmount(t.Context(), dir); err != nil {
		t.Error(err)
	}
}

func TestAvailableFindsWhatWorksAndLeavesNothing(t *testing.T) {
	needDevice(t)
	dir := t.TempDir()
	if err := Available(dir); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("Available left %v, %v", left, err)
	}
	if err := Available("/dev/shm"); err == nil || !strings.Contains(err.Error(), "ext4") {
		t.Errorf("Available on tmpfs: %v, want an error that names file systems that work", err)
	}
	if err := Available(filepath.Join(dir, "missing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Available on a missing directory: %v", err)
	}
}

func TestSecondOpenerIsRefusedAndDisturbsNothing(t *testing.T) {
	needDevice(t)
	cache, im := t.TempDir(), newImage(t, "second", "boot", "blob")
	e := openEngine(t, cache, nil)
	add(t, e, im)
	serve(t, e, nil, im)
	dir := mount(t, e, im)
	_, err := Open(Config{Dir: t.TempDir()})
	for what, err := range map[string]error{"Open": err, "Available": Available(t.TempDir())} {
		if !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "fuser") {
			t.Errorf("%s beside a running engine: %v, want EBUSY and who to look for", what, err)
		}
	}
	checkPage(t, dir, im.blob.Key, 9)
}

func TestAvailableSaysWhatTheKernelLacks(t *testing.T) {
	if _, err := os.Stat(devicePath); err == nil {
		t.Skip("this kernel has the device: TestAvailableFindsWhatWorksAndLeavesNothing runs")
	}
	err := Available(t.TempDir())
	for _, want := range []string{"CONFIG_CACHEFILES_ONDEMAND", "CONFIG_EROFS_FS_ONDEMAND", "5.19", "7.2"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Available: %v, want it to name %s", err, want)
		}
	}
}

func TestConfigTheKernelWouldCutShortIsRefused(t *testing.T) {
	for name, c := range map[string]Config{
		"relative directory": {Dir: "cache"}, "newline": {Dir: "/tmp/a\nb"}, "NUL": {Dir: "/tmp/a\x00b"},
		"longer than a command": {Dir: "/" + strings.Repeat("d", 4096)}, "blank in the tag": {Dir: "/tmp", Tag: "a b"},
	} {
		if e, err := Open(c); err == nil {
			_ = e.Close()
			t.Errorf("%s: opened", name)
		} else if errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v: refused too late", name, err)
		}
	}
}

func TestDescriptorThatIsNoObjectsIsNotTaken(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	var malformed *MalformedError
	if _, err := own(int(r.Fd())); !errors.As(err, &malformed) {
		t.Errorf("a pipe was taken for an object: %v", err)
	}
	if _, err := own(1 << 30); !errors.As(err, &malformed) {
		t.Errorf("a closed number was taken for an object: %v", err)
	}
	if _, err := r.Stat(); err != nil {
		t.Errorf("the pipe was closed: %v", err)
	}
}

func TestReusedMessageIDMeansTheFirstReaderIsGone(t *testing.T) {
	e := &Engine{pending: make(map[uint64]*request), byMsg: make(map[uint32]*request)}
	h := &handle{object: &object{}}
	first := e.track(fscache.OpRead, delivery{m: Message{ID: 5}, slot: noSlot}, h)
	second := e.track(fscache.OpClose, delivery{m: Message{ID: 5}, slot: noSlot}, h)
	if err := e.Answer(first, fscache.OK); !errors.Is(err, fscache.ErrGone) {
		t.Errorf("the first request: %v, want ErrGone", err)
	}
	if err := e.Answer(second, fscache.OK); err != nil {
		t.Errorf("the second request: %v", err)
	}
	for _, r := range []fscache.Request{first, second} {
		if err := e.Answer(r, fscache.OK); !errors.Is(err, fscache.ErrAnswered) {
			t.Errorf("answered again: %v, want ErrAnswered", err)
		}
	}
}
