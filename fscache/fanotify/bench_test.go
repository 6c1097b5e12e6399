package fanotify_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/enginetest"
	"holdfast/fscache/fanotify"
)

// The environment that makes the test binary the benchmark's reader.
const (
	benchReads = "FANOTIFY_BENCH_READS"
	benchFile  = "FANOTIFY_BENCH_FILE"
)

const benchSize = 1 << 30 // bytes, sparse

// TestMain runs the reader of the benchmarks in the process they start.
func TestMain(m *testing.M) {
	if n, err := strconv.Atoi(os.Getenv(benchReads)); err == nil {
		if err := readPages(os.Getenv(benchFile), n); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// readPages reads n pages, each a miss, and prints the mean and the median of their times in ns.
func readPages(path string, n int) error {
	runtime.LockOSThread()
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	p := make([]byte, fscache.BlockSize)
	times := make([]time.Duration, n)
	start := time.Now()
	for i := range times {
		t := time.Now()
		if _, err := unix.Pread(int(f.Fd()), p, int64(i)*fscache.BlockSize%benchSize); err != nil {
			return err
		}
		times[i] = time.Since(t)
	}
	mean := time.Since(start) / time.Duration(n)
	slices.Sort(times)
	fmt.Println(mean.Nanoseconds(), times[n/2].Nanoseconds())
	return nil
}

// missing measures b.N misses of a reader in another process.
func missing(b *testing.B, path string) {
	b.Helper()
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), benchReads+"="+strconv.Itoa(b.N), benchFile+"="+path)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		b.Fatal(err)
	}
	var mean, median float64
	if _, err := fmt.Sscan(strings.TrimSpace(string(out)), &mean, &median); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(mean, "ns/op")
	b.ReportMetric(median, "ns-median")
}

// BenchmarkMissBareLoop is the least a process can do for a 4 KiB miss: poll, read, pwrite, answer, close.
func BenchmarkMissBareLoop(b *testing.B) {
	group, err := unix.FanotifyInit(unix.FAN_CLASS_PRE_CONTENT|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOATIME)
	if err != nil {
		b.Fatal(err)
	}
	path := filepath.Join(b.TempDir(), "object")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		b.Fatal(err)
	}
	if err := os.Truncate(path, benchSize); err != nil {
		b.Fatal(err)
	}
	if err := unix.FanotifyMark(group, unix.FAN_MARK_ADD, unix.FAN_PRE_ACCESS, unix.AT_FDCWD, path); err != nil {
		b.Fatal(err)
	}
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		b.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- bareLoop(group, stop) }() // ends when stop is written
	missing(b, path)
	if _, err := unix.Write(stop, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		b.Fatal(err)
	}
	if err := <-ended; err != nil {
		b.Fatal(err)
	}
	_ = unix.Close(stop)
	_ = unix.Close(group)
}

func bareLoop(group, stop int) error {
	runtime.LockOSThread()
	data := fscache.AlignedBuffer(fscache.BlockSize)
	fds := []unix.PollFd{{Fd: int32(group), Events: unix.POLLIN}, {Fd: int32(stop), Events: unix.POLLIN}}
	var buf [48]byte
	for {
		if _, err := unix.Poll(fds, -1); err == unix.EINTR {
			continue
		} else if err != nil {
			return err
		}
		if fds[1].Revents != 0 {
			return nil
		}
		n, err := unix.Read(group, buf[:])
		if err != nil {
			return err
		}
		ev, _, err := fanotify.DecodeEvent(buf[:n])
		if err != nil {
			return err
		}
		if _, err := unix.Pwrite(int(ev.FD), data, ev.Off); err != nil {
			return err
		}
		answer := []byte{byte(ev.FD), byte(ev.FD >> 8), 0, 0, unix.FAN_ALLOW, 0, 0, 0}
		if _, err := unix.Write(group, answer); err != nil {
			return err
		}
		if err := unix.Close(int(ev.FD)); err != nil {
			return err
		}
	}
}

// BenchmarkMissEngine is the same through Next, WriteAt and Answer.
func BenchmarkMissEngine(b *testing.B) {
	for _, callers := range []int{1, 2, 8} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) { benchEngine(b, callers, nil) })
	}
	// What it costs that an event outlives the process.
	b.Run("callers=1/inbox", func(b *testing.B) { benchEngine(b, 1, enginetest.NewInbox(256, 128)) })
}

func benchEngine(b *testing.B, callers int, inbox fscache.Inbox) {
	dir := b.TempDir()
	e, err := fanotify.Open(fanotify.Config{Dir: dir, Inbox: inbox})
	if err != nil {
		b.Fatal(err)
	}
	defer e.Close()
	o := fscache.Object{Key: fscache.Key{Domain: "d", ID: "object"}, Size: benchSize}
	if err := e.Add(context.Background(), o); err != nil {
		b.Fatal(err)
	}
	for range callers {
		go func() { // ends with Close
			data := fscache.AlignedBuffer(fscache.BlockSize)
			for {
				r, err := e.Next()
				if err != nil {
					return
				}
				if err := e.WriteAt(r.Object, data, r.Off); err != nil {
					b.Error(err)
				}
				if err := e.Answer(r, fscache.OK); err != nil {
					b.Error(err)
				}
			}
		}()
	}
	missing(b, filepath.Join(dir, "d", "object"))
}

// BenchmarkSlot is what an inbox adds to a miss: taking a slot, writing the file down, freeing the slot. Compare BenchmarkMissEngine.
func BenchmarkSlot(b *testing.B) { fanotify.BenchSlot(b, enginetest.NewInbox(256, 128)) }
