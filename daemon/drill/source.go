package drill

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A registry serves the one image of an OCI layout on loopback, to which faults can be done: it can be slow, and it can be cut off. It answers
// what a client that pulls asks for, and nothing else.
type registry struct {
	layout string
	root   ocispec.Descriptor // of the image
	http   *http.Server
	addr   string
	shaper *shaper
	wg     sync.WaitGroup
}

// A pace is how fast a source answers.
type pace struct {
	latency time.Duration // until it begins to answer
	rate    int64         // bytes a second over all connections; 0: no limit
}

const repository = "drill"

// startRegistry serves the image in a layout.
func startRegistry(layout string, p pace) (*registry, error) {
	b, err := os.ReadFile(filepath.Join(layout, "index.json"))
	if err != nil {
		return nil, fmt.Errorf("serve the image: %w", err)
	}
	var index ocispec.Index
	if err := json.Unmarshal(b, &index); err != nil {
		return nil, fmt.Errorf("serve the image in %s: %w", layout, err)
	}
	if len(index.Manifests) != 1 {
		return nil, fmt.Errorf("serve the image in %s: it lists %d images, want one", layout, len(index.Manifests))
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("serve the image: %w", err)
	}
	r := &registry{layout: layout, root: index.Manifests[0], addr: l.Addr().String(), shaper: newShaper(l, p)}
	r.http = &http.Server{Handler: r, ReadHeaderTimeout: time.Minute}
	r.wg.Go(func() { _ = r.http.Serve(r.shaper) }) // ends with close, which waits for it
	return r, nil
}

// ref is the image's reference for the daemon.
func (r *registry) ref() string {
	return "docker://" + r.addr + "/" + repository + "@" + r.root.Digest.String()
}

func (r *registry) close() error {
	err := r.http.Close()
	r.shaper.cut(true)
	r.wg.Wait()
	return err
}

// ServeHTTP implements http.Handler.
func (r *registry) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	if q.URL.Path == "/v2/" {
		return
	}
	what, found := strings.CutPrefix(q.URL.Path, "/v2/"+repository+"/")
	kind, ref, _ := strings.Cut(what, "/")
	algo, hexa, digest := strings.Cut(ref, ":")
	if !found || !digest || algo != "sha256" || len(hexa) != 64 || strings.Trim(hexa, "0123456789abcdef") != "" || (kind != "manifests" && kind != "blobs") {
		http.NotFound(w, q)
		return
	}
	f, err := os.Open(filepath.Join(r.layout, "blobs", algo, hexa))
	if err != nil {
		http.NotFound(w, q)
		return
	}
	defer f.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	if kind == "manifests" {
		w.Header().Set("Content-Type", r.root.MediaType)
	}
	w.Header().Set("Docker-Content-Digest", ref)
	r.shaper.delay()
	http.ServeContent(w, q, "", time.Time{}, f)
}

// A shaper is a listener whose connections share a bandwidth, and which can be cut.
type shaper struct {
	net.Listener

	mu    sync.Mutex
	pace  pace
	off   bool
	conns map[*shapedConn]bool
	free  time.Time // when all that was accepted for sending is sent
}

func newShaper(l net.Listener, p pace) *shaper {
	return &shaper{Listener: l, pace: p, conns: map[*shapedConn]bool{}}
}

func (s *shaper) set(p pace) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pace, s.free = p, time.Time{}
}

func (s *shaper) get() pace {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pace
}

// delay waits for as long as the source takes to begin an answer. It is bounded by what set was given.
func (s *shaper) delay() { time.Sleep(s.get().latency) }

// cut resets all connections, and new ones as soon as they are made, until it is called with false.
func (s *shaper) cut(off bool) {
	s.mu.Lock()
	s.off = off
	var all []*shapedConn
	if off {
		for c := range s.conns {
			all = append(all, c)
		}
	}
	s.mu.Unlock()
	for _, c := range all {
		c.reset()
	}
}

// Accept implements net.Listener.
func (s *shaper) Accept() (net.Conn, error) {
	for {
		conn, err := s.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &shapedConn{Conn: conn, s: s}
		s.mu.Lock()
		off := s.off
		if !off {
			s.conns[c] = true
		}
		s.mu.Unlock()
		if !off {
			return c, nil
		}
		c.reset()
	}
}

type shapedConn struct {
	net.Conn
	s *shaper
}

// reset ends the connection with a RST: what the peer has not read yet is lost to it.
func (c *shapedConn) reset() {
	if t, ok := c.Conn.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // closed all the same
	}
	_ = c.Close()
}

// Close implements net.Conn.
func (c *shapedConn) Close() error {
	c.s.mu.Lock()
	delete(c.s.conns, c)
	c.s.mu.Unlock()
	return c.Conn.Close()
}

// segment is what is sent at a time: little enough that a change of the pace is soon felt.
const segment = 16 << 10

// Write implements net.Conn.
func (c *shapedConn) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		part := p[:min(len(p), segment)]
		c.s.take(len(part))
		m, err := c.Conn.Write(part)
		n += m
		if err != nil {
			return n, err
		}
		p = p[m:]
	}
	return n, nil
}

// take waits until n more bytes may be sent.
func (s *shaper) take(n int) {
	s.mu.Lock()
	if s.pace.rate == 0 {
		s.mu.Unlock()
		return
	}
	now := time.Now()
	if s.free.Before(now) {
		s.free = now
	}
	s.free = s.free.Add(time.Duration(int64(n) * int64(time.Second) / s.pace.rate))
	at := s.free
	s.mu.Unlock()
	time.Sleep(time.Until(at))
}

var errNoSource = errors.New("the mounts were there before, so their source is not the drill's to touch; --self makes mounts with a source of their own")
