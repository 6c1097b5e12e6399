package cachefiles

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// BenchmarkMiss is one 4 KiB miss, from the reader's read(2) to its return, answered by the engine.
func BenchmarkMiss(b *testing.B) {
	needDevice(b)
	im := newImage(b, "bench", "boot", "blob")
	e := openEngine(b, b.TempDir(), nil)
	add(b, e, im)
	page := content(im.blob.Key, 0, 4096)
	serve(b, e, func(r fscache.Request) bool {
		if r.Op != fscache.OpRead || r.Object != im.blob.Key {
			return false
		}
		if err := errors.Join(e.WriteAt(r.Object, page, r.Off), e.Answer(r, fscache.OK)); err != nil {
			b.Error(err)
		}
		return true
	}, im)
	benchmarkMisses(b, mount(b, e, im), im)
}

// BenchmarkMissBare is the same, answered by a thread that sits in poll(2).
func BenchmarkMissBare(b *testing.B) {
	needDevice(b)
	im := newImage(b, "bench", "boot", "blob")
	dir := b.TempDir()
	device, err := openDevice()
	if err != nil {
		b.Fatal(err)
	}
	defer device.Close()
	if err := bind(device, Config{Dir: b.TempDir(), Tag: "bench"}); err != nil {
		b.Fatal(err)
	}
	blob := answerMount(b, device, im, startMount(b, im, dir), discard)
	page := content(im.blob.Key, 0, 4096)
	go func() { // ends with the umount's CLOSE
		for {
			m, _ := message(b, device)
			if m.Opcode != CACHEFILES_OP_READ {
				return
			}
			if err := errors.Join(blob.writeAligned(page, m.Read.Off), blob.complete(m.ID)); err != nil {
				b.Error(err)
			}
		}
	}()
	benchmarkMisses(b, dir, im)
	if err := unix.Unmount(dir, 0); err != nil {
		b.Error(err)
	}
}

// benchmarkMisses reads pages that were not read before. There are 256 of them: -benchtime 256x at most.
func benchmarkMisses(b *testing.B, dir string, im image) {
	f, err := os.Open(filepath.Join(dir, im.blob.Key.ID))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 4096)
	b.ResetTimer()
	for i := range b.N {
		if _, err := f.ReadAt(p, int64(i%(blobSize/4096))*4096); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
}
