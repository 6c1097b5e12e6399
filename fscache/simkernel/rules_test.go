package simkernel_test

import (
	"bytes"
	"context"
	"errors"
	"syscall"
	"testing"
	"testing/synctest"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
)

const page = fscache.BlockSize

var (
	boot   = fscache.Object{Key: fscache.Key{Domain: "d", ID: "image"}, Size: page}
	object = fscache.Object{Key: fscache.Key{Domain: "d", ID: "o"}, Size: 64 * page}
)

// open opens an engine that knows the objects.
func open(t *testing.T, k *simkernel.Kernel) *simkernel.Engine {
	t.Helper()
	e, err := k.Open()
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []fscache.Object{boot, object} {
		if err := e.Add(context.Background(), o); err != nil {
			t.Fatal(err)
		}
	}
	return e
}

// mounted makes a kernel with one image mounted; its bootstrap is there, its blob is not.
func mounted(t *testing.T, mode simkernel.Mode) (*simkernel.Kernel, *simkernel.Engine, string) {
	t.Helper()
	k := simkernel.New(mode)
	e := open(t, k)
	dir := t.TempDir()
	done := make(chan error, 1)
	go func() { // ends when its requests are answered
		done <- e.Mount(context.Background(), fscache.Mount{Dir: dir, Bootstrap: boot, Blobs: []fscache.Object{object}})
	}()
	if mode != simkernel.Fanotify {
		for _, want := range []fscache.Op{fscache.OpOpen, fscache.OpRead, fscache.OpOpen} {
			r := next(t, e, want)
			if want == fscache.OpRead {
				write(t, e, boot.Key, 0, page)
			}
			answer(t, e, r, fscache.OK)
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return k, e, dir
}

func next(t *testing.T, e *simkernel.Engine, want fscache.Op) fscache.Request {
	t.Helper()
	r, err := e.Next()
	if err != nil || r.Op != want {
		t.Fatalf("Next: %+v, %v, want %v", r, err, want)
	}
	return r
}

func answer(t *testing.T, e *simkernel.Engine, r fscache.Request, a fscache.Errno) {
	t.Helper()
	if err := e.Answer(r, a); err != nil {
		t.Fatalf("Answer %+v: %v", r, err)
	}
}

func write(t *testing.T, e *simkernel.Engine, k fscache.Key, off, n int64) {
	t.Helper()
	if err := e.WriteAt(k, bytes.Repeat([]byte{1}, int(n)), off); err != nil {
		t.Fatal(err)
	}
}

// A result is how a read ended.
type result struct {
	zeros bool
	err   error
}

func read(ctx context.Context, k *simkernel.Kernel, dir string, off, n int64) <-chan result {
	done := make(chan result, 1)
	go func() { // ends when the kernel lets the reader go
		p := bytes.Repeat([]byte{7}, int(n))
		err := k.Read(ctx, dir, object.Key, p, off)
		done <- result{zeros: bytes.Count(p, []byte{0}) == len(p), err: err}
	}()
	return done
}

// Fanotify: an allowed read of a hole is zeros; the kernel does not look (seen natively:
// fscache/fanotify TestLastCloseAllowsReadersOntoHoles).
func TestAllowOfAHoleReadsZeros(t *testing.T) {
	k, e, dir := mounted(t, simkernel.Fanotify)
	done := read(t.Context(), k, dir, 0, page)
	answer(t, e, next(t, e, fscache.OpRead), fscache.OK)
	if res := <-done; res.err != nil || !res.zeros {
		t.Errorf("%+v, want zeros", res)
	}
}

// Cachefiles: an answered read of what is still a hole is EIO.
func TestCompletedReadOfAHoleIsEIO(t *testing.T) {
	k, e, dir := mounted(t, simkernel.Cachefiles)
	done := read(t.Context(), k, dir, 0, page)
	for range 2 { // read-ahead, then the page
		answer(t, e, next(t, e, fscache.OpRead), fscache.OK)
	}
	if res := <-done; !errors.Is(res.err, syscall.EIO) {
		t.Errorf("%+v, want EIO", res)
	}
}

func TestCachefilesAsksForHolesOnly(t *testing.T) {
	k, e, dir := mounted(t, simkernel.Cachefiles)
	write(t, e, object.Key, 2*page, 3*page)
	done := read(t.Context(), k, dir, 0, 8*page)
	for _, want := range []fscache.Extent{{Off: 0, Len: 2 * page}, {Off: 5 * page, Len: 3 * page}} {
		r := next(t, e, fscache.OpRead)
		if r.Off != want.Off || r.Len != want.Len {
			t.Errorf("asked for %d+%d, want %v", r.Off, r.Len, want)
		}
		write(t, e, object.Key, r.Off, r.Len)
		answer(t, e, r, fscache.OK)
	}
	if res := <-done; res.err != nil || res.zeros {
		t.Errorf("%+v", res)
	}
}

func TestFanotifyAsksForWhatIsThereToo(t *testing.T) {
	k, e, dir := mounted(t, simkernel.Fanotify)
	write(t, e, object.Key, 0, 8*page)
	done := read(t.Context(), k, dir, 0, 8*page)
	r := next(t, e, fscache.OpRead)
	if r.Off != 0 || r.Len != 8*page {
		t.Errorf("asked for %d+%d", r.Off, r.Len)
	}
	answer(t, e, r, fscache.OK)
	if res := <-done; res.err != nil || res.zeros {
		t.Errorf("%+v", res)
	}
}

func TestLastCloseOfAGroupLetsReadersOntoHoles(t *testing.T) {
	k, e, dir := mounted(t, simkernel.Fanotify)
	k.SetKept(false)
	one := read(t.Context(), k, dir, 0, page)
	next(t, e, fscache.OpRead)
	e.Close()
	for _, done := range []<-chan result{one, read(t.Context(), k, dir, 8*page, page)} {
		if res := <-done; res.err != nil || !res.zeros {
			t.Errorf("%+v, want zeros", res)
		}
	}
}

func TestLastCloseOfTheDeviceFailsReadersForEver(t *testing.T) {
	k, e, dir := mounted(t, simkernel.Cachefiles)
	k.SetKept(false)
	one := read(t.Context(), k, dir, 0, page)
	next(t, e, fscache.OpRead)
	e.Close()
	open(t, k)
	for _, done := range []<-chan result{one, read(t.Context(), k, dir, 8*page, page)} {
		if res := <-done; !errors.Is(res.err, syscall.EIO) {
			t.Errorf("%+v, want EIO", res)
		}
	}
}

func TestKilledReaderTakesAnUnreadRequestAlong(t *testing.T) {
	for _, mode := range []simkernel.Mode{simkernel.Cachefiles, simkernel.Fanotify} {
		k, e, dir := mounted(t, mode)
		synctest.Test(t, func(t *testing.T) {
			ctx, kill := context.WithCancel(t.Context())
			killed := read(ctx, k, dir, 0, page)
			synctest.Wait()
			kill()
			if res := <-killed; !errors.Is(res.err, context.Canceled) {
				t.Errorf("mode %d: %+v", mode, res)
			}
			done := read(t.Context(), k, dir, 8*page, page)
			r := next(t, e, fscache.OpRead)
			if r.Off != 8*page {
				t.Errorf("mode %d: the killed reader's request %+v was handed out", mode, r)
			}
			write(t, e, object.Key, r.Off, r.Len)
			answer(t, e, r, fscache.OK)
			if res := <-done; res.err != nil {
				t.Errorf("mode %d: %+v", mode, res)
			}
		})
	}
}

// A read event whose reader was killed takes its answer (FAN_EVENT_CANCELED); a READ is gone (EINVAL).
func TestAnswerToAKilledReader(t *testing.T) {
	for mode, want := range map[simkernel.Mode]error{simkernel.Cachefiles: fscache.ErrGone, simkernel.Fanotify: nil} {
		k, e, dir := mounted(t, mode)
		ctx, kill := context.WithCancel(t.Context())
		done := read(ctx, k, dir, 0, page)
		r := next(t, e, fscache.OpRead)
		kill()
		<-done
		if err := e.Answer(r, fscache.OK); !errors.Is(err, want) {
			t.Errorf("mode %d: %v, want %v", mode, err, want)
		}
	}
}

func TestDeniedOpenFailsTheMountAndNothingElse(t *testing.T) {
	k, e, dir := mounted(t, simkernel.Cachefiles)
	m := fscache.Mount{Dir: t.TempDir(), Bootstrap: fscache.Object{Key: fscache.Key{Domain: "d", ID: "other"}, Size: page}}
	if err := e.Add(t.Context(), m.Bootstrap); err != nil {
		t.Fatal(err)
	}
	mount := make(chan error, 1)
	go func() { mount <- e.Mount(context.Background(), m) }() // ends with the answer
	answer(t, e, next(t, e, fscache.OpOpen), fscache.EIO)
	if err := <-mount; !errors.Is(err, syscall.EIO) {
		t.Errorf("Mount: %v, want EIO", err)
	}
	done := read(t.Context(), k, dir, 0, page)
	r := next(t, e, fscache.OpRead)
	write(t, e, object.Key, r.Off, r.Len)
	answer(t, e, r, fscache.OK)
	if res := <-done; res.err != nil {
		t.Error(res.err)
	}
}

func TestImageIsMountedOnceInADomain(t *testing.T) {
	_, e, _ := mounted(t, simkernel.Cachefiles)
	err := e.Mount(t.Context(), fscache.Mount{Dir: t.TempDir(), Bootstrap: boot})
	if !errors.Is(err, syscall.EEXIST) {
		t.Errorf("Mount: %v, want EEXIST", err)
	}
}

func TestUnmountIsToldByClose(t *testing.T) {
	_, e, dir := mounted(t, simkernel.Cachefiles)
	if err := e.Unmount(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		answer(t, e, next(t, e, fscache.OpClose), fscache.OK)
	}
	if err := e.WriteAt(object.Key, make([]byte, page), 0); !errors.Is(err, fscache.ErrNotOpen) {
		t.Errorf("WriteAt after CLOSE: %v, want ErrNotOpen", err)
	}
}

// A successor's READs wait until their object was opened again.
func TestRestoreReopensBeforeItRedelivers(t *testing.T) {
	k, e, dir := mounted(t, simkernel.Cachefiles)
	done := read(t.Context(), k, dir, 0, page)
	old := next(t, e, fscache.OpRead)
	e.Close()
	s := open(t, k)
	reopen := next(t, s, fscache.OpOpen)
	if reopen.Object != object.Key {
		t.Errorf("reopened %s", reopen.Object)
	}
	answer(t, s, reopen, fscache.OK)
	r := next(t, s, fscache.OpRead)
	if r.ID != old.ID || r.Off != old.Off {
		t.Errorf("redelivered %+v, was %+v", r, old)
	}
	write(t, s, object.Key, 0, page)
	answer(t, s, r, fscache.OK)
	if res := <-done; res.err != nil || res.zeros {
		t.Errorf("%+v", res)
	}
}

func TestOneProcessAtATime(t *testing.T) {
	k := simkernel.New(simkernel.Cachefiles)
	e := open(t, k)
	if _, err := k.Open(); !errors.Is(err, fscache.ErrBusy) {
		t.Errorf("second Open: %v, want ErrBusy", err)
	}
	e.Close()
	open(t, k)
}
