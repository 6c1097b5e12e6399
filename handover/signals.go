package handover

import (
	"context"
	"os/signal"
	"syscall"
)

// StopContext returns a context that ends with the first SIGTERM or SIGINT; the next one ends the process as if nobody had asked
// for the first. Call stop when signals are to have their usual effect again.
func StopContext(parent context.Context) (ctx context.Context, stop context.CancelFunc) {
	ctx, stop = signal.NotifyContext(parent, syscall.SIGTERM, syscall.SIGINT)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// IgnoreHangup makes SIGHUP do nothing: a daemon does not end with the terminal it was started from, and its keeper passes
// the signal on.
func IgnoreHangup() { signal.Ignore(syscall.SIGHUP) }
