package cachefiles_test

import (
	"os"
	"testing"

	"go.uber.org/zap/zaptest"

	"holdfast/fscache"
	"holdfast/fscache/cachefiles"
	"holdfast/fscache/enginetest"
)

func TestConformance(t *testing.T) {
	needDevice(t)
	enginetest.Run(t, func(t *testing.T) enginetest.Harness {
		dir := t.TempDir()
		return enginetest.Harness{
			Open: func(t testing.TB, lifeline *os.File) fscache.Engine {
				t.Helper()
				e, err := cachefiles.Open(cachefiles.Config{Dir: dir, Device: lifeline, Log: zaptest.NewLogger(t)})
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

// needDevice skips where the kernel has no cachefiles. With HOLDFAST_ENGINE=cachefiles it must have it, and TMPDIR must be
// on a file system that can hold a cache.
func needDevice(t testing.TB) {
	t.Helper()
	_, err := os.Stat("/dev/cachefiles")
	if err != nil && os.Getenv("HOLDFAST_ENGINE") != cachefiles.Name {
		t.Skipf("no cachefiles in this kernel: %v (the VM of tests/vm has it)", err)
	}
}
