package simkernel_test

import (
	"context"
	"slices"
	"sync"
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

// A supervisor keeps what engines give it to hold.
type supervisor struct {
	k    *simkernel.Kernel
	mu   sync.Mutex
	held []fscache.Held
}

func (s *supervisor) Hold(h fscache.Held) error {
	if err := s.k.Keep(h); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = append(s.held, h)
	return nil
}

func (s *supervisor) Drop(h fscache.Held) {
	s.mu.Lock()
	i := slices.Index(s.held, h)
	if i >= 0 {
		s.held = slices.Delete(s.held, i, i+1)
	}
	s.mu.Unlock()
	if i >= 0 {
		s.k.Let(h)
	}
}

func (s *supervisor) list() []fscache.Held {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.held)
}

func TestConformance(t *testing.T) {
	for name, c := range map[string]struct {
		mode      simkernel.Mode
		successor enginetest.Successor
	}{
		"cachefiles":               {simkernel.Cachefiles, enginetest.Redelivers},
		"cachefilesWithoutRestore": {simkernel.CachefilesWithoutRestore, enginetest.Replays},
		"fanotify":                 {simkernel.Fanotify, enginetest.Replays},
	} {
		t.Run(name, func(t *testing.T) {
			enginetest.Run(t, func(*testing.T) enginetest.Harness {
				k := simkernel.New(c.mode)
				s := &supervisor{k: k}
				return enginetest.Harness{
					Open: func(t testing.TB, left fscache.Inherited, inbox fscache.Inbox, _ fscache.Holder) fscache.Engine {
						t.Helper()
						left.Objects = s.list()
						e, err := k.Start(simkernel.Config{Inherited: left, Inbox: inbox, Holder: s, Reserve: 64})
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
