package cachefiles

import (
	"testing"

	"go.uber.org/zap/zaptest"

	"holdfast/fscache"
	"holdfast/fscache/enginetest"
)

func TestConformance(t *testing.T) {
	needDevice(t)
	successor := enginetest.Replays
	if hasRestore(t) {
		successor = enginetest.Redelivers
	}
	enginetest.Run(t, func(t *testing.T) enginetest.Harness {
		dir := t.TempDir()
		return enginetest.Harness{
			Open: func(t testing.TB, left fscache.Inherited, inbox fscache.Inbox, holder fscache.Holder) fscache.Engine {
				t.Helper()
				e, err := Open(Config{Dir: dir, Inherited: left, Inbox: inbox, Holder: holder, Log: zaptest.NewLogger(t)})
				if err != nil {
					t.Fatal(err)
				}
				return e
			},
			Readers:     enginetest.RealReaders{},
			Successor:   successor,
			Upgrades:    true,
			AfterMounts: enginetest.DetachMount,
		}
	})
}
