package keyed

import (
	"context"
	"sync"

	"holdfast/fscache"
)

// A Mutex is one lock for each key. The zero value is ready for use.
type Mutex struct {
	mu   sync.Mutex
	held map[fscache.Key]chan struct{} // closed when the key is free
}

// Lock takes the lock of k, or returns ctx's error.
func (m *Mutex) Lock(ctx context.Context, k fscache.Key) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		m.mu.Lock()
		free := m.held[k]
		if free == nil {
			if m.held == nil {
				m.held = make(map[fscache.Key]chan struct{})
			}
			m.held[k] = make(chan struct{})
			m.mu.Unlock()
			return nil
		}
		m.mu.Unlock()
		select {
		case <-free:
		case <-ctx.Done():
		}
	}
}

// Unlock gives back what Lock took.
func (m *Mutex) Unlock(k fscache.Key) {
	m.mu.Lock()
	defer m.mu.Unlock()
	close(m.held[k])
	delete(m.held, k)
}
