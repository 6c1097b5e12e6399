package source

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	_ "github.com/distribution/distribution/v3/registry/auth/htpasswd"
	_ "github.com/distribution/distribution/v3/registry/auth/token"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/sirupsen/logrus"
	"golang.org/x/crypto/bcrypt"
)

const (
	testRepo = "some/image"
	user     = "reader"
	password = "s3cr3t-Passw0rd"
)

// A server is a real registry (the distribution project's) behind a front that counts requests and can spoil answers.
type server struct {
	t     *testing.T
	dir   string
	front *httptest.Server

	blobGets atomic.Int64
	tokens   atomic.Int64
	mu       sync.Mutex
	fault    http.HandlerFunc // answers requests for blobs in the registry's place, when set
	stale    bool             // the token server's next token has expired already
	key      *ecdsa.PrivateKey
	conns    map[string]bool // remote addresses seen
}

// startServer runs a registry; auth is "", "basic" or "token".
func startServer(t *testing.T, auth string) *server {
	t.Helper()
	logrus.SetOutput(io.Discard) // the registry logs each request through the global logger
	s := &server{t: t, dir: t.TempDir(), conns: map[string]bool{}}
	cfg := &configuration.Configuration{
		Version: "0.1",
		Storage: configuration.Storage{
			"filesystem":  configuration.Parameters{"rootdirectory": s.dir},
			"maintenance": configuration.Parameters{"uploadpurging": map[any]any{"enabled": false}},
		},
	}
	cfg.Log.Level = "panic"
	cfg.HTTP.Secret = "loopback only"
	s.front = httptest.NewUnstartedServer(nil)
	front := "http://" + s.front.Listener.Addr().String()
	switch auth {
	case "basic":
		hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "htpasswd")
		if err := os.WriteFile(path, []byte(user+":"+string(hash)+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		cfg.Auth = configuration.Auth{"htpasswd": {"realm": "test", "path": path}}
	case "token":
		cfg.Auth = configuration.Auth{"token": {"realm": front + "/token", "service": "registry", "issuer": "tests", "jwks": s.makeKey()}}
	}
	back := httptest.NewServer(handlers.NewApp(t.Context(), cfg))
	t.Cleanup(back.Close)
	u, err := url.Parse(back.URL)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	proxy := &httputil.ReverseProxy{Transport: transport, Rewrite: func(p *httputil.ProxyRequest) { p.SetURL(u); p.Out.Host = p.In.Host }}
	s.front.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.serve(w, r, proxy) })
	s.front.Config.ErrorLog = nil
	s.front.Start()
	t.Cleanup(s.front.Close)
	return s
}

func (s *server) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	s.mu.Lock()
	s.conns[r.RemoteAddr] = true
	fault := s.fault
	s.mu.Unlock()
	switch {
	case r.URL.Path == "/token":
		s.serveToken(w, r)
		return
	case strings.Contains(r.URL.Path, "/blobs/sha256:"):
		s.blobGets.Add(1)
		if fault != nil {
			fault(w, r)
			return
		}
	}
	next.ServeHTTP(w, r)
}

func (s *server) setFault(f http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// put stores data the way the registry does, as a blob of testRepo.
func (s *server) put(data []byte) (digest string) {
	s.t.Helper()
	sum := sha256.Sum256(data)
	h := hex.EncodeToString(sum[:])
	root := filepath.Join(s.dir, "docker/registry/v2")
	for path, content := range map[string][]byte{
		filepath.Join(root, "blobs/sha256", h[:2], h, "data"):                      data,
		filepath.Join(root, "repositories", testRepo, "_layers/sha256", h, "link"): []byte("sha256:" + h),
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			s.t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o644); err != nil {
			s.t.Fatal(err)
		}
	}
	return "sha256:" + h
}

// putManifest stores a manifest under the tag "latest".
func (s *server) putManifest(body []byte) (digest string) {
	s.t.Helper()
	digest = s.put(body)
	m := filepath.Join(s.dir, "docker/registry/v2/repositories", testRepo, "_manifests")
	h := strings.TrimPrefix(digest, "sha256:")
	for _, path := range []string{"revisions/sha256/" + h, "tags/latest/current", "tags/latest/index/sha256/" + h} {
		if err := os.MkdirAll(filepath.Join(m, path), 0o755); err != nil {
			s.t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(m, path, "link"), []byte(digest), 0o644); err != nil {
			s.t.Fatal(err)
		}
	}
	return digest
}

// client returns a Repository that talks to the front with the right credentials.
func (s *server) client(o Options) *Repository {
	s.t.Helper()
	repo, err := name.NewRepository(s.front.Listener.Addr().String() + "/" + testRepo)
	if err != nil {
		s.t.Fatal(err)
	}
	if o.Keychain == nil {
		o.Keychain = keychain{user, password}
	}
	r := NewRepository(repo, o)
	s.t.Cleanup(func() { r.Close() })
	return r
}

type keychain struct{ user, password string }

func (k keychain) Resolve(authn.Resource) (authn.Authenticator, error) {
	return authn.FromConfig(authn.AuthConfig{Username: k.user, Password: k.password}), nil
}

// makeKey makes the token server's key and returns a file with its public half (RFC 7517).
func (s *server) makeKey() string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	s.key = key
	pub, err := key.PublicKey.Bytes() // 4, x, y
	if err != nil {
		s.t.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	path := filepath.Join(s.t.TempDir(), "jwks")
	jwks := fmt.Sprintf(`{"keys":[{"kty":"EC","crv":"P-256","kid":"k","x":%q,"y":%q}]}`, b64(pub[1:33]), b64(pub[33:]))
	if err := os.WriteFile(path, []byte(jwks), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// serveToken is a token server: who knows the password gets a signed token (RFC 7519) for pulling.
func (s *server) serveToken(w http.ResponseWriter, r *http.Request) {
	s.tokens.Add(1)
	if u, p, _ := r.BasicAuth(); u != user || p != password {
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"who are you"}]}`, http.StatusUnauthorized)
		return
	}
	s.mu.Lock()
	exp := time.Now().Add(time.Hour)
	if s.stale {
		exp = time.Now().Add(-time.Hour)
		s.stale = false
	}
	s.mu.Unlock()
	part := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			panic(err)
		}
		return base64.RawURLEncoding.EncodeToString(b)
	}
	signed := part(map[string]string{"alg": "ES256", "kid": "k"}) + "." + part(map[string]any{
		"iss": "tests", "aud": "registry", "sub": user, "exp": exp.Unix(), "nbf": exp.Add(-2 * time.Hour).Unix(),
		"access": []map[string]any{{"type": "repository", "name": testRepo, "actions": []string{"pull"}}},
	})
	sum := sha256.Sum256([]byte(signed))
	x, y, err := ecdsa.Sign(rand.Reader, s.key, sum[:])
	if err != nil {
		panic(err)
	}
	sig := make([]byte, 64)
	x.FillBytes(sig[:32])
	y.FillBytes(sig[32:])
	fmt.Fprintf(w, `{"token":%q}`, signed+"."+base64.RawURLEncoding.EncodeToString(sig))
}
