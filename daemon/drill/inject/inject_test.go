package inject

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// child starts a process that does nothing.
func child(t *testing.T) (*exec.Cmd, *Process) {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	OwnGroup(cmd)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // may have ended
		_ = cmd.Wait()
	})
	p, err := Find(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Release)
	return cmd, p
}

func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

func TestKilledProcessIsGoneAlsoWhileItsParentHasNotTakenNote(t *testing.T) {
	cmd, p := child(t)
	if p.Gone() {
		t.Fatal("gone from the start")
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	until(t, "it is gone", p.Gone)
	var status *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &status) || status.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL {
		t.Errorf("it ended with %v", err)
	}
	if err := p.Thaw(); !errors.Is(err, ErrGone) {
		t.Errorf("a signal to it: %v, want ErrGone", err)
	}
	if !p.Gone() {
		t.Error("not gone when its parent has taken note")
	}
}

func TestFrozenProcessStandsStillUntilItIsThawed(t *testing.T) {
	_, p := child(t)
	state := func() string {
		b, err := os.ReadFile("/proc/" + itoa(p.PID) + "/stat")
		if err != nil {
			t.Fatal(err)
		}
		return string(b[bytes.LastIndexByte(b, ')')+2])
	}
	if err := p.Freeze(); err != nil {
		t.Fatal(err)
	}
	until(t, "it is stopped", func() bool { return state() == "T" })
	if p.Gone() {
		t.Error("a frozen process counts as gone")
	}
	if err := p.Thaw(); err != nil {
		t.Fatal(err)
	}
	until(t, "it sleeps", func() bool { return state() == "S" })
}

func itoa(n int) string { return strconv.Itoa(n) }

func TestLimitOnFilesLeavesTheSpareOnesAndIsTakenBack(t *testing.T) {
	_, p := child(t)
	var before, now unix.Rlimit
	read := func(l *unix.Rlimit) {
		if err := unix.Prlimit(p.PID, unix.RLIMIT_NOFILE, nil, l); err != nil {
			t.Fatal(err)
		}
	}
	read(&before)
	free := func(below uint64) (n int) {
		for i := range below {
			if _, err := os.Readlink("/proc/" + itoa(p.PID) + "/fd/" + itoa(int(i))); err != nil {
				n++
			}
		}
		return n
	}
	limit, undo, err := p.LimitFiles(4)
	if err != nil {
		t.Fatal(err)
	}
	if read(&now); now.Cur != limit || free(limit) != 4 || now.Max != before.Max {
		t.Errorf("limit %d with %d free numbers below, want 4, and an unchanged maximum: %+v", limit, free(limit), now)
	}
	if err := undo(); err != nil {
		t.Fatal(err)
	}
	if read(&now); now != before {
		t.Errorf("put back to %+v, was %+v", now, before)
	}
	if _, undo, err = p.LimitFiles(4); err != nil {
		t.Fatal(err)
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	until(t, "it is gone", p.Gone)
	if err := undo(); err != nil {
		t.Errorf("undone after its end: %v", err)
	}
}

func TestLimitCountsFreeNumbersNotDescriptors(t *testing.T) {
	tests := []struct {
		used  []int
		spare int
		want  uint64
	}{
		{[]int{0, 1, 2}, 2, 5}, {[]int{0, 1, 2, 4}, 2, 6}, {[]int{0, 1, 2, 3}, 0, 4}, {[]int{0, 2, 16384}, 1, 3}, {nil, 3, 3},
	}
	for _, tt := range tests {
		used := map[int]bool{}
		for _, n := range tt.used {
			used[n] = true
		}
		if got := limitFor(used, tt.spare); got != tt.want {
			t.Errorf("%v and %d more: got %d, want %d", tt.used, tt.spare, got, tt.want)
		}
	}
}

func TestInitAndTheKernelAreNobodysVictims(t *testing.T) {
	for _, pid := range []int{-1, 0, 1} {
		if _, err := Find(pid); err == nil {
			t.Errorf("process %d was found", pid)
		}
	}
}

func TestParentIsFoundWithItsCommand(t *testing.T) {
	_, p := child(t)
	ppid, command, err := Parent(p.PID)
	if err != nil || ppid != os.Getpid() || len(command) == 0 || filepath.Base(command[0]) != filepath.Base(os.Args[0]) {
		t.Errorf("got %d %q, %v", ppid, command, err)
	}
}

func TestFullDiskTakesNothingMoreAndIsFreeAgainAfterwards(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=3m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	if !IsMountPoint(dir) || IsMountPoint(filepath.Dir(dir)) {
		t.Error("the mount point was not told from its parent")
	}
	taken, undo, err := Fill(filepath.Join(dir, "fill"))
	if err != nil || taken != 3<<20 {
		t.Fatalf("took %d bytes, %v", taken, err)
	}
	err = os.WriteFile(filepath.Join(dir, "more"), []byte("more"), 0o600)
	if Errno(err) != "ENOSPC" {
		t.Errorf("wrote more: %v", err)
	}
	if err := undo(); err != nil {
		t.Fatal(err)
	}
	if free, size, err := Space(dir); err != nil || free != size || size != 3<<20 {
		t.Errorf("free %d of %d, %v", free, size, err)
	}
}
