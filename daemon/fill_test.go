package daemon

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
	"holdfast/rafs"
	"holdfast/rafs/image"
	"holdfast/rafs/source"
)

const kib, mib = 1 << 10, 1 << 20

// slow makes a blob's ranges come after d.
func slow(d time.Duration) func(context.Context, int64, int64, io.Reader) (io.Reader, error) {
	return func(ctx context.Context, _, _ int64, r io.Reader) (io.Reader, error) {
		return r, sleep(ctx, d)
	}
}

func failing(err error) func(context.Context, int64, int64, io.Reader) (io.Reader, error) {
	return func(context.Context, int64, int64, io.Reader) (io.Reader, error) { return nil, err }
}

func TestChunkIsFetchedOnceForManyReaders(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, nil)
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecZstd, mib)
		defer r.mount(nil, b)()
		b.setBefore(slow(time.Second))
		var wg sync.WaitGroup
		for i := range 32 {
			wg.Go(func() { r.wantOK(b, int64(i)*4*kib, 4*kib) })
		}
		wg.Wait()
		if n := len(b.asked()); n != 1 {
			t.Errorf("%d range requests for one chunk, want 1", n)
		}
	})
}

func TestSlowBlobDelaysOnlyItsOwnReaders(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, nil)
		defer r.close()
		stuck, quick := newBlob("aa", 1, rafs.CodecNone, many(64, mib)...), newBlob("bb", 2, rafs.CodecNone, many(64, 64*kib)...)
		defer r.mount(nil, stuck)()
		defer r.mount(nil, quick)()
		stuck.setBefore(slow(10 * time.Second)) // 64 readers on 8 slots: 80 s
		quick.setBefore(slow(time.Millisecond))
		var wg sync.WaitGroup
		for i := range 64 {
			wg.Go(func() { r.wantOK(stuck, int64(i)*mib, 4*kib) })
		}
		synctest.Wait()
		began := time.Now()
		for i := range 64 {
			r.wantOK(quick, int64(i)*64*kib, 4*kib)
		}
		if d := time.Since(began); d > 64*time.Millisecond {
			t.Errorf("readers of the quick blob took %v beside a stuck one", d)
		}
		wg.Wait()
	})
}

func TestUnreachableSourceGivesEIOAtTheDeadlineAndTheNextReadTriesAgain(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, func(o *Options) { o.ReadDeadline = 5 * time.Minute })
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecNone, mib)
		defer r.mount(nil, b)()
		b.setBefore(failing(errors.New("connection refused")))
		r.wantError(b, 0, 4*kib)
		answers := r.e.reads(b.key)
		for _, a := range answers {
			if a.errno != fscache.EIO || a.took != 5*time.Minute {
				t.Errorf("the reader was told errno %d after %v, want EIO after 5m", a.errno, a.took)
			}
		}
		if n := len(b.asked()) / len(answers); n < 60 || n > 140 {
			t.Errorf("%d attempts in 5 minutes: backoff from 50 ms to 5 s makes about 85", n)
		}
		b.setBefore(nil)
		r.wantOK(b, 0, 4*kib)
	})
}

// However long a source has been down, who reads anew is not turned away because of what others met.
func TestReaderWhoComesAfterALongOutageHasItsOwnAttempts(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, func(o *Options) { o.ReadDeadline = 2 * time.Second })
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecNone, mib)
		defer r.mount(nil, b)()
		b.setBefore(failing(errors.New("connection refused")))
		for range 10 {
			asked := len(b.asked())
			r.wantError(b, 0, 4*kib)
			if len(b.asked()) == asked {
				t.Fatal("a reader was told EIO and nobody had asked the source")
			}
		}
		b.setBefore(nil)
		r.wantOK(b, 0, 4*kib)
	})
}

func TestManyReadersOfADeadSourceAskNoMoreOftenThanItsSlots(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, func(o *Options) { o.ReadDeadline = time.Minute })
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecNone, many(50, mib)...)
		defer r.mount(nil, b)()
		b.setBefore(func(ctx context.Context, _, _ int64, _ io.Reader) (io.Reader, error) {
			return nil, errors.Join(sleep(ctx, 10*time.Millisecond), errors.New("connection refused"))
		})
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() { r.wantError(b, int64(i)*mib, 4*kib) })
		}
		wg.Wait()
		if n := len(b.asked()); n > 2*DefaultStreams*25 { // the kernel asks a second time after an error
			t.Errorf("%d attempts in two minutes for 50 readers; one reader makes about 20 a minute", n)
		}
	})
}

