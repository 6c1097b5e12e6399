package fanotify

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// patience bounds waits for what must happen.
const patience = 30 * time.Second

const page = fscache.BlockSize

var testObject = fscache.Object{Key: fscache.Key{Domain: "d", ID: "o"}, Size: 1 << 20}

func open(t *testing.T, c Config) *Engine {
	t.Helper()
	if c.Dir == "" {
		c.Dir = t.TempDir()
	}
	e, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

func add(t *testing.T, e *Engine, o fscache.Object) string {
	t.Helper()
	if err := e.Add(context.Background(), o); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(e.dir, o.Key.Domain, o.Key.ID)
}

// reading starts a read of one page of a file, in a goroutine that ends when the kernel lets it go.
func reading(path string, off int64) <-chan error {
	done := make(chan error, 1)
	go func() {
		f, err := os.Open(path)
		if err == nil {
			_, err = f.ReadAt(make([]byte, page), off)
			f.Close()
		}
		done <- err
	}()
	return done
}

func await(t *testing.T, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(patience):
		t.Fatal("the reader was not let go")
		return nil
	}
}

// copyOf returns the group as a successor gets it.
func copyOf(t *testing.T, e *Engine) *os.File {
	t.Helper()
	_, f := e.Lifeline()
	var dup int
	err := control(f, func(fd int) (err error) {
		dup, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(dup), "inherited")
}

// TestEveryErrnoReachesTheReader tries the table of denials on the kernel, with a reader of the cache file itself.
func TestEveryErrnoReachesTheReader(t *testing.T) {
	e := open(t, Config{})
	path := add(t, e, testObject)
	answers := map[fscache.Errno]unix.Errno{fscache.Errno(200): unix.EIO} // no row: EIO
	for a, errno := range denyErrno {
		answers[a] = errno
	}
	for a, errno := range answers {
		done := reading(path, 0)
		r, err := e.Next()
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Answer(r, a); err != nil {
			t.Fatalf("Answer %d: %v", a, err)
		}
		if err := await(t, done); !errors.Is(err, errno) {
			t.Errorf("answer %d: reader got %v, want %v", a, err, errno)
		}
	}
}

func TestKernelRefusesOtherErrnos(t *testing.T) {
	e := open(t, Config{})
	path := add(t, e, testObject)
	done := reading(path, 0)
	r, err := e.Next()
	if err != nil {
		t.Fatal(err)
	}
	for _, errno := range []unix.Errno{unix.ETIMEDOUT, unix.ENODATA, unix.ENOENT, unix.EINTR} {
		b := encodeResponse(int32(r.ID), unix.FAN_DENY|uint32(errno)<<errnoShift)
		if _, err := e.group.Write(b[:]); !errors.Is(err, unix.EINVAL) {
			t.Errorf("denial with %v: %v, want EINVAL", errno, err)
		}
	}
	if err := e.Answer(r, fscache.EIO); err != nil {
		t.Fatal(err)
	}
	if err := await(t, done); !errors.Is(err, unix.EIO) {
		t.Errorf("reader got %v, want EIO", err)
	}
}

// TestLastCloseAllowsReadersOntoHoles shows why I4 exists; simkernel has the same rule.
func TestLastCloseAllowsReadersOntoHoles(t *testing.T) {
	e := open(t, Config{})
	path := add(t, e, testObject)
	done := reading(path, 0)
	if _, err := e.Next(); err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if err := await(t, done); err != nil {
		t.Errorf("the reader got %v; the kernel was known to let it read zeros", err)
	}
}

func TestEventOfAnUnknownFileIsDenied(t *testing.T) {
	core, logs := observer.New(zapcore.ErrorLevel)
	e := open(t, Config{Log: zap.New(core)})
	path := filepath.Join(t.TempDir(), "stranger")
	if err := os.WriteFile(path, make([]byte, page), 0o600); err != nil {
		t.Fatal(err)
	}
	err := control(e.group, func(fd int) error {
		return unix.FanotifyMark(fd, unix.FAN_MARK_ADD, unix.FAN_PRE_ACCESS, unix.AT_FDCWD, path)
	})
	if err != nil {
		t.Fatal(err)
	}
	next := make(chan error, 1)
	go func() { // ends with Close
		_, err := e.Next()
		next <- err
	}()
	if err := await(t, reading(path, 0)); !errors.Is(err, unix.EIO) {
		t.Errorf("reader got %v, want EIO", err)
	}
	if logs.FilterMessageSnippet("no cache object").Len() == 0 {
		t.Error("nothing was logged")
	}
	e.Close()
	if err := await(t, next); !errors.Is(err, fscache.ErrClosed) {
		t.Errorf("Next: %v, want ErrClosed", err)
	}
}

func TestMalformedEventIsDeniedIfItHasADescriptor(t *testing.T) {
	e := open(t, Config{})
	path := add(t, e, testObject)
	done := reading(path, 0)
	// Take the event as Next would, then let decode see a damaged copy of it.
	var buf [SlotLen]byte
	n, err := e.group.Read(buf[:maxEventLen])
	if err != nil {
		t.Fatal(err)
	}
	buf[0] = 255 // event_len past the buffer
	if ev := e.decode(buf[:], n, noSlot); ev.FD != noFD {
		t.Error("the damaged event was accepted")
	}
	if err := await(t, done); !errors.Is(err, unix.EIO) {
		t.Errorf("reader got %v, want EIO", err)
	}
}

func TestEventsWaitInTheKernelWhileDescriptorsAreShort(t *testing.T) {
	e := open(t, Config{})
	e.limit = 1
	path := add(t, e, testObject)
	one, two := reading(path, 0), reading(path, 8*page)
	first, err := e.Next()
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan fscache.Request, 1)
	go func() { // ends when the first is answered
		r, err := e.Next()
		if err == nil {
			got <- r
		}
	}()
	select {
	case r := <-got:
		t.Fatalf("Next read %v past the limit", r)
	case <-time.After(20 * time.Millisecond):
	}
	if err := e.Answer(first, fscache.OK); err != nil {
		t.Fatal(err)
	}
	select {
	case r := <-got:
		if err := e.Answer(r, fscache.OK); err != nil {
			t.Fatal(err)
		}
	case <-time.After(patience):
		t.Fatal("Next did not go on")
	}
	if err := errors.Join(await(t, one), await(t, two)); err != nil {
		t.Error(err)
	}
}

