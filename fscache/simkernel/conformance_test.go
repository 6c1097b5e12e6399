package simkernel_test

import (
	"context"
	"os"
	"testing"

	"holdfast/fscache"
	"holdfast/fscache/enginetest"
	"holdfast/fscache/simkernel"
)

// simReaders read through simulated mounts.
type simReaders struct{ k *simkernel.Kernel }

func (s simReaders) Read(dir string, k fscache.Key, p []byte, off int64) error {
	return s.k.Read(context.Background(), dir, k, p, off)
}

func (s simReaders) Hold(dir string, k fscache.Key) (func() error, error) {
	release, err := s.k.Hold(dir, k)
	if err != nil {
		return nil, err
	}
	return func() error { release(); return nil }, nil
}

type simProcess struct {
	kill  context.CancelFunc
	ended chan error
}

func (s simReaders) Start(dir string, k fscache.Key, off, n int64) (enginetest.Process, error) {
	ctx, cancel := context.WithCancel(context.Background())
	p := simProcess{kill: cancel, ended: make(chan error, 1)}
	go func() { p.ended <- s.k.Read(ctx, dir, k, make([]byte, n), off) }() // ends with Kill
	return p, nil
}

func (p simProcess) Kill() error {
	p.kill()
	<-p.ended
	return nil
}

func TestConformance(t *testing.T) {
	for name, c := range map[string]struct {
		mode      simkernel.Mode
		successor enginetest.Successor
	}{
		"cachefiles": {simkernel.Cachefiles, enginetest.Redelivers},
		"fanotify":   {simkernel.Fanotify, enginetest.DeniesThenAsksAgain},
	} {
		t.Run(name, func(t *testing.T) {
			enginetest.Run(t, func(*testing.T) enginetest.Harness {
				k := simkernel.New(c.mode)
				return enginetest.Harness{
					Open: func(t testing.TB, _ *os.File) fscache.Engine {
						t.Helper()
						e, err := k.Open()
						if err != nil {
							t.Fatal(err)
						}
						return e
					},
					Readers:   simReaders{k},
					Successor: c.successor,
				}
			})
		})
	}
}
