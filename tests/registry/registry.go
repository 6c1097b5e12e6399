// Package registry runs the distribution project's registry in this process, on loopback: the real server that tests,
// benchmarks and the demo push images to and pull them from.
package registry

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem" // keeps blobs under Config.Dir
	"github.com/sirupsen/logrus"
)

// A Registry is a running server.
type Registry struct {
	srv *http.Server
	ln  net.Listener
	end chan struct{}

	served atomic.Int64
}

// Start serves a registry that keeps its blobs in the directory dir, on a port of the kernel's choice.
func Start(dir string) (*Registry, error) { return StartAt(dir, "127.0.0.1:0") }

// StartAt is Start on a given loopback address, for a registry that comes back.
func StartAt(dir, addr string) (*Registry, error) {
	logrus.SetOutput(io.Discard) // the server logs each request through the global logger
	cfg := &configuration.Configuration{
		Version: "0.1",
		Storage: configuration.Storage{
			"filesystem":  configuration.Parameters{"rootdirectory": dir},
			"delete":      configuration.Parameters{"enabled": true},
			"maintenance": configuration.Parameters{"uploadpurging": map[any]any{"enabled": false}},
		},
	}
	cfg.Log.Level = "panic"
	cfg.HTTP.Secret = "loopback only"
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	r := &Registry{ln: ln, end: make(chan struct{})}
	r.srv = &http.Server{Handler: counted(handlers.NewApp(context.Background(), cfg), &r.served), ReadHeaderTimeout: time.Minute}
	go func() { defer close(r.end); r.srv.Serve(ln) }() // ends when Close closes the server; Close waits
	return r, nil
}

// Addr is the server's "host:port".
func (r *Registry) Addr() string { return r.ln.Addr().String() }

// Served is how many bytes of manifests, blobs and errors the server has sent.
func (r *Registry) Served() int64 { return r.served.Load() }

// Close stops the server.
func (r *Registry) Close() error {
	err := r.srv.Close()
	<-r.end
	return err
}
