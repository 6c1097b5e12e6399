package daemon

import (
	"context"
	"sync"
)

// A gate lets a mount's prefetch through only while no reader of the mount waits for a fetch.
type gate struct {
	mu   sync.Mutex
	n    int           // fetches for readers under way
	idle chan struct{} // closed when n comes back to 0; nil while nobody waits
}

func (g *gate) enter() {
	g.mu.Lock()
	g.n++
	g.mu.Unlock()
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.n--; g.n == 0 && g.idle != nil {
		close(g.idle)
		g.idle = nil
	}
}

// wait waits until no reader is being served; the cause of ctx when that ends first.
func (g *gate) wait(ctx context.Context) error {
	for {
		g.mu.Lock()
		if g.n == 0 {
			g.mu.Unlock()
			return context.Cause(ctx)
		}
		if g.idle == nil {
			g.idle = make(chan struct{})
		}
		idle := g.idle
		g.mu.Unlock()
		select {
		case <-idle:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
