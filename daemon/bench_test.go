package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/fscache/fanotify"
	"holdfast/rafs"
	"holdfast/rafs/source"
	"holdfast/state"
)

// The environment that makes the test binary the benchmark's reader.
const (
	benchReads = "DAEMON_BENCH_READS"
	benchFile  = "DAEMON_BENCH_FILE"
)

const (
	benchSize   = 1 << 30 // bytes of the object
	benchStride = 1 << 20 // between two misses
)

// readPages reads n pages, each a miss, and prints the median of their times in ns.
func readPages(path string, n int) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	p := make([]byte, fscache.BlockSize)
	times := make([]time.Duration, n)
	for i := range times {
		at := int64(i) * benchStride
		t := time.Now()
		if _, err := unix.Pread(int(f.Fd()), p, at%benchSize+at/benchSize*fscache.BlockSize); err != nil {
			return err
		}
		times[i] = time.Since(t)
	}
	slices.Sort(times)
	_, err = fmt.Println(times[n/2].Nanoseconds())
	return err
}

// misses measures misses of a reader in another process.
func misses(b *testing.B, path string) {
	b.Helper()
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), benchReads+"="+strconv.Itoa(b.N), benchFile+"="+path)
	cmd.Stderr = os.Stderr
	b.ResetTimer()
	out, err := cmd.Output()
	b.StopTimer()
	if err != nil {
		b.Fatal(err)
	}
	var median float64
	if _, err := fmt.Sscan(strings.TrimSpace(string(out)), &median); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(median, "ns-median")
}

// benchEngine opens the fanotify engine with one object, and a sparse local blob for it.
func benchEngine(b *testing.B, inbox fscache.Inbox) (e *fanotify.Engine, key fscache.Key, blob, file string) {
	b.Helper()
	dir := b.TempDir()
	needFanotify(b, dir)
	e, err := fanotify.Open(fanotify.Config{Dir: dir, Inbox: inbox})
	if err != nil {
		b.Fatal(err)
	}
	key = fscache.Key{Domain: LocalDomain, ID: "aa"}
	blob = filepath.Join(b.TempDir(), "blob")
	if err := errors.Join(os.WriteFile(blob, nil, 0o600), os.Truncate(blob, benchSize)); err != nil {
		b.Fatal(err)
	}
	return e, key, blob, filepath.Join(dir, key.Domain, key.ID)
}

// BenchmarkMiss is a 4 KiB miss in an image with uncompressed chunks of 4 KiB, with every request recorded and with none.
func BenchmarkMiss(b *testing.B) {
	b.Run("recorded", func(b *testing.B) { benchMiss(b, true) })
	b.Run("unrecorded", func(b *testing.B) { benchMiss(b, false) })
}

func benchMiss(b *testing.B, recorded bool) {
	root, run := b.TempDir(), benchRun(b)
	o := Options{Log: zap.NewNop(), Release: "bench", Root: root, Socket: filepath.Join(root, "s")}
	var inbox fscache.Inbox
	if recorded {
		var err, err2 error
		o.Inbox, err = state.NewInbox(run, state.InboxHeader{Engine: fanotify.Name, Boot: "boot"}, inboxSlots, inboxSlot)
		o.Session, _, err2 = state.OpenSession(filepath.Join(run, sessionFile), "boot", "bench")
		if err := errors.Join(err, err2); err != nil {
			b.Fatal(err)
		}
		inbox = o.Inbox
	}
	e, key, blob, file := benchEngine(b, inbox)
	o.Engine = e
	d, err := New(o)
	if err != nil {
		b.Fatal(err)
	}
	defer d.close()
	digest := rafs.Blake3.Sum(make([]byte, fscache.BlockSize))
	rows := make([]rafs.Chunk, benchSize/fscache.BlockSize)
	for i := range rows {
		off := uint64(i) * fscache.BlockSize
		rows[i] = rafs.Chunk{Offset: off, BlobOffset: off, Size: fscache.BlockSize, Stored: fscache.BlockSize, Digest: digest}
	}
	table, err := rafs.NewTable(rows, benchSize, benchSize, rafs.Blake3)
	if err != nil {
		b.Fatal(err)
	}
	h, err := d.hold(context.Background(), key, table, source.NewFile(blob, benchSize), &gate{})
	if err != nil {
		b.Fatal(err)
	}
	d.tune()
	d.begin()
	misses(b, file)
	if err := d.release(h); err != nil {
		b.Error(err)
	}
}

// benchRun makes a directory where a run directory is: on tmpfs.
func benchRun(b *testing.B) string {
	b.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "holdfast-bench-")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// BenchmarkMissBareLoop is the same served by a loop that copies a page.
func BenchmarkMissBareLoop(b *testing.B) {
	e, key, blob, file := benchEngine(b, nil)
	defer e.Close()
	if err := e.Add(context.Background(), fscache.Object{Key: key, Size: benchSize}); err != nil {
		b.Fatal(err)
	}
	f, err := os.Open(blob)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	go func() { // ends with Close
		p := fscache.AlignedBuffer(fscache.BlockSize)
		for {
			r, err := e.Next()
			if err != nil {
				return
			}
			off := r.Off &^ (fscache.BlockSize - 1)
			if _, err := f.ReadAt(p, off); err != nil {
				b.Error(err)
			}
			if err := errors.Join(e.WriteAt(key, p, off), e.Answer(r, fscache.OK)); err != nil {
				b.Error(err)
			}
		}
	}()
	misses(b, file)
}
