package source

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// DefaultStall is how long a peer may send nothing before an exchange with it is given up.
const DefaultStall = 30 * time.Second

// maxRedirects is how many redirects one request follows.
const maxRedirects = 5

// Options are those of a [Repository]; the zero value is good.
type Options struct {
	Keychain authn.Keychain // where credentials come from; nil: the Docker configuration file and its helpers
	Stall    time.Duration  // 0: DefaultStall
}

// A Repository is a client of one repository of a registry: its connections and its authorisation, shared by all blobs of an
// image. Nothing is sent before the first manifest or range is read. It may be used from any goroutine.
//
// Plain http is spoken only to registries that do not answer on https and are on loopback or in a private network (the names
// package's rule); credentials are never sent over it except on loopback.
type Repository struct {
	repo     name.Repository
	keychain authn.Keychain
	conns    *http.Transport
	direct   *http.Client // no authorisation: for the addresses that the registry redirects to
	base     http.RoundTripper

	turn    chan struct{} // holds one token: whoever takes it may look at and replace session
	session *session
}

// A session is what one handshake with a registry led to.
type session struct {
	client *http.Client
	scheme string
}

// NewRepository returns a client for repo.
func NewRepository(repo name.Repository, o Options) *Repository {
	if o.Keychain == nil {
		o.Keychain = authn.DefaultKeychain
	}
	if o.Stall == 0 {
		o.Stall = DefaultStall
	}
	if repo.Scheme() == "https" {
		loadRoots()
	}
	conns := newTransport()
	base := &guard{base: conns, stall: o.Stall}
	r := &Repository{
		repo:     repo,
		keychain: o.Keychain,
		conns:    conns,
		base:     base,
		direct:   &http.Client{Transport: base, CheckRedirect: checkRedirect},
		turn:     make(chan struct{}, 1),
	}
	r.turn <- struct{}{}
	return r
}

func checkRedirect(_ *http.Request, via []*http.Request) error {
	if len(via) > maxRedirects {
		return errRedirects
	}
	return nil
}

// String is "host/repository".
func (r *Repository) String() string { return r.repo.Name() }

// Close closes the connections. Blobs and their readers must not be used afterwards.
func (r *Repository) Close() error {
	r.conns.CloseIdleConnections()
	return nil
}

