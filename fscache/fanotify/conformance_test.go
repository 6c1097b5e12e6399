package fanotify_test

import (
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
			Open: func(t testing.TB, left fscache.Inherited, inbox fscache.Inbox, holder fscache.Holder) fscache.Engine {
				t.Helper()
				e, err := fanotify.Open(fanotify.Config{Dir: dir, Inherited: left, Inbox: inbox, Holder: holder, Log: zaptest.NewLogger(t)})
				if err != nil {
					t.Fatal(err)
				}
				return e
			},
			Readers:     enginetest.RealReaders{},
			Successor:   enginetest.Replays,
			Upgrades:    true,
			AfterMounts: enginetest.DetachMount,
		}
	})
}
