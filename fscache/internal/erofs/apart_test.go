package erofs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/enginetest"
)

// patience bounds waits for what must happen.
const patience = 30 * time.Second

// soon waits for what the kernel or another process brings about in its own time.
func soon(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// fileImage makes the options of a mount from files, which any kernel from 6.12 on can make. It skips where New cannot.
func fileImage(t *testing.T) []Option {
	t.Helper()
	blob := fscache.Object{Key: fscache.Key{Domain: "d", ID: "blob"}, Size: fscache.BlockSize}
	boot, err := enginetest.Bootstrap([]fscache.Object{blob})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	source, device := filepath.Join(dir, "boot"), filepath.Join(dir, "blob")
	if err := errors.Join(os.WriteFile(source, boot, 0o600), os.WriteFile(device, make([]byte, fscache.BlockSize), 0o600)); err != nil {
		t.Fatal(err)
	}
	options := []Option{{"source", source}, {"device", device}}
	fd, err := New(options)
	if err != nil {
		t.Skipf("this process cannot mount EROFS from a file: %v", err)
	}
	if err := unix.Close(fd); err != nil {
		t.Fatal(err)
	}
	return options
}

// stuck makes the options of a mount that sleeps until somebody opens the FIFO for writing.
func stuck(t *testing.T) (options []Option, fifo string) {
	t.Helper()
	options = fileImage(t)
	fifo = filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	options[0].Value = fifo
	return options, fifo
}

// descriptors returns what a process has open.
func descriptors(pid int) []string {
	var all []string
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, l := range links {
		to, _ := os.Readlink(l)
		all = append(all, to)
	}
	return all
}

func TestMountMadeApartIsAsOneMadeHere(t *testing.T) {
	options := fileImage(t)
	before := descriptors(os.Getpid())
	fd, err := NewApart(t.Context(), options)
	if err != nil {
		t.Fatal(err)
	}
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("descriptor %d: %v, or programs that are started get it", fd, err)
	}
	dir := t.TempDir()
	if err := Attach(fd, dir); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()
	if err := unix.Close(fd); err != nil {
		t.Error(err)
	}
	if _, err := os.ReadFile(filepath.Join(dir, "blob")); err != nil {
		t.Error(err)
	}
	if err := Unmount(dir); err != nil {
		t.Error(err)
	}
	if after := descriptors(os.Getpid()); len(after) != len(before) {
		t.Errorf("open before: %q, after: %q", before, after)
	}
}

func TestErrorsOfAMountMadeApartAreThoseOfOneMadeHere(t *testing.T) {
	options := fileImage(t)
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, make([]byte, 2*fscache.BlockSize), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, options := range map[string][]Option{
		"an image that is none":          {{"source", empty}},
		"a device too many":              append(slices.Clone(options), options[1]),
		"no such file":                   {{"source", empty + "/none"}},
		"an option there is none of":     {{"source", empty}, {"colour", "green"}},
		"a value longer than the kernel": {{"source", strings.Repeat("x", maxValue+1)}},
	} {
		t.Run(name, func(t *testing.T) {
			_, want := New(options)
			fd, got := NewApart(t.Context(), options)
			if want == nil || got == nil || fd != -1 {
				t.Fatalf("descriptor %d, %v; made here: %v", fd, got, want)
			}
			var refused, refusedHere *RefusedError
			var errno, errnoHere unix.Errno
			if errors.As(got, &refused) != errors.As(want, &refusedHere) || errors.As(got, &errno) != errors.As(want, &errnoHere) ||
				errno != errnoHere || got.Error() != want.Error() {
				t.Errorf("%v (%d), made here: %v (%d)", got, errno, want, errnoHere)
			}
		})
	}
}

