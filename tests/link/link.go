// Package link puts a slow network link in front of a server on loopback: a TCP proxy with a round-trip time and a
// bandwidth that all its connections share, each way. It counts what crosses it.
//
// It models one bottleneck with a queue, as a home or WAN link has; it does not drop or reorder.
package link

import (
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Config describes a link.
type Config struct {
	RTT  time.Duration // round-trip time: half of it is added each way
	Rate int64         // bytes per second each way; 0: no limit
}

// A Link is a running proxy.
type Link struct {
	cfg      Config
	upstream string
	ln       net.Listener
	cancel   context.CancelFunc
	ctx      context.Context
	wg       sync.WaitGroup
	up, down direction
}

// direction is one way through the bottleneck: a queue that empties at the link's rate.
type direction struct {
	bytes atomic.Int64
	mu    sync.Mutex
	free  time.Time // when the last byte accepted so far has been sent
}

const (
	segment  = 16 << 10
	maxQueue = 100 * time.Millisecond // of sending time in the bottleneck's queue, then senders wait
	inFlight = 256                    // segments of one connection between its two ends
)

// Start listens on loopback and forwards each connection to upstream ("host:port") across the link.
func Start(upstream string, cfg Config) (*Link, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	l := &Link{cfg: cfg, upstream: upstream, ln: ln, ctx: ctx, cancel: cancel}
	l.wg.Add(1)
	go l.accept() // ends when Close closes the listener; Close waits
	return l, nil
}

// Addr is the "host:port" clients connect to.
func (l *Link) Addr() string { return l.ln.Addr().String() }

// Bytes is what has crossed the link so far: to the server and from it.
func (l *Link) Bytes() (sent, received int64) { return l.up.bytes.Load(), l.down.bytes.Load() }

// Close ends every connection and waits for the goroutines.
func (l *Link) Close() error {
	err := l.ln.Close()
	l.cancel()
	l.wg.Wait()
	return err
}

func (l *Link) accept() {
	defer l.wg.Done()
	for {
		c, err := l.ln.Accept()
		if err != nil {
			return
		}
		l.wg.Add(1)
		go l.serve(c) // ends with the connection or the link; Close waits
	}
}

func (l *Link) serve(client net.Conn) {
	defer l.wg.Done()
	defer client.Close()
	// The handshake costs a round trip of its own.
	if !l.sleep(time.Now().Add(l.cfg.RTT)) {
		return
	}
	server, err := net.Dial("tcp", l.upstream)
	if err != nil {
		return
	}
	defer server.Close()
	stop := context.AfterFunc(l.ctx, func() { client.Close(); server.Close() })
	defer stop()
	var wg sync.WaitGroup
	wg.Add(2)
	go func() { defer wg.Done(); l.pump(server, client, &l.up) }()   // ends with either connection
	go func() { defer wg.Done(); l.pump(client, server, &l.down) }() // ends with either connection
	wg.Wait()
}

type parcel struct {
	data []byte
	at   time.Time
}

// pump carries bytes one way until src ends, then half-closes dst.
func (l *Link) pump(dst, src net.Conn, d *direction) {
	parcels := make(chan parcel, inFlight)
	done := make(chan struct{})
	go func() { // ends when parcels is closed below, or dst fails
		defer close(done)
		for p := range parcels {
			if !l.sleep(p.at) {
				break
			}
			if _, err := dst.Write(p.data); err != nil {
				src.Close() // nobody takes the bytes: end the reading side too
				break
			}
		}
		for range parcels { // after a failure: let the reading side run out
		}
		if t, ok := dst.(*net.TCPConn); ok {
			t.CloseWrite()
		}
	}()
	for {
		buf := make([]byte, segment)
		n, err := src.Read(buf)
		if n > 0 {
			at, wait := d.take(n, l.cfg)
			d.bytes.Add(int64(n))
			parcels <- parcel{buf[:n], at.Add(l.cfg.RTT / 2)}
			if !l.sleep(time.Now().Add(wait)) {
				break
			}
		}
		if err != nil {
			if err != io.EOF {
				dst.Close()
			}
			break
		}
	}
	close(parcels)
	<-done
}

// take books n bytes: at is when the last of them has left the bottleneck, wait how long the sender has to hold back
// so that the queue stays short.
func (d *direction) take(n int, cfg Config) (at time.Time, wait time.Duration) {
	now := time.Now()
	if cfg.Rate <= 0 {
		return now, 0
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.free.Before(now) {
		d.free = now
	}
	d.free = d.free.Add(time.Duration(int64(n) * int64(time.Second) / cfg.Rate))
	return d.free, max(0, d.free.Sub(now)-maxQueue)
}

// sleep waits until t, or returns false when the link is closed.
func (l *Link) sleep(t time.Time) bool {
	d := time.Until(t)
	if d <= 0 {
		return l.ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-l.ctx.Done():
		return false
	}
}
