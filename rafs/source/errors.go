package source

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// Sentinel errors, beside [ErrShort].
var (
	// ErrStalled means that the peer sent nothing for as long as [Options.Stall] allows. It is worth trying again.
	ErrStalled = errors.New("no progress")
	// ErrTooLarge means that an answer or a file whose length was not known before is longer than any honest one.
	ErrTooLarge = errors.New("too large")
	// errRedirects ends a redirect loop.
	errRedirects = errors.New("too many redirects")
)

// A StatusError is an answer of a registry, or of a server it redirected to, that holds no data. It is marked with
// [Permanent] unless its code is one that goes away by itself (408, 425, 429 and 5xx but 501 and 505).
type StatusError struct {
	Code       int           // HTTP status
	Message    string        // what the registry said about it, in printable ASCII, at most 200 bytes; may be empty
	RetryAfter time.Duration // how long the registry wants to be left alone; 0: it did not say
}

// Error names the status, what the server said, and what can be done about it.
func (e *StatusError) Error() string {
	s := fmt.Sprintf("the registry answered %d %s", e.Code, http.StatusText(e.Code))
	if e.Message != "" {
		s += " (" + e.Message + ")"
	}
	switch e.Code {
	case http.StatusUnauthorized, http.StatusForbidden:
		s += ": log in to it (docker login, or another tool that writes the Docker configuration file)"
	case http.StatusNotFound:
		s += ": is it still there, and may these credentials see it?"
	case http.StatusRequestedRangeNotSatisfiable:
		s += ": its copy is shorter than the image says"
	}
	if e.RetryAfter > 0 {
		s += fmt.Sprintf("; it asks to wait %v", e.RetryAfter)
	}
	return s
}

// maxRetryAfter bounds what a registry can ask for.
const maxRetryAfter = 24 * time.Hour

// statusError reads what an answer without data says; it takes at most 4 KiB of its body.
func statusError(resp *http.Response) error {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 4096)) // only for the message
	e := &StatusError{Code: resp.StatusCode, Message: message(body), RetryAfter: retryAfter(resp.Header.Get("Retry-After"))}
	return markStatus(e)
}

func markStatus(e *StatusError) error {
	switch {
	case e.Code == http.StatusRequestTimeout, e.Code == http.StatusTooEarly, e.Code == http.StatusTooManyRequests:
		return e
	case e.Code >= 500 && e.Code != http.StatusNotImplemented && e.Code != http.StatusHTTPVersionNotSupported:
		return e
	}
	return Permanent(e)
}

// message takes the first error's code and message out of a registry's error body (OCI distribution specification 1.1,
// "Error codes").
func message(body []byte) string {
	var v struct {
		Errors []struct{ Code, Message string }
	}
	if json.Unmarshal(body, &v) != nil || len(v.Errors) == 0 {
		return ""
	}
	return printable(v.Errors[0].Code + ": " + v.Errors[0].Message)
}

func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
	return s[:min(len(s), 200)]
}

// retryAfter reads a Retry-After header: seconds or a date (RFC 9110, 10.2.3).
func retryAfter(v string) time.Duration {
	if v == "" {
		return 0
	}
	if n, err := strconv.ParseUint(v, 10, 64); err == nil {
		return time.Duration(min(n, uint64(maxRetryAfter/time.Second))) * time.Second
	}
	t, err := http.ParseTime(v)
	if err != nil {
		return 0
	}
	return max(0, min(time.Until(t), maxRetryAfter))
}

// scarce says whether this process, and not the other side, was the reason: it had no file descriptor to try with, or its like. An attempt
// at plain http that follows one at https which failed so may well be answered with an error that is about nothing else.
func scarce(err error) bool {
	var socket *os.SyscallError
	if errors.As(err, &socket) && socket.Syscall == "socket" { // socket(2) knows no other side
		return true
	}
	var file *fs.PathError
	var errno interface{ Temporary() bool } // of syscall.Errno: EMFILE, ENFILE, EINTR
	return errors.As(err, &file) && errors.As(file.Err, &errno) && errno.Temporary()
}

// clean turns an error of net/http or of the registry library into one that carries no address (which may be signed) and
// no body, and marks those that trying again will not mend.
func clean(err error) error {
	var se *StatusError
	if errors.As(err, &se) {
		return err
	}
	var te *transport.Error
	if !scarce(err) && errors.As(err, &te) {
		e := &StatusError{Code: te.StatusCode}
		if len(te.Errors) > 0 {
			e.Message = printable(string(te.Errors[0].Code) + ": " + te.Errors[0].Message)
		}
		return markStatus(e)
	}
	for {
		var ue *url.Error
		if !errors.As(err, &ue) {
			break
		}
		err = ue.Err
	}
	var cert *tls.CertificateVerificationError
	if errors.Is(err, errRedirects) || errors.As(err, &cert) {
		return Permanent(err)
	}
	return err
}