// open returns the session, after a handshake if there is none or it is stale, which is the one that a caller found to
// be refused. One caller at a time shakes hands; a caller that is cancelled leaves it to the next.
func (r *Repository) open(ctx context.Context, stale *session) (*session, error) {
	select {
	case <-r.turn:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { r.turn <- struct{}{} }()
	if r.session != nil && r.session != stale {
		return r.session, nil
	}
	r.session = nil
	s, err := r.handshake(ctx)
	if err != nil {
		return nil, clean(err)
	}
	r.session = s
	return s, nil
}

// handshake asks the registry how it wants to be authorised, and does it (OCI distribution specification; Docker registry
// token authentication).
func (r *Repository) handshake(ctx context.Context) (*session, error) {
	reg := r.repo.Registry
	auth, err := authn.Resolve(ctx, r.keychain, r.repo)
	if err != nil {
		return nil, fmt.Errorf("credentials for %s: %w", reg, err)
	}
	ch, err := transport.Ping(ctx, reg, r.base)
	if err != nil {
		return nil, err
	}
	s := &session{scheme: "https"}
	if ch.Insecure {
		s.scheme = "http"
		if auth != authn.Anonymous && !loopback(reg.RegistryStr()) {
			return nil, Permanent(fmt.Errorf("%s answers in plain http: credentials are not sent there; give it a certificate", reg))
		}
	}
	header, err := r.authorize(ctx, auth, ch)
	if err != nil {
		return nil, err
	}
	s.client = &http.Client{CheckRedirect: checkRedirect, Transport: &authorized{base: r.base, host: reg.RegistryStr(), header: header}}
	return s, nil
}

// authorize returns the Authorization header that answers the challenge ch; "" if none is wanted.
func (r *Repository) authorize(ctx context.Context, auth authn.Authenticator, ch *transport.Challenge) (string, error) {
	scheme := strings.ToLower(ch.Scheme)
	if scheme == "" {
		return "", nil
	}
	cfg, err := authn.Authorization(ctx, auth)
	if err != nil {
		return "", fmt.Errorf("credentials for %s: %w", r.repo.Registry, err)
	}
	switch {
	case scheme == "bearer" && cfg.RegistryToken != "":
		return "Bearer " + cfg.RegistryToken, nil
	case scheme == "bearer":
		tok, err := transport.Exchange(ctx, r.repo.Registry, auth, r.base, []string{r.repo.Scope(transport.PullScope)}, ch)
		if err != nil {
			return "", tokenError(err)
		}
		if tok.AccessToken != "" {
			return "Bearer " + tok.AccessToken, nil
		}
		return "Bearer " + tok.Token, nil
	case scheme != "basic":
		return "", Permanent(fmt.Errorf("%s wants %q authorisation, only basic and bearer are known", r.repo.Registry, printable(ch.Scheme)))
	case cfg.Auth != "":
		return "Basic " + cfg.Auth, nil
	case cfg.Username != "":
		return "Basic " + base64.StdEncoding.EncodeToString([]byte(cfg.Username+":"+cfg.Password)), nil
	}
	return "", nil
}

// tokenError passes on what clean understands, and hides the rest, which may quote the token server's whole answer.
func tokenError(err error) error {
	var te *transport.Error
	var ue *url.Error
	if errors.As(err, &te) || errors.As(err, &ue) {
		return err
	}
	return errors.New("the registry's token server gave no token that can be read")
}

// loopback reports whether host, with or without a port, is this machine.
func loopback(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// authorized adds the Authorization header to requests for the registry itself, and to no other.
type authorized struct {
	base   http.RoundTripper
	host   string
	header string
}

func (a *authorized) RoundTrip(req *http.Request) (*http.Response, error) {
	if a.header != "" && req.URL.Host == a.host {
		req = req.Clone(req.Context())
		req.Header.Set("Authorization", a.header)
	}
	return a.base.RoundTrip(req)
}

// get sends a request for a path below the repository. When the registry says 401, which it does when a token has
// expired, it shakes hands again and asks once more.
func (r *Repository) get(ctx context.Context, path string, header http.Header) (*http.Response, error) {
	s, err := r.open(ctx, nil)
	if err != nil {
		return nil, err
	}
	for again := true; ; again = false {
		u := s.scheme + "://" + r.repo.RegistryStr() + "/v2/" + r.repo.RepositoryStr() + path
		resp, err := fetch(ctx, s.client, u, header)
		if err != nil || resp.StatusCode != http.StatusUnauthorized || !again {
			return resp, err
		}
		resp.Body.Close()
		if s, err = r.open(ctx, s); err != nil {
			return nil, err
		}
	}
}

func fetch(ctx context.Context, c *http.Client, u string, header http.Header) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
	if err != nil {
		return nil, Permanent(errors.New("the address is not a URL"))
	}
	req.Header = header.Clone()
	resp, err := c.Do(req)
	if err != nil {
		return nil, clean(err)
	}
	return resp, nil
}

// MaxManifest is how large a manifest or an index may be, in bytes (OCI distribution specification 1.1: registries should accept
// at least that much; nobody makes larger ones).
const MaxManifest = 4 << 20

// A Manifest is what a registry has under a tag or a digest.
type Manifest struct {
	Body      []byte
	MediaType string // as the registry says, without parameters
	Digest    string // "sha256:<hex>" of Body
}

// Manifest fetches the manifest that ref, a tag or a "sha256:<hex>" digest, stands for; accept are the media types
// wanted. A body that does not have the digest asked for is an error.
func (r *Repository) Manifest(ctx context.Context, ref string, accept []string) (Manifest, error) {
	m, err := r.manifest(ctx, ref, accept)
	if err != nil {
		return Manifest{}, fmt.Errorf("fetch manifest %s of %s: %w", ref, r, err)
	}
	return m, nil
}

func (r *Repository) manifest(ctx context.Context, ref string, accept []string) (Manifest, error) {
	resp, err := r.get(ctx, "/manifests/"+ref, http.Header{"Accept": accept})
	if err != nil {
		return Manifest{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return Manifest{}, statusError(resp)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, MaxManifest+1))
	switch {
	case err != nil:
		return Manifest{}, clean(err)
	case len(body) > MaxManifest:
		return Manifest{}, Permanent(fmt.Errorf("%w: over %d bytes", ErrTooLarge, MaxManifest))
	}
	sum := sha256.Sum256(body)
	digest := "sha256:" + hex.EncodeToString(sum[:])
	if strings.Contains(ref, ":") && ref != digest {
		return Manifest{}, fmt.Errorf("the registry sent one with digest %s", digest)
	}
	mt, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	return Manifest{Body: body, MediaType: strings.TrimSpace(mt), Digest: digest}, nil
}
