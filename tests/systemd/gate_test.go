package systemd

import (
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"sync"
)

// A gate is a proxy before a registry that keeps requests waiting while it is shut.
type gate struct {
	srv *httptest.Server
	mu  sync.Mutex
	// opened is closed while the gate is open. Guarded by mu.
	opened chan struct{}
}

func newGate(upstream string) *gate {
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: upstream})
	proxy.ErrorLog = log.New(io.Discard, "", 0) // clients that are killed
	g := &gate{opened: make(chan struct{})}
	g.open()
	g.srv = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.mu.Lock()
		opened := g.opened
		g.mu.Unlock()
		select {
		case <-opened:
			proxy.ServeHTTP(w, r)
		case <-r.Context().Done():
		}
	}))
	return g
}

func (g *gate) addr() string { return g.srv.Listener.Addr().String() }

func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.opened = make(chan struct{})
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.opened)
}

func (g *gate) close() {
	g.srv.CloseClientConnections()
	g.srv.Close()
}
