package enginetest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// A Successor says what becomes of requests that a process read and did not answer, once a successor has its lifeline.
type Successor int

// The ways engines differ.
const (
	// Redelivers: Next of the successor returns them again.
	Redelivers Successor = iota + 1
	// DeniesThenAsksAgain: the successor's Open gives their readers EIO; the next read asks again.
	DeniesThenAsksAgain
	// Replays: Next of the successor returns them again, from what was written down of them.
	Replays
)

// A Harness is one engine on one kernel, real or simulated, with an empty cache.
type Harness struct {
	// Open opens an engine over the harness's cache. left is zero, or what an engine opened here before has left: the
	// engine is then its successor, and owns the files. Simulated kernels have no lifeline.
	Open func(t testing.TB, left fscache.Inherited, inbox fscache.Inbox, holder fscache.Holder) fscache.Engine
	// Readers read through mounts.
	Readers Readers
	// Successor is what the engine does with a predecessor's requests.
	Successor Successor
	// Upgrades says that an engine can take over from one that lives (fscache.Successor).
	Upgrades bool
	// AfterMounts runs when a rule has unmounted what it could, to detach a mount that was left. May be nil.
	AfterMounts func(dir string)
}

// Readers read files of mounted images: the file named k.ID in the mount at dir.
type Readers interface {
	// Read fills p from off, bypassing read-ahead: the kernel asks for the pages of p and no others.
	Read(dir string, k fscache.Key, p []byte, off int64) error
	// Hold opens the file and keeps it open until release.
	Hold(dir string, k fscache.Key) (release func() error, err error)
	// Start begins a read of n bytes at off in a process of its own.
	Start(dir string, k fscache.Key, off, n int64) (Process, error)
}

// A Process is a reader that can be killed.
type Process interface {
	// Kill kills it and waits until it is gone.
	Kill() error
}

// RealReaders read real mounts.
type RealReaders struct{}

// Read implements Readers.
func (RealReaders) Read(dir string, k fscache.Key, p []byte, off int64) error {
	return readFile(filepath.Join(dir, k.ID), p, off)
}

func readFile(path string, p []byte, off int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		return fmt.Errorf("fadvise %s: %w", path, err)
	}
	_, err = f.ReadAt(p, off)
	return err
}

// Hold implements Readers.
func (RealReaders) Hold(dir string, k fscache.Key) (func() error, error) {
	f, err := os.Open(filepath.Join(dir, k.ID))
	if err != nil {
		return nil, err
	}
	return f.Close, nil
}

// The environment that makes a test binary a reader.
const (
	readerPath = "ENGINETEST_READ_PATH"
	readerOff  = "ENGINETEST_READ_OFF"
	readerLen  = "ENGINETEST_READ_LEN"
)

// init turns a copy of the test binary into a reader that can be killed without the tests: only a whole process can.
func init() {
	path := os.Getenv(readerPath)
	if path == "" {
		return
	}
	off, errOff := strconv.ParseInt(os.Getenv(readerOff), 10, 64)
	n, errLen := strconv.ParseInt(os.Getenv(readerLen), 10, 32)
	err := errors.Join(errOff, errLen)
	if err == nil {
		err = readFile(path, make([]byte, n), off)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

type childProcess struct{ cmd *exec.Cmd }

// Start implements Readers.
func (RealReaders) Start(dir string, k fscache.Key, off, n int64) (Process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(),
		readerPath+"="+filepath.Join(dir, k.ID),
		readerOff+"="+strconv.FormatInt(off, 10),
		readerLen+"="+strconv.FormatInt(n, 10))
	cmd.Stdout, cmd.Stderr = io.Discard, os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return childProcess{cmd}, nil
}

// Kill implements Process.
func (p childProcess) Kill() error {
	if err := p.cmd.Process.Kill(); err != nil {
		return err
	}
	var exit *exec.ExitError
	if err := p.cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != -1 {
		return fmt.Errorf("the reader was not killed: %v", err)
	}
	return nil
}

// DetachMount is AfterMounts for real mounts: it detaches whatever is still mounted on dir.
func DetachMount(dir string) { _ = unix.Unmount(dir, unix.MNT_DETACH) }