func TestRetryAfterIsObeyed(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, nil)
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecNone, mib)
		defer r.mount(nil, b)()
		var tries atomic.Int32
		b.setBefore(func(_ context.Context, _, _ int64, in io.Reader) (io.Reader, error) {
			if tries.Add(1) == 1 {
				return nil, &source.StatusError{Code: http.StatusTooManyRequests, RetryAfter: 42 * time.Second}
			}
			return in, nil
		})
		began := time.Now()
		r.wantOK(b, 0, 4*kib)
		if d := time.Since(began); d != 42*time.Second {
			t.Errorf("tried again after %v, the source asked for 42s", d)
		}
	})
}

func TestPermanentErrorIsNotRetried(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, nil)
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecNone, mib)
		defer r.mount(nil, b)()
		b.setBefore(failing(source.Permanent(errors.New("not found"))))
		began := time.Now()
		r.wantError(b, 0, 4*kib)
		if n := len(r.e.reads(b.key)); len(b.asked()) != n || time.Since(began) != 0 {
			t.Errorf("%d requests were answered in %v, want one attempt each and EIO at once", n, time.Since(began))
		}
		b.setBefore(nil)
		r.wantOK(b, 0, 4*kib)
	})
}

func TestDigestMismatchIsNeverWritten(t *testing.T) {
	for _, codec := range []rafs.Codec{rafs.CodecNone, rafs.CodecZstd} {
		t.Run(codec.String(), func(t *testing.T) {
			eachMode(t, func(t *testing.T, mode simkernel.Mode) {
				r := newRig(t, mode, nil)
				defer r.close()
				b := newBlob("aa", 1, codec, mib)
				defer r.mount(nil, b)()
				b.setBefore(func(_ context.Context, _, n int64, in io.Reader) (io.Reader, error) {
					p := make([]byte, n)
					if _, err := io.ReadFull(in, p); err != nil {
						return nil, err
					}
					p[n/2] ^= 1
					return bytes.NewReader(p), nil
				})
				var wg sync.WaitGroup
				for range 4 {
					wg.Go(func() { r.wantError(b, 0, 4*kib) })
				}
				wg.Wait()
				answers := r.e.reads(b.key)
				if n := len(b.asked()); n < maxMismatches || n > maxMismatches*len(answers) {
					t.Errorf("%d fetches for %d requests, want at most %d each", n, len(answers), maxMismatches)
				}
				if x, _ := r.e.Present(b.key); len(x) != 0 {
					t.Errorf("wrong bytes were written: %v", x)
				}
				if n := r.d.count.mismatches.Load(); n < maxMismatches {
					t.Errorf("%d mismatches counted", n)
				}
				b.setBefore(nil)
				r.wantOK(b, 0, 4*kib)
			})
		})
	}
}

func TestNeighboursAreOneRangeRequest(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, nil)
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecZstd, many(512, 4*kib)...)
		defer r.mount(nil, b)()
		r.wantOK(b, 0, 4*kib)
		time.Sleep(time.Second)
		asked := b.asked()
		want := int64(b.table.At(256).BlobOffset)
		if len(asked) != 1 || asked[0] != [2]int64{0, want} {
			t.Errorf("ranges %v, want one of the %d bytes that store the first 1 MiB", asked, want)
		}
	})
}

func TestMissFetchesTheWindowFromItsChunkOn(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, func(o *Options) { o.ReadAhead = 256 * kib })
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecNone, many(16, 64*kib)...)
		defer r.mount(nil, b)()
		r.wantOK(b, 3*64*kib+8*kib, 4*kib)
		time.Sleep(time.Second)
		x, _ := r.e.Present(b.key)
		if first, last := x[0].Off, x[len(x)-1].Off+x[len(x)-1].Len; first != 3*64*kib || last != 7*64*kib {
			t.Errorf("present from %d to %d, want chunks 3 to 6", first, last)
		}
		b.asked()
		r.wantOK(b, 5*64*kib, 64*kib)
		if n := len(b.asked()); n != 0 {
			t.Errorf("%d fetches for what was read ahead", n)
		}
	})
}

func TestReaderIsAnsweredBeforeTheWindowBehindItComes(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, nil)
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecNone, many(16, 64*kib)...)
		defer r.mount(nil, b)()
		// A link of 64 KiB a second.
		b.setBefore(func(ctx context.Context, _, _ int64, in io.Reader) (io.Reader, error) {
			return &paced{ctx: ctx, r: in, step: 64 * kib, pause: time.Second}, nil
		})
		began := time.Now()
		r.wantOK(b, 0, 4*kib)
		if d := time.Since(began); d != time.Second {
			t.Errorf("the reader of the first chunk waited %v, want 1s", d)
		}
		r.wantOK(b, 2*64*kib, 4*kib)
		// Chunks 1 and 2 are one batch.
		if d := time.Since(began); d != 3*time.Second {
			t.Errorf("the reader of the third chunk was answered after %v, want 3s", d)
		}
	})
}

