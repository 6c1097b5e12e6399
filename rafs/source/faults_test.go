package source

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"
)

var noTime time.Time

// raw takes over the connection, so that an answer can be what no HTTP library would send.
func raw(f func(c net.Conn, w *bufio.ReadWriter)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		c, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			panic(err)
		}
		defer c.Close()
		f(c, rw)
	}
}

// partial answers 206 for bytes first to last of 100 with the given body, without a length when chunked.
func partial(span string, body []byte, chunked bool) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Range", "bytes "+span)
		if !chunked {
			w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		}
		w.WriteHeader(http.StatusPartialContent)
		w.(http.Flusher).Flush()
		w.Write(body)
	}
}

func status(code int, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(code)
		io.WriteString(w, `{"errors":[{"code":"UNKNOWN","message":"said the\u001b registry"}]}`)
	}
}

// What each bad answer to a request for bytes 10 to 29 of 100 becomes.
func TestBadAnswers(t *testing.T) {
	data := pattern(100)
	for _, tt := range []struct {
		name      string
		fault     http.HandlerFunc
		wantErr   error // nil: any
		permanent bool
		code      int
		after     time.Duration
	}{
		{name: "short, with its length", fault: partial("10-29/100", data[10:20], false), wantErr: ErrShort},
		{name: "short, chunked", fault: partial("10-29/100", data[10:20], true), wantErr: ErrShort},
		{name: "too long, with its length", fault: partial("10-29/100", data[10:40], false), wantErr: ErrShort},
		{name: "too long, chunked", fault: partial("10-29/100", data[10:40], true), wantErr: ErrShort},
		{name: "wrong range", fault: partial("11-30/100", data[11:31], false), wantErr: ErrShort},
		{name: "wrong total", fault: partial("10-29/99", data[10:30], false), wantErr: ErrShort},
		{name: "no range", fault: partial("", data[10:30], false), wantErr: ErrShort},
		{name: "garbage range", fault: partial("ten-29/100 10-29/100", data[10:30], false), wantErr: ErrShort},
		{name: "encoded", fault: func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			partial("10-29/100", data[10:30], false)(w, r)
		}, wantErr: ErrShort, permanent: true},
		{name: "200 with everything", fault: func(w http.ResponseWriter, r *http.Request) { w.Write(data) }, permanent: true},
		{name: "200 with less", fault: func(w http.ResponseWriter, r *http.Request) { w.Write(data[:50]) }, wantErr: ErrShort},
		{name: "204", fault: status(204), permanent: true, code: 204},
		{name: "400", fault: status(400), permanent: true, code: 400},
		{name: "401 for ever", fault: status(401), permanent: true, code: 401},
		{name: "403", fault: status(403), permanent: true, code: 403},
		{name: "404", fault: status(404), permanent: true, code: 404},
		{name: "416", fault: status(416), permanent: true, code: 416, wantErr: ErrShort},
		{name: "408", fault: status(408), code: 408},
		{name: "429", fault: status(429, "Retry-After", "7"), code: 429, after: 7 * time.Second},
		{name: "429 for a century", fault: status(429, "Retry-After", "18446744073709551615"), code: 429, after: maxRetryAfter},
		{name: "429 with nonsense", fault: status(429, "Retry-After", "soon"), code: 429},
		{name: "500", fault: status(500), code: 500},
		{name: "501", fault: status(501), permanent: true, code: 501},
		{name: "503", fault: status(503, "Retry-After", "120"), code: 503, after: 2 * time.Minute},
		{name: "reset in the body", fault: raw(func(c net.Conn, w *bufio.ReadWriter) {
			fmt.Fprintf(w, "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 10-29/100\r\nContent-Length: 20\r\n\r\n%s", data[10:15])
			w.Flush()
			c.(*net.TCPConn).SetLinger(0)
		})},
		{name: "reset before the answer", fault: raw(func(c net.Conn, w *bufio.ReadWriter) { c.(*net.TCPConn).SetLinger(0) })},
		{name: "not HTTP", fault: raw(func(c net.Conn, w *bufio.ReadWriter) { w.WriteString("SSH-2.0-OpenSSH\r\n"); w.Flush() })},
		{name: "endless header", fault: raw(func(c net.Conn, w *bufio.ReadWriter) {
			w.WriteString("HTTP/1.1 206 Partial Content\r\nX: ")
			for range 4 << 10 {
				if _, err := w.Write(bytes.Repeat([]byte("x"), 1024)); err != nil {
					return
				}
			}
			w.Flush()
		})},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := startServer(t, "")
			digest := s.put(data)
			s.setFault(tt.fault)
			_, err := readRange(t.Context(), s.client(Options{}).Blob(digest, 100), 10, 20)
			if err == nil {
				t.Fatal("no error")
			}
			if tt.wantErr != nil && !errors.Is(err, tt.wantErr) || IsPermanent(err) != tt.permanent {
				t.Errorf("got %v (permanent: %v), want %v", err, IsPermanent(err), tt.wantErr)
			}
			var se *StatusError
			if errors.As(err, &se) != (tt.code != 0) || se != nil && (se.Code != tt.code || se.RetryAfter != tt.after) {
				t.Errorf("status is %+v in %v", se, err)
			}
			if !strings.Contains(err.Error(), digest) || !strings.Contains(err.Error(), "bytes 10 to 29") || strings.Contains(err.Error(), "\x1b") {
				t.Errorf("error %q does not name the place, or quotes what it should not", err)
			}
		})
	}
}

