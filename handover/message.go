package handover

import (
	"bytes"
	"errors"
	"fmt"
	"unicode/utf8"
)

// maxDatagram is the longest message to a supervisor in bytes (NOTIFY_BUFFER_MAX in systemd's notify-recv.h: PIPE_BUF).
const maxDatagram = 4096

// A message is what a datagram to the supervisor says. Lines with other keys are for other supervisors.
type message struct {
	store, remove, barrier, ready, stopping bool

	name   string // FDNAME
	status string
}

var errMixed = errors.New("asks for more than one of FDSTORE, FDSTOREREMOVE and BARRIER")

// parseMessage parses a datagram's text: KEY=VALUE lines, as in sd_notify(3).
func parseMessage(b []byte) (message, error) {
	var m message
	if len(b) > maxDatagram || bytes.IndexByte(b, 0) >= 0 || !utf8.Valid(b) {
		return m, fmt.Errorf("not at most %d bytes of text without a NUL", maxDatagram)
	}
	for line := range bytes.SplitSeq(b, []byte("\n")) {
		key, value, ok := bytes.Cut(line, []byte("="))
		if !ok {
			if len(line) == 0 {
				continue
			}
			return m, fmt.Errorf("line %q is not KEY=VALUE", line)
		}
		yes := string(value) == "1"
		switch string(key) {
		case "FDSTORE":
			m.store = yes
		case "FDSTOREREMOVE":
			m.remove = yes
		case "BARRIER":
			m.barrier = yes
		case "READY":
			m.ready = yes
		case "STOPPING":
			m.stopping = yes
		case "STATUS":
			m.status = string(value)
		case "FDNAME":
			m.name = string(value)
		}
	}
	if m.store && m.remove || m.barrier && (m.store || m.remove || m.ready || m.stopping) {
		return m, errMixed
	}
	if m.store || m.remove {
		return m, checkName(m.name)
	}
	return m, nil
}
