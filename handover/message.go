package handover

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"unicode/utf8"
)

// maxDatagram is the longest message to a supervisor in bytes (NOTIFY_BUFFER_MAX in systemd's notify-recv.h: PIPE_BUF).
const maxDatagram = 4096

// A message is what a datagram to the supervisor says. Lines with other keys are for other supervisors.
type message struct {
	store, remove, barrier, ready, stopping, reloading, watchdog bool

	mainPID int    // 0: not said
	name    []byte // FDNAME; part of the datagram, like status
	status  []byte
}

var (
	errMixed   = errors.New("asks for more than one of FDSTORE, FDSTOREREMOVE, MAINPID and BARRIER")
	errMainPID = errors.New("MAINPID is not a process id")
)

// parseMessage parses a datagram's text: KEY=VALUE lines, as in sd_notify(3). It allocates nothing unless it fails.
func parseMessage(b []byte) (message, error) {
	var m message
	if len(b) > maxDatagram || bytes.IndexByte(b, 0) >= 0 || !utf8.Valid(b) {
		return m, fmt.Errorf("not at most %d bytes of text without a NUL", maxDatagram)
	}
	for len(b) > 0 {
		line, rest, _ := bytes.Cut(b, []byte("\n"))
		b = rest
		if len(line) == 0 {
			continue
		}
		key, value, ok := bytes.Cut(line, []byte("="))
		if !ok {
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
		case "RELOADING":
			m.reloading = yes
		case "WATCHDOG":
			m.watchdog = yes
		case "MAINPID":
			n, err := strconv.ParseInt(string(value), 10, 32)
			if err != nil || n < 2 {
				return m, errMainPID
			}
			m.mainPID = int(n)
		case "STATUS":
			m.status = value
		case "FDNAME":
			m.name = value
		}
	}
	orders := 0
	for _, order := range [...]bool{m.store, m.remove, m.barrier, m.mainPID != 0} {
		if order {
			orders++
		}
	}
	if orders > 1 || m.barrier && (m.ready || m.stopping) {
		return m, errMixed
	}
	if m.store || m.remove {
		return m, checkName(m.name)
	}
	return m, nil
}
