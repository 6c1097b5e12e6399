package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/tests/link"
)

// A bootable is a host that can be started anew: its daemon lives in a mount namespace of its own, in which the kernel tells another
// boot id.
type bootable struct {
	*testHost
	ns   *elsewhere
	boot string // file that is bound over the kernel's boot id
}

// newBootable starts one, with flags for serve.
func newBootable(t *testing.T, serve ...string) *bootable {
	t.Helper()
	dir, engine := workDir(t)
	b := &bootable{ns: newElsewhere(t), boot: filepath.Join(dir, "boot_id")}
	b.newBoot(t, 1)
	b.inside(t, "mount", "--bind", b.boot, "/proc/sys/kernel/random/boot_id")
	script := filepath.Join(dir, "holdfast")
	text := fmt.Sprintf("#!/bin/sh\nexec nsenter --mount=/proc/%d/ns/mnt %s \"$@\"\n", b.ns.cmd.Process.Pid, bin)
	if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	b.testHost = startHost(t, script, dir, append([]string{"--engine", engine}, serve...)...)
	return b
}

// newBoot changes the boot id.
func (b *bootable) newBoot(t *testing.T, n int) {
	t.Helper()
	if err := os.WriteFile(b.boot, fmt.Appendf(nil, "%08d-0000-4000-8000-000000000000\n", n), 0o600); err != nil {
		t.Fatal(err)
	}
}

// inside runs a command in the host's mount namespace.
func (b *bootable) inside(t *testing.T, args ...string) {
	t.Helper()
	args = append([]string{"--mount=/proc/" + strconv.Itoa(b.ns.cmd.Process.Pid) + "/ns/mnt"}, args...)
	if out, err := exec.Command("nsenter", args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// crash ends the host as a power failure does, as far as a process sees: keeper, daemon and mounts are gone.
func (b *bootable) crash(mounts ...string) {
	b.t.Helper()
	daemon := b.pid()
	for _, m := range mounts {
		b.inside(b.t, "umount", "--lazy", m)
	}
	if err := errors.Join(b.KillKeeper(), unix.Kill(daemon, unix.SIGKILL)); err != nil {
		b.t.Fatal(err)
	}
	b.until("the daemon is gone", func() bool { return unix.Kill(daemon, 0) != nil })
}

// path is where a file of the host's is seen from here.
func (b *bootable) path(p string) string {
	return fmt.Sprintf("/proc/%d/root%s", b.ns.cmd.Process.Pid, p)
}

func (b *bootable) restart(serve ...string) {
	b.t.Helper()
	if err := b.Restart(append([]string{"--engine", engineFlag()}, serve...)...); err != nil {
		b.t.Fatal(err)
	}
}

func TestMountsAreMadeAgainAfterABootAndWhatIsCachedIsChecked(t *testing.T) {
	b := newBootable(t)
	_, image, m := counted(t, b.testHost, link.Config{}, 4)
	mnt := b.mount(image, "--prefetch=on")
	b.until("the image is complete", func() bool {
		s, err := b.Status()
		return err == nil && len(s.Mounts) == 1 && s.Mounts[0].Complete
	})
	b.crash(mnt)
	flipped := b.flipCached()
	b.newBoot(t, 2)
	b.restart()
	s, err := b.Status()
	if err != nil || len(s.Mounts) != 1 || s.Mounts[0].Dir != mnt {
		t.Fatalf("after the boot: %+v, %v; want the image on %s", s.Mounts, err, mnt)
	}
	m.compare(t, b.path(mnt))
	if after, err := b.Status(); err != nil || flipped && after.Fetched == 0 {
		t.Errorf("a byte of the cache was changed and nothing fetched again: %+v, %v", after, err)
	}
	b.must("umount", mnt)
}

// flipCached changes a byte in the middle of the largest cache file, which a power failure may do to what was not synced. It says
// whether there is a file.
func (b *bootable) flipCached() bool {
	b.t.Helper()
	var largest string
	var size int64
	err := filepath.WalkDir(filepath.Join(b.Dir, "root", "cache"), func(p string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		fi, err := d.Info()
		if err == nil && fi.Size() > size {
			largest, size = p, fi.Size()
		}
		return err
	})
	if err != nil {
		b.t.Fatal(err)
	}
	if size < 1<<20 {
		return false
	}
	f, err := os.OpenFile(largest, os.O_RDWR, 0)
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, 1)
	if _, err := f.ReadAt(p, size/2); err != nil {
		b.t.Fatal(err)
	}
	p[0] ^= 1
	if _, err := f.WriteAt(p, size/2); err != nil {
		b.t.Fatal(err)
	}
	return true
}

func TestRemountPolicyIsKept(t *testing.T) {
	b := newBootable(t)
	_, image, m := counted(t, b.testHost, link.Config{}, 1)
	mnt := b.mount(image, "--prefetch=off")
	b.crash(mnt)
	b.newBoot(t, 2)
	b.restart("--remount", "report")
	status := b.must("status")
	if s, err := b.Status(); err != nil || len(s.Mounts) != 1 || !strings.Contains(status, "--remount=report") {
		t.Errorf("with --remount=report: %+v, %v, and status says:\n%s", s.Mounts, err, status)
	}
	if _, err := b.Run("state", "check"); err == nil {
		t.Error("holdfast state check finds nothing wrong with a mount on record that is not there")
	}
	b.crash()
	b.newBoot(t, 3)
	b.restart()
	if got, err := readFile(b.path(filepath.Join(mnt, "f0"))); err != nil || !bytes.Equal(got, m["f0"].content) {
		t.Errorf("with --remount=yes: %v, or wrong bytes", err)
	}
	b.crash(mnt)
	b.newBoot(t, 4)
	b.restart("--remount", "no")
	if s, err := b.Status(); err != nil || len(s.Mounts) != 0 {
		t.Errorf("with --remount=no: %+v, %v; want nothing on record", s.Mounts, err)
	}
}

func TestMountThatCannotBeMadeAgainIsReportedAndTriedAgain(t *testing.T) {
	b := newBootable(t)
	_, image, m := counted(t, b.testHost, link.Config{}, 1)
	mnt := b.mount(image, "--prefetch=off")
	b.crash(mnt)
	if err := os.Remove(mnt); err != nil {
		t.Fatal(err)
	}
	b.newBoot(t, 2)
	b.restart()
	if status := b.must("status"); !strings.Contains(status, "no such directory") {
		t.Errorf("status does not say why the image is not mounted:\n%s", status)
	}
	b.crash()
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	b.newBoot(t, 3)
	b.restart()
	m.compare(t, b.path(mnt))
	b.must("umount", mnt)
}
