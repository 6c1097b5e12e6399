package daemon

import (
	"context"
	"errors"
	"io"
	"net"
	"os"

	"holdfast/rafs/source"
)

// A silentListener is an API that nobody calls; the network would keep a bubble's time from going on.
type silentListener struct{ closed chan struct{} }

func newSilentListener() *silentListener { return &silentListener{make(chan struct{})} }

func (l *silentListener) Accept() (net.Conn, error) {
	<-l.closed
	return nil, net.ErrClosed
}

func (l *silentListener) Close() error {
	if !isClosed(l.closed) {
		close(l.closed)
	}
	return nil
}

func (l *silentListener) Addr() net.Addr { return &net.UnixAddr{} }

func (l *silentListener) File() (*os.File, error) { return os.Open(os.DevNull) }

// A hostSource is an image's source on a host with faults.
type hostSource struct {
	source.Source
	h *simHost
}

var errBroken = errors.New("connection reset")

func (s *hostSource) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	for {
		s.h.mu.Lock()
		down := s.h.down
		s.h.ranges++
		broken := s.h.broken && s.h.ranges%2 == 0
		s.h.mu.Unlock()
		switch {
		case broken:
			return nil, errBroken
		case down == nil:
			return s.Source.ReadRange(ctx, off, n)
		}
		select {
		case <-down:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// setDown makes the sources not answer, or answer again.
func (h *simHost) setDown(down bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case down && h.down == nil:
		h.down = make(chan struct{})
	case !down && h.down != nil:
		close(h.down)
		h.down = nil
	}
}

func (h *simHost) setBroken(broken bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.broken = broken
}
