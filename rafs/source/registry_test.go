package source

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

func TestRegistryGivesExactlyTheRange(t *testing.T) {
	for _, auth := range []string{"", "basic", "token"} {
		t.Run("auth="+auth, func(t *testing.T) {
			s := startServer(t, auth)
			data := pattern(3 << 20)
			b := s.client(Options{}).Blob(s.put(data), int64(len(data)))
			for _, r := range [][2]int64{{0, 1}, {0, 3 << 20}, {3<<20 - 1, 1}, {12345, 1 << 20}} {
				got, err := readRange(t.Context(), b, r[0], r[1])
				if err != nil || !bytes.Equal(got, data[r[0]:r[0]+r[1]]) {
					t.Errorf("range %v: %d bytes, %v", r, len(got), err)
				}
			}
		})
	}
}

func TestRangesReuseConnections(t *testing.T) {
	s := startServer(t, "")
	data := pattern(1 << 20)
	b := s.client(Options{}).Blob(s.put(data), int64(len(data)))
	for i := range int64(30) {
		r, err := b.ReadRange(t.Context(), i*4096, 4096)
		if err != nil {
			t.Fatal(err)
		}
		// As a fill does it: exactly the bytes, no read for the end.
		if _, err := io.ReadFull(r, make([]byte, 4096)); err != nil {
			t.Fatal(err)
		}
		r.Close()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.conns) > 2 { // one for the attempt to speak TLS, one for the rest
		t.Errorf("30 ranges took %d connections", len(s.conns))
	}
}

func TestConcurrentReadersShakeHandsOnce(t *testing.T) {
	s := startServer(t, "token")
	data := pattern(1 << 20)
	b := s.client(Options{}).Blob(s.put(data), int64(len(data)))
	var wg sync.WaitGroup
	for i := range int64(16) {
		wg.Go(func() {
			if got, err := readRange(t.Context(), b, i*100, 5000); err != nil || !bytes.Equal(got, data[i*100:i*100+5000]) {
				t.Errorf("reader %d: %d bytes, %v", i, len(got), err)
			}
		})
	}
	wg.Wait()
	if n := s.tokens.Load(); n != 1 {
		t.Errorf("%d token requests for 16 readers", n)
	}
}

func TestExpiredTokenIsRenewedOnceAndUnseen(t *testing.T) {
	s := startServer(t, "token")
	s.stale = true
	data := pattern(10000)
	b := s.client(Options{}).Blob(s.put(data), int64(len(data)))
	got, err := readRange(t.Context(), b, 100, 5000)
	if err != nil || !bytes.Equal(got, data[100:5100]) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if n := s.tokens.Load(); n != 2 {
		t.Errorf("%d tokens, want the expired one and a new one", n)
	}
}

func TestWrongCredentialsArePermanentAndNotQuoted(t *testing.T) {
	for _, auth := range []string{"basic", "token"} {
		t.Run(auth, func(t *testing.T) {
			s := startServer(t, auth)
			b := s.client(Options{Keychain: keychain{user, "wrong-Passw0rd"}}).Blob(s.put(pattern(100)), 100)
			_, err := b.ReadRange(t.Context(), 0, 10)
			var se *StatusError
			if !IsPermanent(err) || !errors.As(err, &se) || se.Code != http.StatusUnauthorized {
				t.Fatalf("got %v", err)
			}
			if !strings.Contains(err.Error(), "log in") || strings.Contains(err.Error(), "Passw0rd") {
				t.Errorf("error is %q", err)
			}
		})
	}
}

// A credential that the user has just put right works without a restart.
func TestCredentialsAreLookedUpAgainAfterARefusal(t *testing.T) {
	s := startServer(t, "basic")
	k := &changingKeychain{keychain{user, "wrong"}}
	b := s.client(Options{Keychain: k}).Blob(s.put(pattern(100)), 100)
	if _, err := b.ReadRange(t.Context(), 0, 10); !IsPermanent(err) {
		t.Fatalf("with a wrong password: %v", err)
	}
	k.keychain.password = password
	if _, err := readRange(t.Context(), b, 0, 10); err != nil {
		t.Errorf("with the right one: %v", err)
	}
}

type changingKeychain struct{ keychain }

func (k *changingKeychain) Resolve(r authn.Resource) (authn.Authenticator, error) {
	return k.keychain.Resolve(r)
}