func TestFreezeEndsAWaitForDescriptors(t *testing.T) {
	e := open(t, Config{})
	e.limit = 0
	ended := make(chan error, 1)
	go func() { // ends with Freeze
		_, err := e.Next()
		ended <- err
	}()
	select {
	case err := <-ended:
		t.Fatalf("Next returned: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	if err := e.Freeze(); err != nil {
		t.Fatal(err)
	}
	if err := await(t, ended); !errors.Is(err, fscache.ErrClosed) {
		t.Errorf("Next: %v, want ErrClosed", err)
	}
}

func TestSuccessorWritesOnceTheFirstEventCame(t *testing.T) {
	dir := t.TempDir()
	old := open(t, Config{Dir: dir})
	path := add(t, old, testObject)
	group := copyOf(t, old)
	reader, err := os.Open(path) // under the mark, as a mount has it
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	old.Close()

	e := open(t, Config{Dir: dir, Inherited: fscache.Inherited{Lifeline: group}})
	add(t, e, testObject)
	k := testObject.Key
	if err := e.WriteAt(k, make([]byte, page), 0); !errors.Is(err, fscache.ErrNotOpen) {
		t.Fatalf("WriteAt before an event: %v, want ErrNotOpen", err)
	}
	if have, err := e.Present(k); err != nil || len(have) != 0 {
		t.Errorf("Present before an event: %v, %v", have, err)
	}
	if err := e.Sync(k); err != nil {
		t.Errorf("Sync before an event: %v", err)
	}
	done := make(chan error, 1)
	go func() { // ends when the event is answered
		_, err := reader.ReadAt(make([]byte, page), 0)
		done <- err
	}()
	r, err := e.Next()
	if err != nil {
		t.Fatal(err)
	}
	if err := e.WriteAt(k, make([]byte, page), 0); err != nil {
		t.Fatalf("WriteAt with an event: %v", err)
	}
	if err := e.Answer(r, fscache.OK); err != nil {
		t.Fatal(err)
	}
	if err := await(t, done); err != nil {
		t.Error(err)
	}
	if err := e.WriteAt(k, make([]byte, page), page); err != nil {
		t.Errorf("WriteAt after the event: %v", err)
	}
}

func TestSuccessorWritesAtOnceToWhatWasComplete(t *testing.T) {
	dir := t.TempDir()
	old := open(t, Config{Dir: dir})
	add(t, old, testObject)
	if err := old.Complete(testObject.Key); err != nil {
		t.Fatal(err)
	}
	group := copyOf(t, old)
	old.Close()
	e := open(t, Config{Dir: dir, Inherited: fscache.Inherited{Lifeline: group}})
	add(t, e, testObject)
	if err := e.WriteAt(testObject.Key, make([]byte, page), 0); err != nil {
		t.Error(err)
	}
}

func TestSweepDeniesEveryLeftover(t *testing.T) {
	dir := t.TempDir()
	old := open(t, Config{Dir: dir})
	path := add(t, old, testObject)
	const readers = 20
	var done []<-chan error
	for i := range int64(readers) {
		done = append(done, reading(path, i*page))
		if _, err := old.Next(); err != nil {
			t.Fatal(err)
		}
	}
	group := copyOf(t, old)
	old.Close()
	core, logs := observer.New(zapcore.InfoLevel)
	e := open(t, Config{Dir: dir, Inherited: fscache.Inherited{Lifeline: group}, Log: zap.New(core)})
	e.background.Wait()
	for _, d := range done {
		if err := await(t, d); !errors.Is(err, unix.EIO) {
			t.Errorf("leftover reader got %v, want EIO", err)
		}
	}
	entries := logs.FilterMessage("took a group over").All()
	if len(entries) != 1 || entries[0].ContextMap()["denied"] != int64(readers) {
		t.Errorf("log: %v", entries)
	}
}

func TestInheritedDescriptorMustBeAGroup(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := Open(Config{Dir: t.TempDir(), Inherited: fscache.Inherited{Lifeline: r}}); err == nil || !strings.Contains(err.Error(), "not a fanotify group") {
		t.Errorf("Open with a pipe: %v", err)
	}
}

func TestCacheFileOfAnotherSizeOrKindIsRefused(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"bytes":   func(path string) error { return os.WriteFile(path, make([]byte, page), 0o600) },
		"path":    func(path string) error { return os.Symlink("/etc/passwd", path) },
		"regular": func(path string) error { return unix.Mkfifo(path, 0o600) },
	} {
		e := open(t, Config{})
		domain := filepath.Join(e.dir, testObject.Key.Domain)
		if err := os.Mkdir(domain, 0o700); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(domain, testObject.Key.ID)
		if err := spoil(path); err != nil {
			t.Fatal(err)
		}
		if err := e.Add(context.Background(), testObject); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: Add: %v, want an error that names %s", name, err, path)
		}
	}
}

