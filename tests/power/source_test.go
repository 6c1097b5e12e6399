package power

import (
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"holdfast/tests/load"
	"holdfast/tests/registry"
)

// A source is an image in a registry, behind a proxy of its own that counts what is fetched of it.
type source struct {
	load.Image
	ref    string
	served atomic.Int64 // bytes of blobs
	close  func()
}

// The two images: one that is read when the power is cut, and one that was prefetched.
var (
	readImage = load.Image{Name: "read", Layers: 2, Files: 4, Size: 192 << 10}
	keptImage = load.Image{Name: "kept", Layers: 2, Files: 4, Size: 128 << 10}
)

// newSources puts the images in a registry that lives as long as the test.
func newSources(t *testing.T) (read, kept *source) {
	t.Helper()
	addr := push(t, filepath.Join(scratch, strings.ReplaceAll(t.Name(), "/", "-")))
	var all []*source
	for _, i := range []load.Image{readImage, keptImage} {
		s, err := newSource(i, addr, "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s.close)
		all = append(all, s)
	}
	return all[0], all[1]
}

// push puts the images in a registry in dir, and returns its address.
func push(t *testing.T, dir string) string {
	t.Helper()
	reg, err := registry.Start(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = reg.Close() })
	for _, i := range []load.Image{readImage, keptImage} {
		if err := i.Convert(context.Background(), "docker://"+reg.Addr()+"/"+i.Name+":1"); err != nil {
			t.Fatal(err)
		}
	}
	return reg.Addr()
}

// newSource starts the proxy of an image at an address.
func newSource(i load.Image, registry, addr string) (*source, error) {
	s := &source{Image: i}
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: registry})
	proxy.ErrorLog = log.New(io.Discard, "", 0) // clients that are killed
	proxy.ModifyResponse = func(r *http.Response) error {
		if strings.Contains(r.Request.URL.Path, "/blobs/") {
			r.Body = &countedBody{r.Body, &s.served}
		}
		return nil
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	srv := httptest.NewUnstartedServer(proxy)
	_ = srv.Listener.Close() // the one that it has from the start
	srv.Listener = ln
	srv.Start()
	s.close = func() {
		srv.CloseClientConnections()
		srv.Close()
	}
	s.ref = "docker://" + ln.Addr().String() + "/" + i.Name + ":1"
	return s, nil
}

// size is how many bytes the image's files have.
func (s *source) size() (n int64) {
	for _, f := range s.List() {
		n += f.Size
	}
	return n
}

type countedBody struct {
	io.ReadCloser
	n *atomic.Int64
}

func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.n.Add(int64(n))
	return n, err
}
