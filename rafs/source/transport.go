package source

import (
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

// maxAnswer bounds answers that were not asked for as a range: handshakes, tokens, manifests, error bodies.
const maxAnswer = 8 << 20

// loadRoots reads the certificates that this system trusts, in the background, before they are needed. Package crypto/x509 tries that only
// once: if the process had no file descriptor left at the first handshake, it would trust nobody for as long as it lives. The goroutine
// ends by itself.
var loadRoots = sync.OnceFunc(func() { go func() { _, _ = x509.SystemCertPool() }() })

// newTransport returns the connections of one Repository.
func newTransport() *http.Transport {
	return &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSHandshakeTimeout:    30 * time.Second,
		MaxIdleConnsPerHost:    32, // a daemon reads that many ranges of an image at once, rarely more
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: 1 << 20,
		DisableCompression:     true, // a range of a compressed answer is not a range of the blob
		ForceAttemptHTTP2:      true,
		// One dead HTTP/2 connection would stall every request that is put on it: ask it whether it lives.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 15 * time.Second},
	}
}

// A guard is a RoundTripper that ends exchanges whose peer makes no progress, and cuts answers that nobody expects to be
// long. It guards every request of a Repository: the handshake, the token exchange, redirects and blobs.
type guard struct {
	base  http.RoundTripper
	stall time.Duration
}

func (g *guard) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	b := &guardedBody{ctx: ctx, cancel: cancel, stall: g.stall, left: maxAnswer, ranged: req.Header.Get("Range") != ""}
	b.timer = time.AfterFunc(g.stall, func() { cancel(fmt.Errorf("%w for %v", ErrStalled, g.stall)) })
	req = req.Clone(ctx)
	req.Header.Set("User-Agent", "holdfast")
	resp, err := g.base.RoundTrip(req)
	b.timer.Stop()
	if err != nil {
		err = b.explain(err)
		cancel(nil)
		return nil, err
	}
	b.body = resp.Body
	resp.Body = b
	return resp, nil
}

// A guardedBody runs the guard's clock while somebody waits in Read, and only then: a caller who takes its time is not a
// peer who stalls.
type guardedBody struct {
	ctx    context.Context // this exchange's own, ended by cancel
	cancel context.CancelCauseFunc
	timer  *time.Timer
	stall  time.Duration
	body   io.ReadCloser
	ranged bool  // the reader of a range does its own counting
	left   int64 // bytes that may still come, when not ranged
}

func (b *guardedBody) Read(p []byte) (int, error) {
	if !b.ranged {
		if b.left == 0 {
			return 0, fmt.Errorf("%w: over %d bytes", ErrTooLarge, maxAnswer)
		}
		p = p[:min(int64(len(p)), b.left)]
	}
	b.timer.Reset(b.stall)
	n, err := b.body.Read(p)
	b.timer.Stop()
	b.left -= int64(n)
	if err != nil && err != io.EOF {
		err = b.explain(err)
	}
	return n, err
}

// explain prefers the reason for which the exchange was cancelled to what the cancelled operation returned.
func (b *guardedBody) explain(err error) error {
	if cause := context.Cause(b.ctx); cause != nil {
		return cause
	}
	return err
}

func (b *guardedBody) Close() error {
	b.timer.Stop()
	b.cancel(nil)
	return b.body.Close()
}
