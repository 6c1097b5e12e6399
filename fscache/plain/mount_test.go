package plain

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/enginetest"
)

// image makes the files of an image with two blobs, and a directory to mount it on. The file of a blob has its content.
func image(t *testing.T) (bootstrap string, devices []string, contents [][]byte, mnt string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root, and this is not root")
	}
	dir := t.TempDir()
	var objects []fscache.Object
	for _, id := range []string{"one", "two"} {
		p := bytes.Repeat([]byte(id+" "), 4*fscache.BlockSize/4)
		path := filepath.Join(dir, id)
		if err := os.WriteFile(path, p, 0o600); err != nil {
			t.Fatal(err)
		}
		objects = append(objects, fscache.Object{Key: fscache.Key{Domain: "d", ID: id}, Size: int64(len(p))})
		devices, contents = append(devices, path), append(contents, p)
	}
	boot, err := enginetest.Bootstrap(objects)
	if err != nil {
		t.Fatal(err)
	}
	bootstrap, mnt = filepath.Join(dir, "boot"), filepath.Join(dir, "mnt")
	if err := errors.Join(os.WriteFile(bootstrap, boot, 0o600), os.Mkdir(mnt, 0o700)); err != nil {
		t.Fatal(err)
	}
	return bootstrap, devices, contents, mnt
}

// check compares the files of a mounted image, and unmounts it.
func check(t *testing.T, mnt string, contents [][]byte) {
	t.Helper()
	for i, want := range contents {
		name := []string{"one", "two"}[i]
		if got, err := os.ReadFile(filepath.Join(mnt, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v, want %d others", name, len(got), err, len(want))
		}
	}
	if err := Unmount(mnt); err != nil {
		t.Error(err)
	}
}

func TestImageIsMountedFromItsFiles(t *testing.T) {
	bootstrap, devices, contents, mnt := image(t)
	if err := Mount(bootstrap, devices, mnt); err != nil {
		t.Fatal(err)
	}
	if err := Mount(bootstrap, devices, mnt); !errors.Is(err, fscache.ErrBusy) {
		t.Errorf("mounted over a mount: %v", err)
	}
	check(t, mnt, contents)
}

func TestLoopDevicesGoWithTheMount(t *testing.T) {
	bootstrap, devices, contents, mnt := image(t)
	if err := mountLoops(bootstrap, devices, mnt); err != nil {
		t.Fatal(err)
	}
	if n := len(loopsOf(t, devices)); n != len(devices) {
		t.Errorf("%d loop devices of %d blobs", n, len(devices))
	}
	check(t, mnt, contents)
	wantNoLoops(t, devices)
	// And with a mount that is refused.
	if err := os.WriteFile(bootstrap, make([]byte, 2*fscache.BlockSize), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := mountLoops(bootstrap, devices, mnt); err == nil {
		t.Error("no image was mounted")
	}
	wantNoLoops(t, devices)
}

// wantNoLoops waits until the kernel has let the loop devices go, which it does when the last one who looked at them has.
func wantNoLoops(t *testing.T, files []string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); len(loopsOf(t, files)) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still there: %v", loopsOf(t, files))
		}
	}
}

// loopsOf lists the loop devices of files.
func loopsOf(t *testing.T, files []string) (list []string) {
	t.Helper()
	paths, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
			t.Fatal(err)
		}
		for _, f := range files {
			if string(bytes.TrimSpace(b)) == f {
				list = append(list, p)
			}
		}
	}
	return list
}
