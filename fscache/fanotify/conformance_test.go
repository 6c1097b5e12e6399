package fanotify_test

import (
	"os"
	"testing"

	"go.uber.org/zap/zaptest"

	"holdfast/fscache"
	"holdfast/fscache/enginetest"
	"holdfast/fscache/fanotify"
)

func TestConformance(t *testing.T) {
	enginetest.Run(t, func(t *testing.T) enginetest.Harness {
		dir := t.TempDir()
		return enginetest.Harness{
			Open: func(t testing.TB, lifeline *os.File) fscache.Engine {
				t.Helper()
				e, err := fanotify.Open(fanotify.Config{Dir: dir, Group: lifeline, Log: zaptest.NewLogger(t)})
				if err != nil {
					t.Fatal(err)
				}
				return e
			},
			Readers:     enginetest.RealReaders{},
			Successor:   enginetest.DeniesThenAsksAgain,
			AfterMounts: enginetest.DetachMount,
		}
	})
}
