package cachefiles

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/enginetest"
)

// BenchmarkMiss is one 4 KiB miss, from the reader's read(2) to its return, answered by the engine, which reads requests into an inbox.
func BenchmarkMiss(b *testing.B) {
	benchmarkMiss(b, enginetest.NewInbox(1024, CACHEFILES_MSG_MAX_SIZE))
}

// BenchmarkMissWithoutInbox is the same with private memory.
func BenchmarkMissWithoutInbox(b *testing.B) { benchmarkMiss(b, nil) }

func benchmarkMiss(b *testing.B, inbox fscache.Inbox) {
	needDevice(b)
	im := newImage(b, "bench", "boot", "blob")
	e := openWith(b, Config{Dir: b.TempDir(), Inbox: inbox})
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

// BenchmarkTakeOver is Open of a successor with 251 objects and as many READs in flight, on record and in the kernel.
func BenchmarkTakeOver(b *testing.B) {
	needDevice(b)
	cache, dir := b.TempDir(), b.TempDir()
	store := enginetest.NewStore()
	defer store.Close()
	first := openWith(b, Config{Dir: cache, Holder: store})
	m := fscache.Mount{Dir: dir}
	for i := range 250 {
		m.Blobs = append(m.Blobs, fscache.Object{Key: fscache.Key{Domain: "many", ID: fmt.Sprintf("%064x", i)}, Size: blobSize})
	}
	im := image{bytes: manyDevices(m.Blobs)}
	m.Bootstrap = fscache.Object{Key: fscache.Key{Domain: "many", ID: "boot"}, Size: int64(len(im.bytes))}
	im.boot = m.Bootstrap
	for _, o := range append(m.Blobs, im.boot) {
		if err := first.Add(context.Background(), o); err != nil {
			b.Fatal(err)
		}
	}
	serve(b, first, nil, im)
	b.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	if err := first.Mount(context.Background(), m); err != nil {
		b.Fatal(err)
	}
	_, device := first.Lifeline()
	for b.Loop() {
		b.StopTimer()
		left := fscache.Inherited{Lifeline: dup(b, device)}
		var err error
		if left.Objects, err = store.Held(); err != nil {
			b.Fatal(err)
		}
		for i, h := range left.Objects {
			left.Messages = append(left.Messages, encode(Message{ID: uint32(1000 + i), Opcode: CACHEFILES_OP_READ, ObjectID: h.Handle, Read: ReadBody{Len: 4096}}))
		}
		b.StartTimer()
		e, err := Open(Config{Dir: cache, Inherited: left, Inbox: enginetest.NewInbox(1024, CACHEFILES_MSG_MAX_SIZE)})
		b.StopTimer()
		if err != nil {
			b.Fatal(err)
		}
		if err := e.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
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