func TestTwoObjectsCannotBeOneFile(t *testing.T) {
	e := open(t, Config{})
	path := add(t, e, testObject)
	other := testObject
	other.Key.ID = "other"
	if err := os.Link(path, filepath.Join(filepath.Dir(path), "other")); err != nil {
		t.Fatal(err)
	}
	if err := e.Add(context.Background(), other); err == nil {
		t.Error("Add of a second name of the file succeeded")
	}
}

func TestCloseLeavesNoDescriptor(t *testing.T) {
	count := func() int {
		t.Helper()
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	add(t, open(t, Config{}), testObject) // what the runtime opens once
	before := count()
	e := open(t, Config{})
	path := add(t, e, testObject)
	done := reading(path, 0)
	if _, err := e.Next(); err != nil {
		t.Fatal(err)
	}
	e.Close()
	await(t, done)
	if after := count(); after > before {
		t.Errorf("%d descriptors, were %d", after, before)
	}
}

func TestMountErrorSaysWhatAndWhere(t *testing.T) {
	e := open(t, Config{})
	boot := filepath.Join(t.TempDir(), "bootstrap")
	image := tinyImage()
	image[1024+12] = 5 // blocks of 32 bytes
	if err := os.WriteFile(boot, image, 0o600); err != nil {
		t.Fatal(err)
	}
	m := fscache.Mount{Dir: t.TempDir(), BootstrapPath: boot}
	err := e.Mount(context.Background(), m)
	if err == nil || !strings.Contains(err.Error(), m.Dir) || !strings.Contains(err.Error(), boot) || !strings.Contains(err.Error(), "dmesg") {
		t.Errorf("Mount of a damaged image: %v", err)
	}
	m.BootstrapPath = "/" + strings.Repeat("x", 300)
	if err := e.Mount(context.Background(), m); err == nil || !strings.Contains(err.Error(), "shorter") {
		t.Errorf("Mount of a long path: %v", err)
	}
	m.BootstrapPath = "bootstrap"
	if err := e.Mount(context.Background(), m); err == nil || !strings.Contains(err.Error(), "not absolute") {
		t.Errorf("Mount of a relative path: %v", err)
	}
}

// TestMountTakesMoreDevicesThanAPageOfOptionsHolds mounts 60 devices whose names together have more than 4096 bytes.
func TestMountTakesMoreDevicesThanAPageOfOptionsHolds(t *testing.T) {
	const devices, slotLen = 60, 128
	image := append(tinyImage(), make([]byte, 2*page)...)
	le := binary.LittleEndian
	le.PutUint32(image[1024+36:], 3)            // blocks
	le.PutUint32(image[1024+80:], 0x8)          // EROFS_FEATURE_INCOMPAT_DEVICE_TABLE
	le.PutUint16(image[1024+86:], devices)      // extra_devices
	le.PutUint16(image[1024+88:], page/slotLen) // devt_slotoff
	e := open(t, Config{})
	m := fscache.Mount{Dir: t.TempDir(), BootstrapPath: filepath.Join(t.TempDir(), "bootstrap")}
	total := 0
	for i := range devices {
		o := testObject
		o.Key.ID = fmt.Sprintf("%064d", i)
		total += len(add(t, e, o))
		m.Blobs = append(m.Blobs, o)
		le.PutUint32(image[page+i*slotLen+64:], uint32(o.Size/page))
	}
	if total <= 4096 {
		t.Fatalf("the names have %d bytes", total)
	}
	if err := os.WriteFile(m.BootstrapPath, image, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := e.Mount(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	if err := e.Unmount(t.Context(), m.Dir); err != nil {
		t.Error(err)
	}
}

func TestAvailableSaysWhatIsMissing(t *testing.T) {
	dir := t.TempDir()
	if err := Available(dir); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("Available left %v, %v", left, err)
	}
	if err := Available(filepath.Join(dir, "missing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing directory: %v", err)
	}
	if err := Available("/proc/self"); err == nil {
		t.Error("/proc can hold a cache")
	}
	shm, err := os.MkdirTemp("/dev/shm", "fanotify")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(shm)
	if err := Available(shm); err == nil || !strings.Contains(err.Error(), "ext4, xfs and btrfs") {
		t.Errorf("tmpfs: %v", err)
	}
}

func TestKernelsThatHandOutWrongBytesAreRefused(t *testing.T) {
	for release, ok := range map[string]bool{
		"6.14.11": false, "6.17.0-rc1": false, "6.18.0": false, "6.18.21-1-amd64": false, "6.19.11": false, "6.12.117": false,
		"6.18.22": true, "6.18.44-x": true, "6.19.12": true, "7.0.0-rc3": true, "7.3": true, "10.1.2": true,
		"": false, "linux": false,
	} {
		if err := checkKernel(release); (err == nil) != ok {
			t.Errorf("%q: %v, want safe %v", release, err, ok)
		}
	}
}
