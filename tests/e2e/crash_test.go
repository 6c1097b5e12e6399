package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/tests/host"
	"holdfast/tests/link"
)

// patience bounds every wait for the daemon or the keeper.
const patience = 60 * time.Second

// until waits for what is about to be true.
func (h *testHost) until(what string, is func() bool) {
	h.t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			h.t.Fatalf("not within %v: %s\nthe daemon's log:\n%s", patience, what, h.Log())
		}
	}
}

// pid is the running daemon's process id.
func (h *testHost) pid() int {
	h.t.Helper()
	s, err := h.Status()
	if err != nil {
		h.t.Fatal(err)
	}
	return s.PID
}

// kill kills the daemon and waits until the keeper has another one serving.
func (h *testHost) kill() {
	h.t.Helper()
	old := h.pid()
	if err := unix.Kill(old, unix.SIGKILL); err != nil {
		h.t.Fatal(err)
	}
	h.until("another daemon serves", func() bool {
		s, err := h.Status()
		return err == nil && s.PID != old
	})
}

// signalKeeper sends the keeper a signal.
func (h *testHost) signalKeeper(s unix.Signal) {
	h.t.Helper()
	if err := unix.Kill(h.KeeperPID(), s); err != nil {
		h.t.Fatal(err)
	}
}

// stopDaemon has the keeper stop the daemon, and stay, for something is mounted.
func (h *testHost) stopDaemon() {
	h.t.Helper()
	old := h.pid()
	h.signalKeeper(unix.SIGTERM)
	h.until("the daemon is gone", func() bool { return unix.Kill(old, 0) != nil })
	h.until("the keeper says that it stays", func() bool { return strings.Contains(h.Log(), "not ending") })
}

// startDaemon has the keeper start the daemon it stopped.
func (h *testHost) startDaemon() {
	h.t.Helper()
	h.signalKeeper(unix.SIGHUP)
	h.until("the daemon serves again", func() bool { _, err := h.Status(); return err == nil })
}

// engine is the engine that the daemon chose.
func (h *testHost) engine() string {
	h.t.Helper()
	s, err := h.Status()
	if err != nil {
		h.t.Fatal(err)
	}
	return s.Engine
}

func TestKilledDaemonGivesNoReaderAWrongByte(t *testing.T) {
	h := newHost(t)
	const files, kills = 8, 4
	_, image, m := counted(t, h, link.Config{RTT: 50 * time.Millisecond, Rate: 1 << 20}, files)
	mnt := h.mount(image, "--prefetch=off")
	var wg sync.WaitGroup
	for i := range files {
		p := "f" + strconv.Itoa(i)
		wg.Go(func() { // ends when its file was read; waited for below
			got, err := readFile(filepath.Join(mnt, p))
			if err != nil || !bytes.Equal(got, m[p].content) {
				t.Errorf("%s: %v, %d bytes, the first wrong one at %d", p, err, len(got), difference(got, m[p].content))
			}
		})
	}
	for range kills {
		h.until("readers wait", func() bool {
			s, err := h.Status()
			return err == nil && s.Pending > 0
		})
		h.kill()
	}
	wg.Wait()
	dropCaches(t)
	m.compare(t, mnt)
}

func TestIdleDaemonWithNothingMountedComesBackForACommandAndLetsItsKeeperEnd(t *testing.T) {
	h := newHost(t, "--idle-exit", "300ms")
	_, image, m := counted(t, h, link.Config{}, 1)
	idle := func(since string) {
		h.until("the daemon is idle", func() bool {
			log := h.Log()
			return strings.LastIndex(log, "the command is idle") > strings.LastIndex(log, since)
		})
	}
	idle(`"serving"`)
	mnt := h.mount(image)
	m.compare(t, mnt)
	h.must("umount", mnt)
	idle(`"unmounted"`) // and the host is stopped, which wants the keeper's end
}

func TestFrozenDaemonIsReplacedAndItsReaderServed(t *testing.T) {
	dir, engine := workDir(t)
	h := startHostWith(t, host.Options{Bin: bin, Dir: dir, Keep: []string{"--watchdog", "3s"}, Serve: []string{"--engine", engine}})
	_, image, m := counted(t, h, link.Config{}, 2)
	mnt := h.mount(image, "--prefetch=off")
	frozen := h.pid()
	if err := unix.Kill(frozen, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	got, err := readFile(filepath.Join(mnt, "f1")) // returns only when somebody answers
	if err != nil || !bytes.Equal(got, m["f1"].content) {
		t.Errorf("a read that began while the daemon was frozen: %v, %d bytes, the first wrong one at %d", err, len(got), difference(got, m["f1"].content))
	}
	if now := h.pid(); now == frozen {
		t.Errorf("daemon %d, which was frozen, serves", now)
	}
	dropCaches(t)
	m.compare(t, mnt)
}

func TestStoppedDaemonLeavesMountsThatAreReadWhenItIsBack(t *testing.T) {
	h := newHost(t)
	_, image, m := counted(t, h, link.Config{}, 4)
	whole, part := h.mount(image, "--prefetch=on"), h.mount(image, "--domain=other", "--prefetch=off")
	if err := h.WaitComplete(whole); err != nil {
		t.Fatal(err)
	}
	h.stopDaemon()
	dropCaches(t)
	m.compare(t, whole) // with nobody there
	done := make(chan error, 1)
	go func() { // ends when the file is read; waited for below
		got, err := readFile(filepath.Join(part, "f0"))
		if err == nil && !bytes.Equal(got, m["f0"].content) {
			err = fmt.Errorf("wrong bytes, the first at %d", difference(got, m["f0"].content))
		}
		done <- err
	}()
	h.startDaemon()
	if err := <-done; err != nil {
		t.Errorf("a read begun while the daemon was stopped: %v", err)
	}
	dropCaches(t)
	m.compare(t, whole)
	m.compare(t, part)
}

// An elsewhere is a process with a mount namespace of its own, as a container has, which reads files when it is told to.
type elsewhere struct {
	in  io.WriteCloser
	out *bufio.Reader
	cmd *exec.Cmd
}

// readElsewhere is the environment that makes the test binary such a process: see TestMain.
const readElsewhere = "HOLDFAST_E2E_READ_ELSEWHERE"

// serveElsewhere answers each path on standard input with the SHA-256 of the file's bytes and what ended them.
func serveElsewhere() {
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		b, err := readFile(lines.Text())
		fmt.Printf("%x %v\n", sha256.Sum256(b), err)
	}
}

