package cachefiles

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"

	"holdfast/fscache"
	"holdfast/tests/vm/wire"
)

// The environment that makes the test binary a daemon which dies: the request it takes and never answers, and its cache.
const (
	victimHolds = "CACHEFILES_TEST_HOLDS"
	victimDir   = "CACHEFILES_TEST_DIR"
)

func TestMain(m *testing.M) {
	if holds := os.Getenv(victimHolds); holds != "" {
		err := victim(holds, os.Getenv(victimDir))
		fmt.Println(err)
		os.Exit(1)
	}
	// In the virtual machine only the disk can hold a cache.
	if os.Getenv("HOLDFAST_ENGINE") == Name && os.Getenv("TMPDIR") == "" {
		if err := os.Setenv("TMPDIR", wire.DiskDir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// A takeoverImage is what the victim serves.
func takeoverImage() (image, error) {
	t := new(noTest)
	im := newImage(t, "takeover", "boot", "blob")
	return im, t.err
}

// noTest takes the place of a test in the victim.
type noTest struct {
	testing.TB
	err error
}

func (*noTest) Helper()             {}
func (t *noTest) Fatal(args ...any) { t.err = fmt.Errorf("%v", args) }

// victim serves the device it inherited as descriptor 3 until it has the request it is to hold, says so, and waits to be killed.
func victim(holds, dir string) error {
	im, err := takeoverImage()
	if err != nil {
		return err
	}
	e, err := Open(Config{Dir: dir, Device: os.NewFile(3, devicePath)})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for _, o := range []fscache.Object{im.boot, im.blob} {
		if err := e.Add(context.Background(), o); err != nil {
			return err
		}
	}
	for {
		r, err := e.Next()
		if err != nil {
			return err
		}
		if fmt.Sprintf("%s %s", r.Op, r.Object.ID) == holds {
			fmt.Println("holding")
			select {}
		}
		if r.Op == fscache.OpRead && r.Object == im.boot.Key {
			err = e.WriteAt(r.Object, im.bytes, 0)
		}
		if err == nil {
			err = e.Answer(r, fscache.OK)
		}
		if err != nil {
			return err
		}
	}
}

func TestRestoreRedeliversAfterTheReaderOfTheDeviceDied(t *testing.T) {
	needDevice(t)
	for _, holds := range []string{"open boot", "read boot", "open blob", "read blob"} {
		t.Run(holds, func(t *testing.T) {
			im, err := takeoverImage()
			if err != nil {
				t.Fatal(err)
			}
			cache, dir := t.TempDir(), t.TempDir()
			device, err := openDevice()
			if err != nil {
				t.Fatal(err)
			}
			defer device.Close()
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), victimHolds+"="+holds, victimDir+"="+cache)
			cmd.ExtraFiles = []*os.File{device}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _, _ = cmd.Process.Kill(), cmd.Wait() })
			says := bufio.NewReader(out)
			expect := func(want string) {
				if line, err := says.ReadString('\n'); err != nil || line != want+"\n" {
					t.Fatalf("the first process says %q, %v, want %q", line, err, want)
				}
			}
			expect("ready") // a mount without a cache would fail
			mounted := startMount(t, im, dir)
			read := make(chan error, 1)
			go func() { // ends when the successor has answered
				if err := <-mounted; err != nil {
					read <- fmt.Errorf("mount: %w", err)
					return
				}
				_, err := readPage(dir, im.blob.Key, 5)
				read <- err
			}()
			expect("holding")
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			select {
			case err := <-read:
				t.Fatalf("the reader did not wait for a successor: %v", err)
			default:
			}

			e := openEngine(t, cache, dup(t, device))
			add(t, e, im)
			serve(t, e, nil, im)
			if err := <-read; err != nil {
				t.Fatal(err)
			}
			checkPage(t, dir, im.blob.Key, 5)
			checkPage(t, dir, im.blob.Key, 200)
			if err := e.Unmount(t.Context(), dir); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestInheritedDeviceThatIsNotBoundIsBound(t *testing.T) {
	needDevice(t)
	cache := t.TempDir()
	device, err := openDevice()
	if err != nil {
		t.Fatal(err)
	}
	e := openEngine(t, cache, device)
	im := newImage(t, "unbound", "boot", "blob")
	add(t, e, im)
	serve(t, e, nil, im)
	checkPage(t, mount(t, e, im), im.blob.Key, 0)
}

func TestInheritedDescriptorMustBeTheDevice(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	if e, err := Open(Config{Dir: t.TempDir(), Device: f}); err == nil {
		_ = e.Close()
		t.Error("/dev/null was taken for the device")
	}
	if err := f.Close(); err == nil {
		t.Error("Open did not take the descriptor over")
	}
}
