package erofs

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// helperName is argv[0] of a helper, and what lists of processes show. The name of a program that anybody starts is a path or "holdfast".
const helperName = "holdfast-mount"

// helperSocket is the helper's descriptor of its socket, behind standard error.
const helperSocket = 3

func init() {
	if len(os.Args) != 1 || os.Args[0] != helperName {
		return
	}
	code := 0
	if err := help(); err != nil {
		fmt.Fprintln(os.Stderr, helperName+":", err)
		code = 1
	}
	unix.Exit(code) // os.Exit has a second for the race detector, where a test binary has that
}

// help makes the mount that is asked for and sends it, or why there is none. A sender whose other end is gone gets EPIPE, and with the
// process goes the mount.
func help() error {
	conn := os.NewFile(helperSocket, "socket")
	request, err := io.ReadAll(conn)
	if err != nil {
		return err
	}
	var options []Option
	if err := json.Unmarshal(request, &options); err != nil {
		return fmt.Errorf("what to mount: %w", err)
	}
	fd, err := New(options)
	text, encodeErr := json.Marshal(answerOf(err))
	if encodeErr != nil {
		return errors.Join(err, encodeErr)
	}
	var rights []byte
	if err == nil {
		rights = unix.UnixRights(fd)
	}
	if err := unix.Sendmsg(helperSocket, text, rights, nil, unix.MSG_NOSIGNAL); err != nil {
		return fmt.Errorf("sending the mount to whoever asked for it: %w", err)
	}
	return nil
}
