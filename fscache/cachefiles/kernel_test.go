package cachefiles

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/internal/erofs"
)

// These tests show the kernel's behaviour that the engine is built on, on the device itself, with no engine between.

// boundDevice opens the device with a new cache. It is closed at the end.
func boundDevice(t *testing.T) *os.File {
	t.Helper()
	needDevice(t)
	dir := t.TempDir()
	f, err := openDevice()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if err := bind(f, Config{Dir: dir, Tag: "raw"}); err != nil {
		t.Fatal(err)
	}
	return f
}

// rawRead reads the device once, without waiting.
func rawRead(t testing.TB, f *os.File) ([]byte, error) {
	t.Helper()
	buf := make([]byte, CACHEFILES_MSG_MAX_SIZE)
	var n int
	err := control(f, func(fd int) (err error) {
		n, err = unix.Read(fd, buf)
		return err
	})
	return buf[:max(n, 0)], err
}

// message waits for the next message.
func message(t testing.TB, f *os.File) (Message, []byte) {
	t.Helper()
	poll(t, f)
	b, err := rawRead(t, f)
	if err != nil {
		t.Fatalf("read: %v", err)
	}
	m, err := DecodeMessage(b)
	if err != nil {
		t.Fatal(err)
	}
	return m, b
}

// poll waits until the device has something to read.
func poll(t testing.TB, f *os.File) {
	t.Helper()
	err := control(f, func(fd int) error {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			n, err := unix.Poll(fds, int(patience.Milliseconds()))
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err == nil && n == 0 {
				err = errors.New("no request came")
			}
			return err
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

// startMount begins a mount of im; its error comes when mount(2) returns. The mount is undone at the end.
func startMount(t testing.TB, im image, dir string) <-chan error {
	t.Helper()
	done := make(chan error, 1)
	go func() { // ends when the kernel has its answers, or the device is closed
		fd, err := erofs.New([]erofs.Option{
			{Name: "fsid", Value: im.boot.Key.ID}, {Name: "domain_id", Value: im.boot.Key.Domain}, {Name: "device", Value: im.blob.Key.ID},
		})
		if err == nil {
			err = erofs.Attach(fd, dir)
			_ = unix.Close(fd)
		}
		done <- err
	}()
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return done
}

// answerOpen answers an open request with an object's size.
func answerOpen(t testing.TB, f *os.File, m Message, o fscache.Object) *handle {
	t.Helper()
	anon, err := own(int(m.Open.FD))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = anon.Close() })
	e := &Engine{dev: &device{f: f}}
	if err := e.copen(m.ID, o.Size); err != nil {
		t.Fatal(err)
	}
	return &handle{id: m.ObjectID, object: &object{key: o.Key, size: o.Size}, f: anon}
}

// answerMount answers what a mount of im asks for, up to its end, and returns the blob's handle.
func answerMount(t testing.TB, f *os.File, im image, mounted <-chan error, record func(op string, b []byte)) *handle {
	t.Helper()
	var boot, blob *handle
	for done := false; blob == nil || !done; {
		m, b := message(t, f)
		switch {
		case m.Opcode == CACHEFILES_OP_OPEN && m.Open.Cookie == im.boot.Key.ID:
			boot = answerOpen(t, f, m, im.boot)
		case m.Opcode == CACHEFILES_OP_OPEN:
			record("open", b)
			blob = answerOpen(t, f, m, im.blob)
		case m.Opcode == CACHEFILES_OP_READ && m.ObjectID == boot.id:
			if err := errors.Join(boot.writeAt(im.bytes, 0), boot.complete(m.ID)); err != nil {
				t.Fatal(err)
			}
			done = true
		default:
			t.Fatalf("unexpected request %+v", m)
		}
	}
	if err := <-mounted; err != nil {
		t.Fatalf("mount: %v", err)
	}
	if err := waitAttached(t.Context(), blob); err != nil {
		t.Fatal(err)
	}
	return blob
}

func discard(string, []byte) {}

func TestReadReturningZeroMeansNoRequest(t *testing.T) {
	f := boundDevice(t)
	for range 3 {
		if b, err := rawRead(t, f); err != nil || len(b) != 0 {
			t.Fatalf("read without a request: %d bytes, %v", len(b), err)
		}
	}
	im := newImage(t, "zero", "boot", "blob")
	mounted := startMount(t, im, t.TempDir())
	m, _ := message(t, f)
	if m.Opcode != CACHEFILES_OP_OPEN {
		t.Fatalf("after reads of nothing: %+v, want an open", m)
	}
	if b, err := rawRead(t, f); err != nil || len(b) != 0 {
		t.Fatalf("the open was delivered twice: %x, %v", b, err)
	}
	refuseOpen(t, f, m)
	if err := <-mounted; err == nil {
		t.Error("the mount succeeded")
	}
}

// refuseOpen answers an open with EIO.
func refuseOpen(t *testing.T, f *os.File, m Message) {
	t.Helper()
	e := &Engine{dev: &device{f: f}}
	if err := e.copen(m.ID, -int64(unix.EIO)); err != nil {
		t.Error(err)
	}
	if err := unix.Close(int(m.Open.FD)); err != nil {
		t.Error(err)
	}
}

func TestMessagesOfThisKernel(t *testing.T) {
	f := boundDevice(t)
	im := newImage(t, "golden", "boot", "blob")
	record := recorder(t)
	dir := t.TempDir()
	blob := answerMount(t, f, im, startMount(t, im, dir), record)

	read := make(chan error, 1)
	go func() { _, err := readPage(dir, im.blob.Key, 1); read <- err }() // ends when the request below is answered
	m, b := message(t, f)
	record("read", b)
	if m.ObjectID != blob.id {
		t.Errorf("read of object %d, the blob was opened as %d", m.ObjectID, blob.id)
	}
	if err := errors.Join(blob.writeAt(content(im.blob.Key, 4096, 4096), 4096), blob.complete(m.ID), <-read); err != nil {
		t.Error(err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	closed := make(map[uint32]bool)
	for range 2 {
		m, b := message(t, f)
		if m.ObjectID == blob.id {
			record("close", b)
		}
		closed[m.ObjectID] = m.Opcode == CACHEFILES_OP_CLOSE
	}
	if !closed[blob.id] || len(closed) != 2 {
		t.Errorf("closed after umount: %v", closed)
	}
}

// recorder checks each message, and writes it below the directory in HOLDFAST_RECORD if that is set.
func recorder(t *testing.T) func(op string, b []byte) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	return func(op string, b []byte) {
		m, err := DecodeMessage(b)
		if err != nil {
			t.Error(err)
			return
		}
		checkRecorded(t, op, m)
		if dir := os.Getenv("HOLDFAST_RECORD"); dir != "" {
			if err := os.WriteFile(filepath.Join(dir, op+"-"+release+".bin"), b, 0o644); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestObjectDescriptorComesWithoutCloseOnExec(t *testing.T) {
	f := boundDevice(t)
	mounted := startMount(t, newImage(t, "cloexec", "boot", "blob"), t.TempDir())
	m, _ := message(t, f)
	flags, err := unix.FcntlInt(uintptr(m.Open.FD), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC != 0 {
		t.Errorf("flags %#x, %v: own need not set close-on-exec any more", flags, err)
	}
	refuseOpen(t, f, m)
	<-mounted
}

func TestCompleteWithoutDataGivesEIO(t *testing.T) {
	f := boundDevice(t)
	im := newImage(t, "nodata", "boot", "blob")
	dir := t.TempDir()
	blob := answerMount(t, f, im, startMount(t, im, dir), discard)
	read := make(chan error, 1)
	start := func() { go func() { _, err := readPage(dir, im.blob.Key, 0); read <- err }() } // ends with the answer

	start()
	if err := blob.writeAt(content(im.blob.Key, 8192, 4096), 8192); err != nil {
		t.Fatal(err)
	}
	// One read(2) that fails asks twice: for read-ahead, and then for the page alone (mm/filemap.c, filemap_get_pages).
	var m Message
	for range 2 {
		m, _ = message(t, f)
		if err := blob.complete(m.ID); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-read; !errors.Is(err, unix.EIO) {
		t.Errorf("read of a page that was not written: %v, want EIO", err)
	}
	start()
	m, _ = message(t, f)
	if err := errors.Join(blob.writeAt(content(im.blob.Key, 0, 4096), 0), blob.complete(m.ID), <-read); err != nil {
		t.Errorf("the next read: %v", err)
	}
	if err := blob.complete(m.ID); !errors.Is(err, fscache.ErrGone) {
		t.Errorf("completing twice: %v, want ErrGone", err)
	}
}

// TestObjectWhoseDescriptorIsClosedBeforeItsSizeIsToldIsNotOpened is test06 of lostjeffle/demand-read-cachefilesd.
func TestObjectWhoseDescriptorIsClosedBeforeItsSizeIsToldIsNotOpened(t *testing.T) {
	f := boundDevice(t)
	mounted := startMount(t, newImage(t, "early", "boot", "blob"), t.TempDir())
	m, _ := message(t, f)
	if err := unix.Close(int(m.Open.FD)); err != nil {
		t.Fatal(err)
	}
	e := &Engine{dev: &device{f: f}}
	if err := e.copen(m.ID, 4096); err != nil {
		t.Errorf("copen: %v", err)
	}
	if err := <-mounted; !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOBUFS) {
		t.Errorf("mount: %v, want EIO or ENOBUFS", err)
	}
}

// TestDeviceClosedWithRequestsPendingLetsEverybodyGo is test12, and test11: the device goes before the objects' descriptors.
func TestDeviceClosedWithRequestsPendingLetsEverybodyGo(t *testing.T) {
	f := boundDevice(t)
	im := newImage(t, "dying", "boot", "blob")
	dir := t.TempDir()
	blob := answerMount(t, f, im, startMount(t, im, dir), discard)
	read := make(chan error, 2)
	start := func(page int64) { go func() { _, err := readPage(dir, im.blob.Key, page); read <- err }() } // ends with the device
	start(1)
	first, _ := message(t, f) // read, and never answered
	start(100)
	poll(t, f) // there, and never read
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := <-read; !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOBUFS) {
			t.Errorf("a reader of a cache that died: %v, want EIO or ENOBUFS", err)
		}
	}
	if err := blob.complete(first.ID); !errors.Is(err, fscache.ErrGone) {
		t.Errorf("completing a read of a cache that died: %v, want ErrGone", err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Errorf("unmount while a descriptor of an object is open: %v", err)
	}
	if _, err := openDevice(); !errors.Is(err, unix.EBUSY) {
		t.Errorf("opening the device while a descriptor of an object is open: %v, want EBUSY", err)
	}
}

// TestWritesGoWhereTheKernelHasAFile is test04 and test10: before copen and after the umount there is none.
func TestWritesGoWhereTheKernelHasAFile(t *testing.T) {
	f := boundDevice(t)
	im := newImage(t, "premature", "boot", "blob")
	dir := t.TempDir()
	mounted := startMount(t, im, dir)
	m, _ := message(t, f)
	early, err := os.OpenFile("/proc/self/fd/"+strconv.Itoa(int(m.Open.FD)), os.O_WRONLY, 0)
	if err == nil {
		_ = early.Close()
		t.Error("an object's descriptor can be opened anew: nothing here expects it")
	}
	boot := &handle{object: &object{key: im.boot.Key}, f: os.NewFile(uintptr(m.Open.FD), anonName)}
	t.Cleanup(func() { _ = boot.f.Close() })
	if err := boot.writeAt(im.bytes, 0); !errors.Is(err, unix.ENOBUFS) || !errors.Is(err, fscache.ErrNotOpen) {
		t.Errorf("write before copen: %v, want ENOBUFS, which is ErrNotOpen", err)
	}
	e := &Engine{dev: &device{f: f}}
	if err := e.copen(m.ID, im.boot.Size); err != nil {
		t.Fatal(err)
	}
	soon(t, "the object has a file", boot.attached)
	if err := boot.writeAt(im.bytes, 0); err != nil {
		t.Errorf("write after copen: %v", err)
	}
	if got, err := boot.present(im.boot.Size); err != nil || !slices.Equal(got, []fscache.Extent{{Off: 0, Len: im.boot.Size}}) {
		t.Errorf("data of the object: %v, %v", got, err)
	}
	next, _ := message(t, f)
	if next.Opcode == CACHEFILES_OP_READ { // the mount looked before the write
		if err := boot.complete(next.ID); err != nil {
			t.Fatal(err)
		}
		next, _ = message(t, f)
	}
	refuseOpen(t, f, next) // of the blob
	<-mounted
}

func TestOpenWithAHeldDescriptorFailsAfterRestore(t *testing.T) {
	needRestore(t)
	f := boundDevice(t)
	mounted := startMount(t, newImage(t, "held", "boot", "blob"), t.TempDir())
	m, _ := message(t, f)
	if err := command(f, "restore"); err != nil {
		t.Fatal(err)
	}
	poll(t, f)
	if b, err := rawRead(t, f); !errors.Is(err, unix.EEXIST) {
		t.Errorf("redelivered: %x, %v, want EEXIST", b, err)
	}
	if err := <-mounted; !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOBUFS) { // as the failure comes after or before the first read
		t.Errorf("mount: %v, want EIO or ENOBUFS", err)
	}
	_ = unix.Close(int(m.Open.FD))
}

func TestPendingReadIsReopenedAndRedeliveredAfterRestore(t *testing.T) {
	needRestore(t)
	f := boundDevice(t)
	im := newImage(t, "reopen", "boot", "blob")
	dir := t.TempDir()
	blob := answerMount(t, f, im, startMount(t, im, dir), discard)
	read := make(chan error, 1)
	go func() { _, err := readPage(dir, im.blob.Key, 3); read <- err }() // ends with the answer
	before, _ := message(t, f)
	if err := blob.f.Close(); err != nil { // as if its process had died
		t.Fatal(err)
	}
	if err := command(f, "restore"); err != nil {
		t.Fatal(err)
	}
	// A read selects nothing yet: it makes the kernel reopen the object (cachefiles_ondemand_select_req).
	if b, err := rawRead(t, f); err != nil || len(b) != 0 {
		t.Fatalf("read before the object is open again: %x, %v", b, err)
	}
	open, _ := message(t, f)
	if open.Opcode != CACHEFILES_OP_OPEN || open.Open.Cookie != im.blob.Key.ID || open.ObjectID == before.ObjectID {
		t.Fatalf("%+v, want an open of the blob under a new object id", open)
	}
	again := answerOpen(t, f, open, im.blob)
	after, _ := message(t, f)
	if after.ID != before.ID || after.Read != before.Read || after.ObjectID != again.id {
		t.Errorf("redelivered %+v, was %+v", after, before)
	}
	err := errors.Join(again.writeAt(content(im.blob.Key, 3*4096, 4096), 3*4096), again.complete(after.ID), <-read)
	if err != nil {
		t.Error(err)
	}
}

func TestMountsWhoseNamesAgreeInTheFirst36BytesCollide(t *testing.T) {
	needDevice(t)
	long := strings.Repeat("b", 36)
	one, two := newImage(t, "d", long+"1", "blob"), newImage(t, "d", long+"2", "blob")
	e := openEngine(t, t.TempDir(), nil)
	add(t, e, one, two)
	serve(t, e, nil, one, two)
	mount(t, e, one)
	if _, err := os.Lstat(filepath.Join("/sys/fs/erofs", mountName(one.boot.Key))); err == nil {
		t.Skip("this kernel names a mount in sysfs by all of its name (before 6.9)")
	}
	err := e.Mount(t.Context(), two.mount(t.TempDir()))
	if !errors.Is(err, unix.EEXIST) || !strings.Contains(err.Error(), "36 bytes") {
		t.Errorf("second mount: %v, want EEXIST and advice (or the kernel got better)", err)
	}
}