// paced gives step bytes every pause.
type paced struct {
	ctx   context.Context
	r     io.Reader
	step  int
	pause time.Duration
}

func (p *paced) Read(b []byte) (int, error) {
	if err := sleep(p.ctx, p.pause); err != nil {
		return 0, err
	}
	return io.ReadFull(p.r, b[:min(len(b), p.step)])
}

func TestWaitersDeadlineIsItsOwn(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, func(o *Options) { o.ReadDeadline = time.Minute })
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecNone, mib)
		defer r.mount(nil, b)()
		var n atomic.Int32
		b.setBefore(func(ctx context.Context, _, _ int64, in io.Reader) (io.Reader, error) {
			if n.Add(1) == 1 {
				return in, sleep(ctx, time.Hour)
			}
			return in, nil
		})
		var wg sync.WaitGroup
		wg.Go(func() { r.wantOK(b, 0, 4*kib) }) // its first request fails, the kernel's second works
		time.Sleep(30 * time.Second)
		wg.Go(func() { r.wantOK(b, 8*kib, 4*kib) })
		wg.Wait()
		for _, a := range r.e.reads(b.key) {
			switch {
			case a.Off == 8*kib && (a.errno != fscache.OK || a.took != 30*time.Second):
				t.Errorf("the second reader was told %d after %v, want OK after 30s: when the first gave up", a.errno, a.took)
			case a.Off == 0 && a.errno != fscache.OK && a.took != time.Minute:
				t.Errorf("the first reader was told %d after %v, want EIO after 1m", a.errno, a.took)
			}
		}
	})
}

func TestFullCacheIsToldAsENOSPCAtTheSpaceDeadline(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, nil)
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecNone, mib)
		defer r.mount(nil, b)()
		r.e.fail(func(fscache.Key, []byte, int64) error { return fscache.ErrNoSpace })
		r.wantError(b, 0, 4*kib)
		for _, a := range r.e.reads(b.key) {
			if a.errno != fscache.ENOSPC || a.took != DefaultSpaceDeadline {
				t.Errorf("answered %d after %v, want ENOSPC after %v", a.errno, a.took, DefaultSpaceDeadline)
			}
		}
		if n := len(b.asked()); n > 30 {
			t.Errorf("the source was asked %d times for bytes there was no room for", n)
		}
		r.e.fail(nil)
		r.wantOK(b, 0, 4*kib)
	})
}

func TestReadPastTheEnd(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, nil)
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecZstd, 100*kib+1)
		defer r.mount(nil, b)()
		size := int64(b.table.Size())
		for _, c := range []struct {
			name   string
			off, n int64
			want   fscache.Errno
		}{
			{"behind the end", size, 4 * kib, fscache.OK},
			{"far behind the end", 1 << 62, 1 << 62, fscache.OK},
			{"nothing", 0, 0, fscache.OK},
			{"negative offset", -4 * kib, 8 * kib, fscache.EIO},
			{"negative length", 0, -1, fscache.EIO},
		} {
			if got := r.ask(fscache.Request{Op: fscache.OpRead, Object: b.key, Off: c.off, Len: c.n}); got != c.want {
				t.Errorf("%s: answered %d, want %d", c.name, got, c.want)
			}
		}
		if n := len(b.asked()); n != 0 {
			t.Errorf("%d fetches for nothing", n)
		}
		if got := r.ask(fscache.Request{Op: fscache.OpRead, Object: b.key, Off: size - 4*kib, Len: 1 << 62}); got != fscache.OK || !r.object(b).has(span{0, 1}) {
			t.Errorf("from the last block to far behind the end: answered %d", got)
		}
	})
}

func TestUnknownObjectAndOperationGetEIO(t *testing.T) {
	r := newRig(t, simkernel.Fanotify, nil)
	defer r.close()
	b := newBlob("aa", 1, rafs.CodecNone, mib)
	defer r.mount(nil, b)()
	other := fscache.Key{Domain: "other", ID: "aa"}
	for name, q := range map[string]fscache.Request{
		"read of another domain's": {Op: fscache.OpRead, Object: other, Len: 4 * kib},
		"open of another domain's": {Op: fscache.OpOpen, Object: other},
		"operation":                {Op: 77, Object: b.key},
	} {
		if got := r.ask(q); got != fscache.EIO {
			t.Errorf("%s: answered %d, want EIO", name, got)
		}
	}
}