func TestRetryAfterMayBeADate(t *testing.T) {
	d := retryAfter(time.Now().Add(time.Minute).UTC().Format(http.TimeFormat))
	if d < 50*time.Second || d > time.Minute {
		t.Errorf("got %v", d)
	}
	if d := retryAfter(time.Now().Add(-time.Minute).UTC().Format(http.TimeFormat)); d != 0 {
		t.Errorf("a date gone by gives %v", d)
	}
}

func TestWholeBlobIsCutWhenItsStartWasWanted(t *testing.T) {
	s := startServer(t, "")
	data := pattern(1 << 20)
	digest := s.put(data)
	s.setFault(func(w http.ResponseWriter, r *http.Request) { w.Write(data) })
	got, err := readRange(t.Context(), s.client(Options{}).Blob(digest, int64(len(data))), 0, 5000)
	if err != nil || !bytes.Equal(got, data[:5000]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// Wrong bytes in a right answer are the caller's to find: it has the digests.
func TestWrongBytesPassThrough(t *testing.T) {
	s := startServer(t, "")
	digest := s.put(pattern(100))
	s.setFault(partial("10-29/100", make([]byte, 20), false))
	got, err := readRange(t.Context(), s.client(Options{}).Blob(digest, 100), 10, 20)
	if err != nil || !bytes.Equal(got, make([]byte, 20)) {
		t.Errorf("%x, %v", got, err)
	}
}

func TestAnswerThatNeverEndsIsCut(t *testing.T) {
	s := startServer(t, "")
	digest := s.put(pattern(100))
	s.setFault(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Range", "bytes 10-29/100")
		w.WriteHeader(http.StatusPartialContent)
		for {
			if _, err := w.Write(make([]byte, 4096)); err != nil {
				return // the client has hung up
			}
		}
	})
	r, err := s.client(Options{}).Blob(digest, 100).ReadRange(t.Context(), 10, 20)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got, err := io.ReadAll(r)
	if len(got) != 20 || !errors.Is(err, ErrShort) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestStallEndsWithErrStalled(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	for name, fault := range map[string]http.HandlerFunc{
		"before the header": func(w http.ResponseWriter, r *http.Request) { <-release },
		"in the body": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Range", "bytes 10-29/100")
			w.Header().Set("Content-Length", "20")
			w.WriteHeader(http.StatusPartialContent)
			w.Write(make([]byte, 5))
			w.(http.Flusher).Flush()
			<-release
		},
	} {
		s := startServer(t, "")
		digest := s.put(pattern(100))
		r := s.client(Options{Stall: 300 * time.Millisecond})
		if _, err := readRange(t.Context(), r.Blob(digest, 100), 0, 100); err != nil {
			t.Fatalf("%s: before the fault: %v", name, err)
		}
		s.setFault(fault)
		if _, err := readRange(t.Context(), r.Blob(digest, 100), 10, 20); !errors.Is(err, ErrStalled) || IsPermanent(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSlowCallerIsNoStall(t *testing.T) {
	s := startServer(t, "")
	data := pattern(8 << 20) // more than the buffers between take
	r, err := s.client(Options{Stall: 200 * time.Millisecond}).Blob(s.put(data), int64(len(data))).ReadRange(t.Context(), 0, int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.ReadFull(r, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond) // the rule is about time: a caller that is busy for longer than Stall
	if n, err := io.Copy(io.Discard, r); err != nil || n != int64(len(data)-10) {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func TestEndlessManifestAndHandshakeAreCut(t *testing.T) {
	endless := func(w http.ResponseWriter, r *http.Request) {
		for {
			if _, err := w.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	}
	for _, where := range []string{"/v2/", "/v2/" + testRepo + "/manifests/latest"} {
		s := startServer(t, "")
		next := s.front.Config.Handler
		s.front.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == where {
				endless(w, r)
				return
			}
			next.ServeHTTP(w, r)
		})
		if _, err := s.client(Options{}).Manifest(t.Context(), "latest", nil); err == nil {
			t.Errorf("%s: no error", where)
		}
	}
}

// Whatever a Content-Range says, only one reading of it is taken for the range asked for.
func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 10-29/100", "bytes 10-29/*", "bytes */100", "", "bytes 010-29/100", "BYTES 10-29/100", "bytes 10-29/100/100"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, h string) {
		got := rangeIs(h, 10, 20, 100)
		want := strings.EqualFold(h, "bytes 10-29/100") || strings.EqualFold(h, "bytes 10-29/*")
		if got != want {
			t.Errorf("%q: %v", h, got)
		}
	})
}
