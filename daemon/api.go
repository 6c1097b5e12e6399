package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// maxBody bounds the body of a request, in bytes.
const maxBody = 64 << 10

// apiGrace is how long answers under way may take once the daemon stops.
const apiGrace = 5 * time.Second

// A MountRequest is the body of POST /v1/mounts.
type MountRequest struct {
	Image       string `json:"image"`                  // oci:PATH[:TAG], docker://REF or rafs:BOOTSTRAP[,BLOBDIR]; paths absolute
	Dir         string `json:"dir"`                    // absolute, clean, exists
	Domain      string `json:"domain,omitempty"`       // "": one for the image's registry and the credentials for it, or LocalDomain
	Prefetch    *bool  `json:"prefetch,omitempty"`     // nil: as the daemon is configured
	PrefetchBPS *int64 `json:"prefetch_bps,omitempty"` // bytes a second, 0: no limit; nil: as the daemon is configured
}

// A MountInfo is a mounted image.
type MountInfo struct {
	ID       string    `json:"id"`
	Image    string    `json:"image"` // digest
	Ref      string    `json:"ref"`
	Dir      string    `json:"dir"`
	Domain   string    `json:"domain"`
	Prefetch bool      `json:"prefetch"`
	Created  time.Time `json:"created"`
	Complete bool      `json:"complete"`          // all of its data is in the cache
	Offline  bool      `json:"offline,omitempty"` // it was mounted without a daemon, which has nothing to do with it
	Broken   string    `json:"broken,omitempty"`  // why it cannot be served
}

// An ImageInfo is an image the daemon has saved.
type ImageInfo struct {
	Digest  string    `json:"digest"`
	Ref     string    `json:"ref"`     // as it was given last
	Size    int64     `json:"size"`    // of its data, in bytes
	Present int64     `json:"present"` // of that, in the cache; counted while it is mounted
	Domains []string  `json:"domains"` // it was mounted in
	Mounts  []string  `json:"mounts"`  // directories
	Created time.Time `json:"created"`
}

// A server is the API being served.
type server struct {
	listener net.Listener
	left     atomic.Bool // leave was called
	http     *http.Server
	failed   chan error // why serving ended, unless by shutdown; room for one
	cancel   context.CancelFunc
	wg       sync.WaitGroup
}

// serveAPI serves the API on l until shutdown, which waits for it.
func (d *Daemon) serveAPI(l net.Listener) *server {
	ctx, cancel := context.WithCancel(context.Background())
	s := &server{listener: l, failed: make(chan error, 1), cancel: cancel, http: &http.Server{
		Handler:           d.handler(),
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          zap.NewStdLog(d.log),
	}}
	d.succession.api = s
	s.wg.Go(func() {
		if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) && !s.left.Load() {
			s.failed <- err
		}
	})
	return s
}

// shutdown cancels what is under way and returns when all of it has ended.
func (s *server) shutdown() {
	s.cancel()
	ctx, cancel := context.WithTimeout(context.Background(), apiGrace)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		s.http.Close() // a client that does not take its answer
	}
	s.wg.Wait()
}

// leave takes no more connections: a successor does, on the same socket. What is under way goes on.
func (s *server) leave() {
	s.left.Store(true)
	s.listener.Close() // the successor has its own descriptor of it
}

// A route is what a method of a path does: it returns what to answer with.
type route func(r *http.Request) (status int, answer any, err error)

// handler routes requests. Paths begin with the API's version, which changes when what a client sends or reads would
// come to mean something else; new fields in answers do not change it.
func (d *Daemon) handler() http.Handler {
	paths := map[string]map[string]route{
		"/v1/mounts":  {http.MethodGet: d.getMounts, http.MethodPost: d.postMounts, http.MethodDelete: d.deleteMounts},
		"/v1/images":  {http.MethodGet: d.getImages, http.MethodDelete: d.deleteImages},
		"/v1/dedup":   {http.MethodGet: d.getDedup},
		"/v1/gc":      {http.MethodPost: d.postGC},
		"/v1/check":   {http.MethodPost: d.postCheck},
		"/v1/status":  {http.MethodGet: d.getStatus},
		"/v1/state":   {http.MethodGet: d.getState},
		"/v1/upgrade": {http.MethodPost: d.postUpgrade},

		"/v1/prefetch": {http.MethodGet: d.getPrefetch, http.MethodPost: d.postPrefetch},
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		d.calls.Add(1)
		defer d.calls.Add(-1)
		d.lastUsed.Store(int64(time.Since(d.began)))
		status, answer, err := dispatch(paths, w, r)
		if err != nil {
			e := asError(err)
			if e.Status >= http.StatusInternalServerError {
				d.log.Error("request of the API failed", zap.String("method", r.Method), zap.String("path", r.URL.Path), zap.Error(err))
			}
			status, answer = e.Status, e
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		if answer != nil {
			_ = json.NewEncoder(w).Encode(answer) // the client may be gone: nobody left to tell
		}
	})
}

