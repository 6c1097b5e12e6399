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
	"net/url"
	"os"
)

// maxAnswer bounds what a client reads of an answer, in bytes.
const maxAnswer = 64 << 20

// A Client talks to a daemon. It is safe for concurrent use. Errors the daemon answers are of type *[Error].
type Client struct {
	socket string
	http   *http.Client
}

// NewClient returns a client of the daemon that listens on the unix socket at a path. Nothing is dialled before the
// first call.
func NewClient(socket string) *Client {
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	return &Client{socket: socket, http: &http.Client{Transport: t}}
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Mount mounts an image; it returns when that is done.
func (c *Client) Mount(ctx context.Context, r MountRequest) (m MountInfo, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/mounts", r, &m)
	return m, err
}

// Umount unmounts what is mounted on dir.
func (c *Client) Umount(ctx context.Context, dir string) error {
	return c.call(ctx, http.MethodDelete, "/v1/mounts?dir="+url.QueryEscape(dir), nil, nil)
}

// Mounts lists the mounted images.
func (c *Client) Mounts(ctx context.Context) (list []MountInfo, err error) {
	err = c.call(ctx, http.MethodGet, "/v1/mounts", nil, &list)
	return list, err
}

// Images lists the saved images.
func (c *Client) Images(ctx context.Context) (list []ImageInfo, err error) {
	err = c.call(ctx, http.MethodGet, "/v1/images", nil, &list)
	return list, err
}

// Dedup returns what the mounted images have in common.
func (c *Client) Dedup(ctx context.Context) (s Sharing, err error) {
	err = c.call(ctx, http.MethodGet, "/v1/dedup", nil, &s)
	return s, err
}

// Prefetch has all of a mounted image brought into the cache, as fast as it comes, and returns at once; [Client.Prefetching] says how far it is.
func (c *Client) Prefetch(ctx context.Context, r PrefetchRequest) (p PrefetchInfo, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/prefetch", r, &p)
	return p, err
}

// Prefetching says how much of a mounted image is in the cache.
func (c *Client) Prefetching(ctx context.Context, r PrefetchRequest) (p PrefetchInfo, err error) {
	q := url.Values{}
	for name, v := range map[string]string{"image": r.Image, "dir": r.Dir, "domain": r.Domain} {
		if v != "" {
			q.Set(name, v)
		}
	}
	err = c.call(ctx, http.MethodGet, "/v1/prefetch?"+q.Encode(), nil, &p)
	return p, err
}

// RemoveImages takes images off the record, by digest or reference, and removes what only they need.
func (c *Client) RemoveImages(ctx context.Context, images ...string) (r GCReport, err error) {
	err = c.call(ctx, http.MethodDelete, "/v1/images?"+url.Values{"image": images}.Encode(), nil, &r)
	return r, err
}

// GC removes what nothing on record refers to, or with dryRun only says what that is.
func (c *Client) GC(ctx context.Context, dryRun bool) (r GCReport, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/gc", GCRequest{DryRun: dryRun}, &r)
	return r, err
}

// CheckCache compares what is cached with its digests.
func (c *Client) CheckCache(ctx context.Context, r CheckRequest) (report CacheReport, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/check", r, &report)
	return report, err
}

// Status returns what the daemon is doing.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	err = c.call(ctx, http.MethodGet, "/v1/status", nil, &s)
	return s, err
}

// State returns what is on record, and what disagrees with it.
func (c *Client) State(ctx context.Context) (r StateReport, err error) {
	err = c.call(ctx, http.MethodGet, "/v1/state", nil, &r)
	return r, err
}

// Upgrade puts another process in the daemon's place, and returns when that serves.
func (c *Client) Upgrade(ctx context.Context, r UpgradeRequest) (res UpgradeResult, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/upgrade", r, &res)
	return res, err
}

func (c *Client) call(ctx context.Context, method, path string, body, answer any) error {
	var b []byte
	if body != nil {
		var err error
		if b, err = json.Marshal(body); err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://holdfast"+path, bytes.NewReader(b))
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return c.unreachable(err)
	}
	defer resp.Body.Close()
	b, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("read the daemon's answer: %w", err)
	}
	if resp.StatusCode >= 300 {
		e := &Error{Status: resp.StatusCode}
		if err := json.Unmarshal(b, e); err != nil || e.Message == "" {
			return fmt.Errorf("the daemon on %s answered %s, which is no answer of holdfast's", c.socket, resp.Status)
		}
		return e
	}
	if answer == nil {
		return nil
	}
	if err := json.Unmarshal(b, answer); err != nil {
		return fmt.Errorf("understand the daemon's answer: %w", err)
	}
	return nil
}

// unreachable says what an error of the connection means.
func (c *Client) unreachable(err error) error {
	var op *net.OpError
	switch {
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%s may only be used by the daemon's user: %w", c.socket, err)
	case errors.As(err, &op) && op.Op == "dial":
		return fmt.Errorf("no daemon answers on %s: start holdfast serve, or give its --socket or --run: %w", c.socket, op.Err)
	}
	return fmt.Errorf("ask the daemon on %s: %w", c.socket, err)
}
