package cachefiles

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/internal/erofs"
)

// helpers lists the processes that make mounts.
func helpers(t *testing.T) (pids []int) {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lines {
		if b, err := os.ReadFile(l); err == nil && string(b) == "holdfast-mount\x00" {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(l)))
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

// nothingMounts waits until nothing is left of a mount that was begun.
func nothingMounts(t *testing.T, im image) {
	t.Helper()
	soon(t, "no process mounts", func() bool { return len(helpers(t)) == 0 })
	soon(t, "the kernel has no mount of the image", func() bool {
		lives, err := erofs.Lives(mountName(im.boot.Key))
		return err == nil && !lives
	})
}

// checkMounts mounts an image, reads from it, and unmounts it.
func checkMounts(t *testing.T, e *Engine, im image, dir string) {
	t.Helper()
	if names, err := os.ReadDir(dir); err != nil || len(names) != 0 {
		t.Errorf("the directory shows %v, %v", names, err)
	}
	if err := e.Mount(t.Context(), im.mount(dir)); err != nil {
		t.Fatalf("Mount: %v", err)
	}
	checkPage(t, dir, im.blob.Key, 7)
	if err := e.Unmount(t.Context(), dir); err != nil {
		t.Error(err)
	}
	soon(t, "nothing is open", func() bool { return len(e.Holding()) == 0 })
}

func TestProcessKilledInTheMiddleOfMountDiesAndItsSuccessorAnswers(t *testing.T) {
	needDevice(t)
	for _, step := range []struct {
		name  string
		waits bool // for certain the kernel's part of the mount, when the process dies
	}{
		{"open boot", true}, {"hold boot", true}, {"held boot", true}, {"open boot answered", false},
		{"read boot", true}, {"read boot written", true}, {"open blob", false}, {"held blob", false}, {"open blob answered", false},
	} {
		for how, kill := range map[string]bool{"left alone": false, "killed": true} { // as the keeper does
			t.Run(step.name+", helper "+how, func(t *testing.T) {
				im, dir := newImage(t, "apart", "boot", "blob"), t.TempDir()
				m := im.mount(dir)
				s := newSupervisor(t, im)
				s.mount = &m
				s.start(step.name, 1)
				s.dead()
				s.mount = nil
				left := helpers(t)
				if step.waits && len(left) != 1 {
					t.Errorf("%d processes mount, want the one that nobody has answered", len(left))
				}
				for _, pid := range left {
					if !kill {
						break
					}
					if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
						t.Error(err)
					}
				}
				e := s.succeed()
				nothingMounts(t, im)
				checkMounts(t, e, im, dir)
				soon(t, "nothing is held", func() bool { return s.holding() == 0 })
			})
		}
	}
}

func TestMountThatIsGivenUpLeavesNothingBehind(t *testing.T) {
	needDevice(t)
	im, dir := newImage(t, "giveup", "boot", "blob"), t.TempDir()
	e := openEngine(t, t.TempDir(), nil)
	add(t, e, im)
	opens := make(chan fscache.Request, 8)
	hold := make(chan struct{}, 1)
	hold <- struct{}{}
	serve(t, e, func(r fscache.Request) bool {
		if r.Op != fscache.OpOpen || r.Object != im.boot.Key {
			return false
		}
		select {
		case <-hold:
			opens <- r
			return true
		default:
			return false
		}
	}, im)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- e.Mount(ctx, im.mount(dir)) }() // ends when ctx does
	open := <-opens
	cancel()
	var left *erofs.LeftError
	if err := <-done; !errors.Is(err, context.Canceled) || !errors.As(err, &left) {
		t.Fatalf("Mount: %v, want that it gave up", err)
	}
	if got := helpers(t); len(got) != 1 || got[0] != left.PID {
		t.Errorf("%v mount, want %d, which waits for the open", got, left.PID)
	}
	fill(t, e, open, nil)
	nothingMounts(t, im)
	checkMounts(t, e, im, dir)
}