func dispatch(paths map[string]map[string]route, w http.ResponseWriter, r *http.Request) (int, any, error) {
	methods, ok := paths[r.URL.Path]
	if !ok {
		return 0, nil, notFound("this daemon's API is /v1/mounts, /v1/images, /v1/dedup, /v1/prefetch, /v1/gc, /v1/check, /v1/status, /v1/state and /v1/upgrade", "no such path: %q", r.URL.Path)
	}
	f, ok := methods[r.Method]
	if !ok {
		var allow []string
		for m := range methods {
			allow = append(allow, m)
		}
		slices.Sort(allow)
		w.Header().Set("Allow", strings.Join(allow, ", "))
		return 0, nil, newError(http.StatusMethodNotAllowed, CodeMethod, "use "+strings.Join(allow, ", "), "%s cannot be used on %s", []any{r.Method, r.URL.Path})
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	return f(r)
}

func (d *Daemon) getStatus(r *http.Request) (int, any, error) {
	return http.StatusOK, d.status(), noQuery(r)
}

func (d *Daemon) getImages(r *http.Request) (int, any, error) {
	if err := noQuery(r); err != nil {
		return 0, nil, err
	}
	list, err := d.images()
	return http.StatusOK, list, err
}

func (d *Daemon) getMounts(r *http.Request) (int, any, error) {
	list := []MountInfo{}
	for _, m := range d.mounts.list() {
		list = append(list, m.info())
	}
	records, err := d.state.Mounts()
	if err != nil {
		return 0, nil, err
	}
	for _, m := range offlineMounts(records, d.boot, "") {
		list = append(list, MountInfo{ID: m.ID, Image: m.Image, Ref: m.Ref, Dir: m.Dir, Domain: m.Domain, Created: m.Created, Complete: true, Offline: true})
	}
	return http.StatusOK, list, noQuery(r)
}

func (d *Daemon) postMounts(r *http.Request) (int, any, error) {
	var req MountRequest
	if err := errors.Join(noQuery(r), decodeBody(r, &req)); err != nil {
		return 0, nil, err
	}
	m, err := d.mount(r.Context(), req)
	if err != nil {
		return 0, nil, err
	}
	return http.StatusCreated, m.info(), nil
}

// deleteImages takes the images as the query's image, which may come several times.
func (d *Daemon) deleteImages(r *http.Request) (int, any, error) {
	q := r.URL.Query()
	for name := range q {
		if name != "image" {
			return 0, nil, invalid("the query has one parameter, image", "unknown parameter %q", name)
		}
	}
	if len(q["image"]) == 0 {
		return 0, nil, invalid("give images as ?image=", "no image named")
	}
	report, err := d.removeImages(r.Context(), q["image"])
	return http.StatusOK, report, err
}

// A GCRequest is the body of POST /v1/gc.
type GCRequest struct {
	DryRun bool `json:"dry_run,omitempty"` // only say what would be removed
}

func (d *Daemon) postGC(r *http.Request) (int, any, error) {
	var req GCRequest
	if err := errors.Join(noQuery(r), decodeBody(r, &req)); err != nil {
		return 0, nil, err
	}
	report, err := d.gc(r.Context(), req.DryRun)
	return http.StatusOK, report, err
}

// A CheckRequest is the body of POST /v1/check.
type CheckRequest struct {
	Image  string `json:"image,omitempty"`  // on record, by digest or reference; "": all that are mounted
	Repair bool   `json:"repair,omitempty"` // write the right bytes over wrong ones
}

func (d *Daemon) postCheck(r *http.Request) (int, any, error) {
	var req CheckRequest
	if err := errors.Join(noQuery(r), decodeBody(r, &req)); err != nil {
		return 0, nil, err
	}
	report, err := d.checkCache(r.Context(), req.Image, req.Repair)
	return http.StatusOK, report, err
}

// postUpgrade goes on whoever asked for it goes away: half an upgrade helps nobody.
func (d *Daemon) postUpgrade(r *http.Request) (int, any, error) {
	var req UpgradeRequest
	if err := errors.Join(noQuery(r), decodeBody(r, &req)); err != nil {
		return 0, nil, err
	}
	res, err := d.Upgrade(context.WithoutCancel(r.Context()), req)
	return http.StatusOK, res, err
}

// deleteMounts takes the directory as the query's dir.
func (d *Daemon) deleteMounts(r *http.Request) (int, any, error) {
	q := r.URL.Query()
	for name := range q {
		if name != "dir" {
			return 0, nil, invalid("the query has one parameter, dir", "unknown parameter %q", name)
		}
	}
	if len(q["dir"]) != 1 || q.Get("dir") == "" {
		return 0, nil, invalid("give the directory as ?dir=", "%d directories given, want one", len(q["dir"]))
	}
	return http.StatusNoContent, nil, d.unmount(r.Context(), q.Get("dir"))
}

func (m *mount) info() MountInfo {
	r := m.asRecorded()
	return MountInfo{ID: r.ID, Image: r.Image, Ref: r.Ref, Dir: r.Dir, Domain: r.Domain, Prefetch: r.Prefetch, Created: r.Created, Complete: m.complete(), Broken: m.broken}
}

// complete reports whether every blob of m is in the cache as a whole.
func (m *mount) complete() bool {
	for _, h := range m.blobs {
		if !h.o.has(span{0, h.o.table.Len()}) {
			return false
		}
	}
	return m.broken == ""
}

func noQuery(r *http.Request) error {
	for name := range r.URL.Query() {
		return invalid("this path takes none", "unknown parameter %q", name)
	}
	return nil
}

// decodeBody reads one JSON object into v. A field that v does not have is an error that names it: it may be one that a later
// release takes, and doing without it what was asked for with it would be wrong.
func decodeBody(r *http.Request, v any) error {
	b, err := io.ReadAll(r.Body)
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		return newError(http.StatusRequestEntityTooLarge, CodeTooLarge, "", "the request's body is over %d bytes", []any{large.Limit})
	}
	if err != nil {
		return fmt.Errorf("read the request: %w", err)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return invalid("", "the request's body at byte %d: %w", dec.InputOffset(), err)
	}
	if len(bytes.TrimSpace(b[dec.InputOffset():])) > 0 {
		return invalid("send one object", "the request's body goes on after its end, at byte %d", dec.InputOffset())
	}
	return nil
}
