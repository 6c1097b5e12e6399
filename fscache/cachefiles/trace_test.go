package cachefiles_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/cachefiles"
	"holdfast/fscache/internal/erofs"
	"holdfast/fscache/internal/trace"
	"holdfast/fscache/simkernel"
)

// TestTheModelDoesWhatTheKernelDoes does scripts on this kernel and on the simulated one.
func TestTheModelDoesWhatTheKernelDoes(t *testing.T) {
	if _, err := os.Stat("/dev/cachefiles"); err != nil && os.Getenv("HOLDFAST_ENGINE") != cachefiles.Name {
		t.Skipf("no cachefiles in this kernel: %v (the virtual machine of the tests has it)", err)
	}
	mode, scripts := simkernel.Cachefiles, []string{"cachefiles", "cachefiles-restore", "cachefiles-last"}
	if !restores(t) {
		mode, scripts = simkernel.CachefilesWithoutRestore, []string{"cachefiles", "cachefiles-norestore", "cachefiles-last"}
	}
	for _, script := range scripts {
		t.Run(script, func(t *testing.T) {
			trace.Compare(t, script, newMachine(t), simkernel.NewModel(mode))
		})
	}
}

// restores says whether the kernel has the command.
func restores(t *testing.T) bool {
	m := newMachine(t)
	defer m.close()
	return m.command("restore") == nil
}

