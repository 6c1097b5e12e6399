package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"holdfast/rafs/source"
)

// An Error is an error of the API, on both sides of the socket.
type Error struct {
	Status  int    `json:"-"`              // HTTP
	Code    string `json:"code"`           // for programs: the Code constants
	Message string `json:"error"`          // what went wrong
	Hint    string `json:"hint,omitempty"` // what to do about it

	err error // the cause, on the daemon's side
}

// Codes of [Error].
const (
	CodeInvalid  = "invalid"       // 400: the request makes no sense
	CodeNotFound = "not_found"     // 404
	CodeMethod   = "method"        // 405
	CodeConflict = "conflict"      // 409: it is busy, there already, or contradicts what is there
	CodeTooLarge = "too_large"     // 413
	CodeImage    = "image"         // 422: the image cannot be used
	CodeInternal = "internal"      // 500
	CodeUpgrade  = "upgrade"       // 502: the successor did not take over
	CodeSource   = "source"        // 502: where the image comes from fails, for now
	CodeGone     = "shutting_down" // 503: cancelled
)

// Error returns the message and the hint.
func (e *Error) Error() string {
	if e.Hint == "" {
		return e.Message
	}
	return e.Message + ": " + e.Hint
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.err }

func newError(status int, code, hint, format string, args []any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Status: status, Code: code, Message: err.Error(), Hint: hint, err: err}
}

func invalid(hint, format string, args ...any) error {
	return newError(http.StatusBadRequest, CodeInvalid, hint, format, args)
}

func notFound(hint, format string, args ...any) error {
	return newError(http.StatusNotFound, CodeNotFound, hint, format, args)
}

func conflict(hint, format string, args ...any) error {
	return newError(http.StatusConflict, CodeConflict, hint, format, args)
}

// unusable is an image that cannot be opened: for good, or because its source fails now.
func unusable(err error) error {
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case !source.IsPermanent(err):
		return newError(http.StatusBadGateway, CodeSource, "try again later", "%w", []any{err})
	}
	return newError(http.StatusUnprocessableEntity, CodeImage, "", "%w", []any{err})
}

// asError makes an API error of any.
func asError(err error) *Error {
	var e *Error
	switch {
	case errors.As(err, &e):
		return &Error{Status: e.Status, Code: e.Code, Message: e.Message, Hint: e.Hint, err: err}
	case errors.Is(err, errConflict):
		return newError(http.StatusConflict, CodeConflict, "", "%w", []any{err})
	case errors.Is(err, context.Canceled), errors.Is(err, errStopping):
		return newError(http.StatusServiceUnavailable, CodeGone, "", "%w", []any{err})
	}
	return newError(http.StatusInternalServerError, CodeInternal, "", "%w", []any{err})
}