func TestHelperHasNothingOfWhoStartedIt(t *testing.T) {
	t.Setenv("LISTEN_FDS", "1")
	own, err := os.CreateTemp(t.TempDir(), "own")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	if _, err := unix.FcntlInt(own.Fd(), unix.F_SETFD, 0); err != nil { // as what a supervisor passes
		t.Fatal(err)
	}
	h, err := startHelper()
	if err != nil {
		t.Fatal(err)
	}
	pid := h.cmd.Process.Pid
	var name []byte
	soon(t, "the helper runs", func() bool {
		name, err = os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		return err == nil && string(name) == helperName+"\x00"
	})
	// Go's runtime has sockets polled, and as it starts it looks at the machine and the control group.
	runtimes := []string{"socket:", "pipe:", "/dev/", "anon_inode:[event", "/sys/", "/proc/"}
	for _, d := range descriptors(pid) {
		if d != stderrOf(t) && !slices.ContainsFunc(runtimes, func(p string) bool { return strings.HasPrefix(d, p) }) {
			t.Errorf("the helper has %s", d)
		}
	}
	if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); err != nil || len(env) != 0 {
		t.Errorf("the helper's environment: %q, %v", env, err)
	}
	if group, err := unix.Getpgid(pid); err != nil || group != pid {
		t.Errorf("the helper is in process group %d (%v): what a terminal sends to this one's reaches it", group, err)
	}
	// And it ends with whoever started it.
	if err := h.conn.Close(); err != nil {
		t.Error(err)
	}
	<-h.ended
}

func stderrOf(t *testing.T) string {
	t.Helper()
	to, err := os.Readlink("/proc/self/fd/2")
	if err != nil {
		t.Fatal(err)
	}
	return to
}

func TestMountMadeApartIsGivenUpWhenItsContextEnds(t *testing.T) {
	options, _ := stuck(t)
	gaveUp := errors.New("had enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	done := make(chan error, 1)
	go func() { // ends when the context does
		_, err := NewApart(ctx, options)
		done <- err
	}()
	soon(t, "a helper sleeps in the kernel", func() bool { return len(mounting(t)) == 1 })
	cancel(gaveUp)
	err := <-done
	var left *LeftError
	if !errors.As(err, &left) || !errors.Is(err, gaveUp) {
		t.Fatalf("%v, want a *LeftError, and why", err)
	}
	soon(t, "the helper was killed and reaped", func() bool { return errors.Is(unix.Kill(left.PID, 0), unix.ESRCH) })
}

// mounting lists this process's helpers that sleep in fsconfig(2).
func mounting(t *testing.T) (pids []int) {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range stats {
		var pid int
		if _, err := fmt.Sscanf(s, "/proc/%d/stat", &pid); err != nil {
			continue
		}
		if b, err := os.ReadFile(s); err != nil || !strings.Contains(string(b), fmt.Sprintf(" %d %d ", os.Getpid(), pid)) {
			continue // not this process's child in a group of its own
		}
		calls, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", pid))
		for _, c := range calls {
			if b, err := os.ReadFile(c); err == nil && strings.HasPrefix(string(b), fmt.Sprint(unix.SYS_FSCONFIG)+" ") {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

func TestHelperThatIsKilledIsAnError(t *testing.T) {
	options, _ := stuck(t)
	done := make(chan error, 1)
	go func() { // ends when the helper does
		_, err := NewApart(t.Context(), options)
		done <- err
	}()
	var pids []int
	soon(t, "a helper sleeps in the kernel", func() bool { pids = mounting(t); return len(pids) == 1 })
	if err := unix.Kill(pids[0], unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("%v, want that the process was killed", err)
	}
}

func TestMountThatNobodyTakesEndsTheHelper(t *testing.T) {
	options, fifo := stuck(t)
	h, err := startHelper()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { // ends when the socket is closed below
		_, _, err := h.ask(options)
		done <- err
	}()
	soon(t, "a helper sleeps in the kernel", func() bool { return len(mounting(t)) == 1 })
	if err := h.conn.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil {
		t.Error("ask has an answer")
	}
	// Its turn: what it opens is no image, but it has an answer that nobody takes.
	f, err := os.OpenFile(fifo, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	<-h.ended
	if status := h.cmd.ProcessState.Sys().(syscall.WaitStatus); status.ExitStatus() != 1 {
		t.Errorf("the helper ended with %v, want 1, for it could not send", h.cmd.ProcessState)
	}
}
