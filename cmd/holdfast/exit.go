package main

import (
	"errors"
	"fmt"

	"holdfast/handover"
	"holdfast/rafs/convert"
	"holdfast/state"
)

// Exit codes. They are API: scripts and unit files rely on them.
const (
	exitOK       = 0
	exitFailure  = 1
	exitUsage    = 2
	exitKernel   = 3                 // the kernel lacks a feature
	exitInstance = 4                 // another instance is running
	exitNewer    = 5                 // the state was written by a newer release
	exitIdle     = handover.IdleCode // serve ended for idleness: start it again when it is asked for
	exitCommand  = 127               // keep cannot run its command, as of a shell
)

// An exitError ends the program with a code. With no err it ends without a word: everything was said before.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}
func (e *exitError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

// named puts who failed before an error.
func named(who string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", who, err)
}

func exitCode(err error) int {
	var e *exitError
	var locked *handover.LockedError
	var options *convert.OptionsError
	switch {
	case errors.As(err, &e):
		return e.code
	case errors.As(err, &options):
		return exitUsage
	case errors.As(err, &locked), errors.Is(err, state.ErrLocked):
		return exitInstance
	case errors.Is(err, state.ErrNewer):
		return exitNewer
	}
	return exitFailure
}