// A machine is this kernel's cachefiles, without an engine.
type machine struct {
	*trace.Host
	t        *testing.T
	device   int
	requests map[string]cachefiles.Message
	files    map[string]int
	names    map[uint32]string // of objects, by the kernel's id
	boots    map[string][]byte // bootstraps, by name
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	dir := t.TempDir()
	fd, err := unix.Open("/dev/cachefiles", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{
		t: t, device: fd,
		requests: make(map[string]cachefiles.Message), files: make(map[string]int), names: make(map[uint32]string), boots: make(map[string][]byte),
	}
	m.Host = trace.NewHost(t, m.mount)
	t.Cleanup(m.close)
	for _, text := range []string{"dir " + dir, "tag trace", "bind ondemand"} {
		if err := m.command(text); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
	}
	return m
}

func (m *machine) close() {
	for _, fd := range m.files {
		_ = unix.Close(fd)
	}
	clear(m.files)
	if m.device >= 0 {
		_ = unix.Close(m.device)
	}
	m.device = -1
}

func (m *machine) command(text string) error {
	_, err := unix.Write(m.device, []byte(text))
	return err
}

func (m *machine) mount(_ []byte, boot fscache.Object, blobs []fscache.Object) (int, error) {
	options := []erofs.Option{
		{Name: "source", Value: "none"}, {Name: "fsid", Value: boot.Key.ID}, {Name: "domain_id", Value: trace.Domain},
	}
	for _, b := range blobs {
		options = append(options, erofs.Option{Name: "device", Value: b.Key.ID})
	}
	return erofs.New(options)
}

// Do implements trace.Machine.
func (m *machine) Do(s trace.Step) string {
	if s.Verb == "mount" {
		m.boots[s.Args[1]] = trace.Bootstrap(m.t, s.Args[2:])
	}
	if result, ok := m.Host.Do(s); ok {
		return result
	}
	args := s.Args
	switch s.Verb {
	case "request":
		return m.request(args[0])
	case "closes":
		var all []string
		for _, name := range args {
			all = append(all, m.request(name))
		}
		slices.Sort(all)
		return strings.Join(all, ", ")
	case "copen":
		size, err := strconv.ParseInt(args[1], 10, 64)
		if err != nil {
			size = -int64(unix.EIO)
		}
		return trace.ErrnoName(m.command(fmt.Sprintf("copen %d,%d", m.requests[args[0]].ID, size)))
	case "complete":
		return trace.ErrnoName(unix.IoctlSetInt(m.files[args[1]], cachefiles.CACHEFILES_IOC_READ_COMPLETE, int(m.requests[args[0]].ID)))
	case "write":
		return m.write(args)
	case "attached":
		return m.attached(m.files[args[0]])
	case "dup":
		fd, err := unix.FcntlInt(uintptr(m.files[args[0]]), unix.F_DUPFD_CLOEXEC, 0)
		m.files[args[1]] = fd
		return trace.ErrnoName(err)
	case "close":
		fd := m.files[args[0]]
		delete(m.files, args[0])
		return trace.ErrnoName(unix.Close(fd))
	case "restore":
		return trace.ErrnoName(m.command("restore"))
	case "last":
		m.close()
		return "ok"
	}
	return "no such step"
}

// request waits for one and reads it.
func (m *machine) request(name string) string {
	b := make([]byte, cachefiles.CACHEFILES_MSG_MAX_SIZE)
	n := 0
	var readErr error
	came := trace.Eventually(m.t.Context(), func() bool {
		p := []unix.PollFd{{Fd: int32(m.device), Events: unix.POLLIN}}
		if ready, err := unix.Poll(p, 100); ready != 1 || err != nil && !errors.Is(err, unix.EINTR) {
			return false
		}
		n, readErr = unix.Read(m.device, b)
		return n > 0 || readErr != nil
	})
	if readErr != nil || !came {
		return map[bool]string{true: trace.ErrnoName(readErr), false: "nothing"}[came]
	}
	msg, err := cachefiles.DecodeMessage(b[:n])
	if err != nil {
		return err.Error()
	}
	m.requests[name] = msg
	switch msg.Opcode {
	case cachefiles.CACHEFILES_OP_OPEN:
		unix.CloseOnExec(int(msg.Open.FD))
		m.files[name] = int(msg.Open.FD)
		m.names[msg.ObjectID] = msg.Open.Cookie
		return fmt.Sprintf("open %s #%d", msg.Open.Cookie, msg.ID)
	case cachefiles.CACHEFILES_OP_CLOSE:
		return "close " + m.names[msg.ObjectID]
	}
	return fmt.Sprintf("read %s %d+%d #%d", m.names[msg.ObjectID], msg.Read.Off, msg.Read.Len, msg.ID)
}

// write writes a bootstrap's own bytes to it, which the kernel must understand.
func (m *machine) write(args []string) string {
	off, n := trace.Range(args[1])
	p := trace.Data(n)
	if boot := m.boots[m.requests[args[0]].Open.Cookie]; boot != nil {
		copy(p, boot)
	}
	_, err := unix.Pwrite(m.files[args[0]], p, off)
	return trace.ErrnoName(err)
}

// attached waits until the kernel has a file for an object, which lseek(2) tells.
func (m *machine) attached(fd int) string {
	var err error
	trace.Eventually(m.t.Context(), func() bool {
		_, err = unix.Seek(fd, 0, unix.SEEK_CUR)
		return err == nil
	})
	return trace.ErrnoName(err)
}

// mountsEnv makes a copy of the test binary a process that mounts.
const mountsEnv = "CACHEFILES_TEST_MOUNTS"

func init() {
	if os.Getenv(mountsEnv) == "" {
		return
	}
	_, err := (&machine{}).mount(nil, fscache.Object{Key: trace.Key("boot")}, nil)
	fmt.Fprintln(os.Stderr, "mount:", err)
	os.Exit(1)
}

// A process that mounts sleeps uninterruptibly until the bootstrap's OPEN is answered (netfs/fscache_io.c, fscache_begin_operation:
// wait_var_event_timeout, over and over). Killed meanwhile it stays, with all its descriptors and their locks, and who waits for it
// waits. So a process that answers OPENs must not be the one that mounts: nobody would answer.
func TestAProcessThatIsKilledWhileItMountsStaysUntilItsOpenIsAnswered(t *testing.T) {
	if _, err := os.Stat("/dev/cachefiles"); err != nil && os.Getenv("HOLDFAST_ENGINE") != cachefiles.Name {
		t.Skipf("no cachefiles in this kernel: %v (the virtual machine of the tests has it)", err)
	}
	m := newMachine(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), mountsEnv+"=1")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if got := m.request("open"); got != "open boot #0" {
		t.Errorf("request: %s", got)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	gone := make(chan struct{})
	go func() { // ends with the process
		_ = cmd.Wait()
		close(gone)
	}()
	asleep := func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/stat", cmd.Process.Pid))
		return err == nil && strings.Contains(string(stat), ") D ")
	}
	if !trace.Eventually(t.Context(), func() bool {
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", cmd.Process.Pid))
		return err == nil && len(tasks) == 1 && asleep() // its other threads are gone
	}) {
		t.Error("it does not sleep uninterruptibly")
	}
	select {
	case <-gone:
		t.Error("it died")
	case <-time.After(100 * time.Millisecond):
	}
	if got := m.Do(trace.Step{Verb: "copen", Args: []string{"open", "EIO"}}); got != "ok" {
		t.Errorf("copen: %s", got)
	}
	<-gone
}