func newElsewhere(t *testing.T) *elsewhere {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), readElsewhere+"=1")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS} // which makes its mounts private
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	e := &elsewhere{in: in, out: bufio.NewReader(out), cmd: cmd}
	t.Cleanup(e.end)
	return e
}

// read reads a file there and says what is wrong with what it got.
func (e *elsewhere) read(path string, want []byte) error {
	if _, err := fmt.Fprintln(e.in, path); err != nil {
		return err
	}
	line, err := e.out.ReadString('\n')
	if err != nil {
		return err
	}
	if right := fmt.Sprintf("%x <nil>\n", sha256.Sum256(want)); line != right {
		return fmt.Errorf("%s: got %s", path, strings.TrimSpace(line))
	}
	return nil
}

// end ends the process, and with it its namespace and what is mounted there only.
func (e *elsewhere) end() {
	_ = e.in.Close()
	_ = e.cmd.Wait() // it ends with its input
}

func TestMountThatLivesOnInAnotherNamespaceIsServedByEverySuccessor(t *testing.T) {
	h := newHost(t)
	_, image, m := counted(t, h, link.Config{}, 4)
	mnt := h.mount(image, "--prefetch=off")
	ns := newElsewhere(t)
	want := func(file string) {
		t.Helper()
		if err := ns.read(filepath.Join(mnt, file), m[file].content); err != nil {
			t.Errorf("in the other namespace: %v\nthe daemon's log:\n%s", err, h.Log())
		}
	}
	want("f0")
	h.must("umount", mnt)
	want("f1") // by the daemon that unmounted it
	h.kill()
	want("f2") // by one that knows of it from its records only
	h.stopDaemon()
	h.startDaemon()
	want("f3")
	ns.end()
	// The kernel takes a namespace down in its own time; the daemon looks whenever something is mounted or unmounted.
	h.until("the daemon sees that nothing uses the image", func() bool {
		h.must("umount", h.mount(image, "--prefetch=off"))
		return h.objects() == 0
	})
	// newHost's cleanup sees that the keeper ends: nothing is held any more.
}

func TestSecondDaemonOnOneRootEndsWithItsKeeper(t *testing.T) {
	h := newHost(t)
	tarball := filepath.Join(h.Dir, "small.tar")
	m := bigFiles(1)
	m.writeTar(t, tarball)
	image := "oci:" + filepath.Join(h.Dir, "image") + ":small"
	h.must("convert", "tar:"+tarball, image)
	mnt := h.mount(image, "--prefetch=off")
	global := func(run string) []string {
		return []string{"--root", filepath.Join(h.Dir, "root"), "--run", filepath.Join(h.Dir, run)}
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	args := append(append(global("run2"), "keep", "--", bin), append(global("run2"), "serve", "--engine", h.engine())...)
	out, err := exec.CommandContext(ctx, bin, args...).CombinedOutput()
	if ctx.Err() != nil || err == nil || !bytes.Contains(out, []byte("another")) {
		t.Errorf("a second keeper and daemon on one root: %v, %v, %s; want an end, and an error about the other one", ctx.Err(), err, out)
	}
	m.compare(t, mnt)
}

func TestPrefetchGoesOnAfterTheDaemonWasKilled(t *testing.T) {
	h := newHost(t)
	_, image, m := counted(t, h, link.Config{Rate: 4 << 20}, 8)
	mnt := h.mount(image, "--prefetch=on")
	fetched := func() bool {
		s, err := h.Status()
		return err == nil && s.Fetched > 0
	}
	h.until("something is fetched", fetched)
	h.kill()
	if h.engine() == "fanotify" { // where it cannot be written down before a reader comes
		h.until("something is fetched by the new daemon", fetched)
	}
	if got, err := readFile(filepath.Join(mnt, "f0")); err != nil || !bytes.Equal(got, m["f0"].content) {
		t.Errorf("read after the daemon was killed: %v, or wrong bytes", err)
	}
	h.until("the image is complete", func() bool {
		s, err := h.Status()
		return err == nil && len(s.Mounts) == 1 && s.Mounts[0].Complete
	})
}