func TestMissingBlobIsPermanent(t *testing.T) {
	s := startServer(t, "")
	s.put(pattern(10)) // the repository exists
	digest := "sha256:" + strings.Repeat("ab", 32)
	_, err := s.client(Options{}).Blob(digest, 100).ReadRange(t.Context(), 0, 10)
	var se *StatusError
	if !IsPermanent(err) || !errors.As(err, &se) || se.Code != 404 || !strings.Contains(err.Error(), digest) {
		t.Errorf("got %v", err)
	}
}

// The blob is shorter in the registry than the image says: a range behind its end is the registry's 416.
func TestRangeBehindTheRegistrysBlobIsPermanent(t *testing.T) {
	s := startServer(t, "")
	b := s.client(Options{}).Blob(s.put(pattern(100)), 1000)
	if _, err := b.ReadRange(t.Context(), 500, 10); !IsPermanent(err) || !errors.Is(err, ErrShort) {
		t.Errorf("behind the end: %v", err)
	}
	if _, err := b.ReadRange(t.Context(), 50, 100); !errors.Is(err, ErrShort) {
		t.Errorf("over the end: %v", err)
	}
}

func TestManifestHasTheDigestAskedFor(t *testing.T) {
	s := startServer(t, "token")
	body := []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}`)
	digest := s.putManifest(body)
	r := s.client(Options{})
	accept := []string{"application/vnd.oci.image.manifest.v1+json"}
	for _, ref := range []string{"latest", digest} {
		m, err := r.Manifest(t.Context(), ref, accept)
		if err != nil || !bytes.Equal(m.Body, body) || m.Digest != digest || m.MediaType != accept[0] {
			t.Errorf("%s: %+v, %v", ref, m, err)
		}
	}
	if _, err := r.Manifest(t.Context(), "none", accept); !IsPermanent(err) || !strings.Contains(err.Error(), "none") {
		t.Errorf("missing tag: %v", err)
	}
}

// cdn is another server, which the registry redirects to with a signature that it can be told to refuse.
type cdn struct {
	*httptest.Server
	mu       sync.Mutex
	sig      string
	auth     []string // Authorization headers seen
	requests int
}

func startCDN(t *testing.T, data []byte) *cdn {
	c := &cdn{sig: "signature-1"}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		c.requests++
		ok := r.URL.Query().Get("sig") == c.sig
		if a := r.Header.Get("Authorization"); a != "" {
			c.auth = append(c.auth, a)
		}
		c.mu.Unlock()
		if !ok {
			http.Error(w, "expired", http.StatusForbidden)
			return
		}
		http.ServeContent(w, r, "", noTime, bytes.NewReader(data))
	}))
	t.Cleanup(c.Close)
	return c
}

func (c *cdn) redirect(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	http.Redirect(w, r, c.URL+"/blob?sig="+c.sig, http.StatusTemporaryRedirect)
}

func TestRedirectIsRememberedRefreshedAndGetsNoCredentials(t *testing.T) {
	s := startServer(t, "basic")
	data := pattern(100000)
	c := startCDN(t, data)
	s.setFault(c.redirect)
	b := s.client(Options{}).Blob(s.put(data), int64(len(data)))
	check := func(wantRegistry int64) {
		t.Helper()
		got, err := readRange(t.Context(), b, 1000, 5000)
		if err != nil || !bytes.Equal(got, data[1000:6000]) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
		if n := s.blobGets.Load(); n != wantRegistry {
			t.Errorf("the registry was asked %d times, want %d", n, wantRegistry)
		}
	}
	check(1)
	check(1) // straight to the address of before
	c.mu.Lock()
	c.sig = "signature-2"
	c.mu.Unlock()
	check(2) // which has expired: through the registry again
	check(2)
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.auth) > 0 {
		t.Errorf("the other server was sent %q", c.auth)
	}
}

func TestSignedAddressIsNotInErrors(t *testing.T) {
	s := startServer(t, "")
	c := startCDN(t, nil)
	s.setFault(c.redirect)
	b := s.client(Options{}).Blob(s.put(pattern(100)), 100)
	c.Close() // connection refused
	_, err := b.ReadRange(t.Context(), 0, 10)
	if err == nil || IsPermanent(err) || strings.Contains(err.Error(), "signature") {
		t.Errorf("got %v", err)
	}
}

func TestRememberedAddressThatIsDownIsForgotten(t *testing.T) {
	s := startServer(t, "")
	data := pattern(100)
	c := startCDN(t, data)
	s.setFault(c.redirect)
	b := s.client(Options{}).Blob(s.put(data), 100)
	if _, err := readRange(t.Context(), b, 0, 10); err != nil {
		t.Fatal(err)
	}
	c.Close()
	s.setFault(nil)
	if _, err := readRange(t.Context(), b, 0, 10); err == nil || IsPermanent(err) {
		t.Errorf("the other server is down, and the read gives %v", err)
	}
	if _, err := readRange(t.Context(), b, 0, 10); err != nil {
		t.Errorf("the registry has the blob, and the next read gives %v", err)
	}
}

func TestClosedBodyEndsItsExchange(t *testing.T) {
	var ctx context.Context
	g := &guard{stall: DefaultStall, base: roundTrip(func(req *http.Request) (*http.Response, error) {
		ctx = req.Context()
		return &http.Response{StatusCode: 200, Header: http.Header{}, Body: http.NoBody, Request: req}, nil
	})}
	resp, err := g.RoundTrip(httptest.NewRequest(http.MethodGet, "http://localhost/", nil))
	if err != nil || ctx.Err() != nil {
		t.Fatal(err, ctx.Err())
	}
	resp.Body.Close()
	if ctx.Err() == nil {
		t.Error("the exchange's context lives on")
	}
}

func TestRedirectLoopEnds(t *testing.T) {
	s := startServer(t, "")
	s.setFault(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
	})
	_, err := s.client(Options{}).Blob(s.put(pattern(100)), 100).ReadRange(t.Context(), 0, 10)
	if !IsPermanent(err) || !errors.Is(err, errRedirects) {
		t.Errorf("got %v", err)
	}
	if n := s.blobGets.Load(); n > maxRedirects+1 {
		t.Errorf("%d requests", n)
	}
}

func TestUnreachableRegistryIsTemporary(t *testing.T) {
	s := startServer(t, "")
	b := s.client(Options{}).Blob(s.put(pattern(100)), 100)
	s.front.Close()
	if _, err := b.ReadRange(t.Context(), 0, 10); err == nil || IsPermanent(err) {
		t.Errorf("got %v", err)
	}
}

func TestCancelUnblocksHandshakeAndBody(t *testing.T) {
	s := startServer(t, "")
	digest := s.put(pattern(100))
	inFault, release := make(chan struct{}), make(chan struct{})
	defer close(release)
	s.setFault(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Range", "bytes 0-99/100")
		w.Header().Set("Content-Length", "100")
		w.WriteHeader(http.StatusPartialContent)
		w.Write(make([]byte, 10))
		w.(http.Flusher).Flush()
		close(inFault)
		<-release
	})
	ctx, cancel := context.WithCancelCause(t.Context())
	r, err := s.client(Options{}).Blob(digest, 100).ReadRange(ctx, 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	<-inFault
	cause := fmt.Errorf("the reader was killed")
	go cancel(cause) // ends at once; the read below waits for it
	if _, err := io.ReadAll(r); !errors.Is(err, cause) {
		t.Errorf("got %v", err)
	}
}

func TestCredentialsAreNotSentInPlainTextAcrossTheNetwork(t *testing.T) {
	for host, want := range map[string]bool{
		"127.0.0.1:5000": true, "localhost": true, "localhost:80": true, "[::1]:5000": true,
		"10.0.0.1:5000": false, "registry.example": false, "127.0.0.1.example:5000": false, "localhost.example": false,
	} {
		if loopback(host) != want {
			t.Errorf("loopback(%q) is %v", host, !want)
		}
	}
	repo, err := name.NewRepository("10.0.0.1:5000/x")
	if err != nil {
		t.Fatal(err)
	}
	r := NewRepository(repo, Options{Keychain: keychain{user, password}})
	r.base = roundTrip(func(req *http.Request) (*http.Response, error) {
		if req.URL.Scheme == "https" {
			return nil, errors.New("connection refused")
		}
		if req.Header.Get("Authorization") != "" {
			t.Error("credentials sent")
		}
		return &http.Response{StatusCode: 200, Header: http.Header{}, Body: http.NoBody, Request: req}, nil
	})
	_, err = r.Blob("sha256:"+strings.Repeat("0", 64), 10).ReadRange(t.Context(), 0, 10)
	if !IsPermanent(err) || !strings.Contains(err.Error(), "plain http") {
		t.Errorf("got %v", err)
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
