package daemon

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"holdfast/fscache/simkernel"
)

func TestPrefetchThatEndedSaysWhyAndMayBeBegunAgain(t *testing.T) {
	var p prefetching
	broken := errors.New("broken")
	p.begin(t.Context(), func(context.Context) error { return broken })
	p.wg.Wait()
	if err := p.failure(); !errors.Is(err, broken) {
		t.Errorf("it failed with %v, want %v", err, broken)
	}
	p.begin(t.Context(), func(context.Context) error { return nil })
	p.wg.Wait()
	if err := p.failure(); err != nil {
		t.Errorf("the second one ended with %v", err)
	}
	// One that was paused has nothing to say, and what follows it is not its.
	began := make(chan struct{})
	p.begin(t.Context(), func(ctx context.Context) error { close(began); <-ctx.Done(); return broken })
	<-began
	p.pause()
	again := make(chan struct{})
	p.begin(t.Context(), func(ctx context.Context) error { close(again); <-ctx.Done(); return nil })
	<-again
	if err := p.failure(); err != nil {
		t.Errorf("a paused one ended with %v", err)
	}
	p.end()
	p.begin(t.Context(), func(context.Context) error { t.Error("begun after the end"); return nil })
	p.wg.Wait()
}

// Who waits for a prefetch waits for all of it to be on the disk: that begins while more is fetched. What nobody waits for is left to the
// kernel, which has readers to think of.
func TestHurriedPrefetchFlushesWhatItBrings(t *testing.T) {
	im := layeredImages(t, []int{1, 2, 3})[0]
	d, e := newTestDaemon(t, simkernel.New(simkernel.Fanotify), t.TempDir(), nil)
	d.pump.start()
	defer d.close()
	for _, hurried := range []bool{false, true} {
		domain := fmt.Sprint("d-", hurried)
		m, err := d.mount(t.Context(), MountRequest{Image: im.ref, Dir: t.TempDir(), Domain: domain})
		if err != nil {
			t.Fatal(err)
		}
		m.record.Prefetch = true
		if hurried {
			err = d.hurry(m)
		} else {
			d.startPrefetch(m)
		}
		m.prefetch.wg.Wait()
		var want int64
		for _, h := range m.blobs {
			if present, _ := h.o.presentBytes(); err != nil || present != h.o.size() {
				t.Fatalf("%d of %d bytes are present (%v)", present, h.o.size(), err)
			}
			if hurried {
				want += h.o.size()
			}
		}
		if e.mu.Lock(); e.flushed != want {
			t.Errorf("hurried %v: %d bytes were flushed, want %d", hurried, e.flushed, want)
		}
		e.mu.Unlock()
	}
}