func TestCompleteObjectIsSyncedAndLeftToTheKernelOnce(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, nil)
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecNone, mib, 0, mib)
		defer r.mount(nil, b)()
		r.wantOK(b, 0, 4*kib)
		synctest.Wait()
		if r.e.complete[b.key] != 0 {
			t.Error("complete before all is present")
		}
		r.wantOK(b, mib, mib+8*kib)
		r.wantOK(b, 0, mib)
		synctest.Wait()
		if c, s := r.e.complete[b.key], r.e.synced[b.key]; c != 1 || s != 1 {
			t.Errorf("Complete was called %d times, Sync before it %d times, want one each", c, s)
		}
	})
}

func TestPrefetchYieldsToReaders(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, nil)
		defer r.close()
		a, b := newBlob("aa", 1, rafs.CodecNone, many(16, mib)...), newBlob("bb", 2, rafs.CodecNone, many(2, mib)...)
		g := &gate{}
		defer r.mount(g, a, b)()
		a.setBefore(slow(time.Second))
		b.setBefore(slow(time.Minute))
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { r.wantOK(b, 0, 4*kib) })
		synctest.Wait()
		wg.Go(func() {
			newPrefetch(r.d.filler, g, 0).run(ctx, []image.Range{{Blob: 0, Off: 0, Len: 16 * mib}}, []*object{r.object(a), r.object(b)})
		})
		time.Sleep(59 * time.Second)
		if n := len(a.asked()); n != 0 {
			t.Errorf("prefetch made %d requests while a reader waited", n)
		}
		time.Sleep(time.Minute)
		if !r.object(a).has(span{0, 16}) {
			t.Error("prefetch did not go on after the reader")
		}
		if asked := a.asked(); len(asked) != 4 {
			t.Errorf("prefetch asked for %v, want four ranges of 4 MiB", asked)
		}
		cancel()
		wg.Wait()
	})
}

func TestPrefetchKeepsToItsBandwidth(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, nil)
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecNone, many(64, 256*kib)...)
		defer r.mount(nil, b)()
		p := newPrefetch(r.d.filler, &gate{}, mib)
		if p.limit.Limit() != rate.Limit(mib) {
			t.Fatal("limit not set")
		}
		began := time.Now()
		p.run(t.Context(), []image.Range{{Len: 16 * mib}}, []*object{r.object(b)})
		if d := time.Since(began); d < 15*time.Second || d > 17*time.Second {
			t.Errorf("16 MiB at 1 MiB/s took %v", d)
		}
	})
}

func TestStoppingLeavesWhoStillWaitsToTheNextProcess(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, func(o *Options) { o.StopTimeout = 3 * time.Second })
		b, quick := newBlob("aa", 1, rafs.CodecNone, mib), newBlob("bb", 1, rafs.CodecNone, mib)
		r.mount(nil, b, quick)
		b.setBefore(slow(time.Hour))
		quick.setBefore(slow(time.Second))
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			err := r.kernel.Read(ctx, r.dirs[b.key], b.key, make([]byte, 4*kib), 0)
			if !errors.Is(err, context.Canceled) {
				t.Errorf("the reader got %v before it was killed", err)
			}
		})
		wg.Go(func() { r.wantOK(quick, 0, 4*kib) })
		synctest.Wait()
		began := time.Now()
		r.close()
		if d := time.Since(began); d != 3*time.Second {
			t.Errorf("stopped after %v, want the stop timeout", d)
		}
		if a := r.e.reads(b.key); len(a) != 0 {
			t.Errorf("the request in flight was answered %v", a)
		}
		cancel()
		wg.Wait()
	})
}

func TestUnmountingOneImageLeavesTheOthersReadersServed(t *testing.T) {
	eachMode(t, func(t *testing.T, mode simkernel.Mode) {
		r := newRig(t, mode, nil)
		defer r.close()
		b := newBlob("aa", 1, rafs.CodecNone, mib)
		unmountFirst := r.mount(nil, b)
		other := newBlob("aa", 1, rafs.CodecNone, mib)
		defer r.mount(nil, other)()
		b.setBefore(slow(time.Hour))
		var wg sync.WaitGroup
		wg.Go(func() { r.wantOK(other, 0, 4*kib) }) // through the first one's source
		synctest.Wait()
		unmountFirst()
		wg.Wait()
		if n := len(other.asked()); n != 1 {
			t.Errorf("the other image's source was asked %d times, want 1", n)
		}
	})
}
