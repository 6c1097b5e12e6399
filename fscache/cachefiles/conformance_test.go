package cachefiles

import (
	"os"
	"testing"

	"go.uber.org/zap/zaptest"

	"holdfast/fscache"
	"holdfast/fscache/enginetest"
)

func TestConformance(t *testing.T) {
	needDevice(t)
	enginetest.Run(t, func(t *testing.T) enginetest.Harness {
		dir := t.TempDir()
		return enginetest.Harness{
			Open: func(t testing.TB, lifeline *os.File) fscache.Engine {
				t.Helper()
				e, err := Open(Config{Dir: dir, Device: lifeline, Log: zaptest.NewLogger(t)})
				if err != nil {
					t.Fatal(err)
				}
				return e
			},
			Readers:     enginetest.RealReaders{},
			Successor:   enginetest.Redelivers,
			AfterMounts: enginetest.DetachMount,
		}
	})
}
