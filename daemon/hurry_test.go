package daemon

import (
	"context"
	"errors"
	"testing"
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
