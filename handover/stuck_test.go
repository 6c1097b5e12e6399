package handover

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hangRole starts a daemon and then looks at a path that nobody answers for.
func hangRole(control, path string) int {
	if err := exec.Command(os.Args[0], "role=daemon", control).Start(); err != nil {
		return 95
	}
	_, err := os.Stat(path)
	fmt.Fprintln(os.Stderr, err)
	return 94
}

// A silentFS is a mounted file system of this test's that does not answer: who has asked it for something sleeps, uninterruptibly from the
// moment at which it has read the request (fs/fuse/dev.c, request_wait_answer), until it is closed.
type silentFS struct {
	t   *testing.T
	dir string
	dev int
}

func newSilentFS(t *testing.T) *silentFS {
	t.Helper()
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("this kernel has no FUSE: %v", err)
	}
	s := &silentFS{t: t, dir: t.TempDir(), dev: dev}
	t.Cleanup(s.close)
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", dev)
	if err := unix.Mount("silent", s.dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		if os.Geteuid() == 0 {
			t.Fatal(err)
		}
		t.Skipf("only root mounts, and this is not root: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(s.dir, unix.MNT_DETACH) })
	// include/uapi/linux/fuse.h: struct fuse_out_header and fuse_init_out, of version 7.31.
	init := s.request()
	answer := make([]byte, 16+64)
	binary.NativeEndian.PutUint32(answer, uint32(len(answer)))
	copy(answer[8:], init[8:16]) // unique
	binary.NativeEndian.PutUint32(answer[16:], 7)
	binary.NativeEndian.PutUint32(answer[20:], 31)
	binary.NativeEndian.PutUint32(answer[36:], 4096) // max_write
	if _, err := unix.Write(dev, answer); err != nil {
		t.Fatal(err)
	}
	return s
}

// request reads what somebody asks for.
func (s *silentFS) request() []byte {
	s.t.Helper()
	b := make([]byte, 64<<10)
	n, err := unix.Read(s.dev, b)
	if err != nil || n < 40 {
		s.t.Fatalf("request of %d bytes: %v", n, err)
	}
	return b[:n]
}

// close lets go whoever waits.
func (s *silentFS) close() {
	if s.dev >= 0 {
		_ = unix.Close(s.dev)
	}
	s.dev = -1
}

func TestProcessThatCannotEndDoesNotHoldTheRestartUp(t *testing.T) {
	fs := newSilentFS(t)
	k := startKeeper(t)
	d := k.next()
	d.ask("push fanotify", "ok")
	d.ask("hang "+filepath.Join(fs.dir, "x"), "ok")
	below := k.next()
	fs.request() // and no answer
	stuck, err := parentOf(below.pid)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time it is known, and not waited for
		d.kill(syscall.SIGKILL)
		began := time.Now()
		d = k.next()
		if !processRuns(stuck) {
			t.Error("the process ended: it proves nothing")
		}
		if processRuns(below.pid) {
			t.Error("what the process had started still runs beside the new command")
		}
		d.ask("read fanotify", "fanotify")
		t.Logf("started again after %v", time.Since(began))
	}
	fs.close()
	for deadline := time.Now().Add(patience); processRuns(stuck); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the process does not end although what it waited for came")
		}
	}
	d.kill(syscall.SIGKILL)
	k.next().ask("read fanotify", "fanotify")
}
