package killer

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// A Kill says at which system call a life of the daemon ends. The zero value lets it live.
type Kill struct {
	Call int  // the first is 1
	Exit bool // when the kernel has done it, rather than before
}

// String is what ParseKill reads.
func (k Kill) String() string {
	if k.Exit {
		return strconv.Itoa(k.Call) + "x"
	}
	return strconv.Itoa(k.Call) + "e"
}

// ParseKill reads "57e", the entry of the 57th call, or "57x", its exit.
func ParseKill(s string) (Kill, error) {
	number, exit := strings.CutSuffix(s, "x")
	n, err := strconv.Atoi(strings.TrimSuffix(number, "e"))
	if err != nil || n < 0 {
		return Kill{}, fmt.Errorf("%q is not the entry (57e) or exit (57x) of a system call", s)
	}
	return Kill{n, exit}, nil
}

// A Life is what the tracer saw of one daemon.
type Life struct {
	Life   int    `json:"life"` // the first is 0
	PID    int    `json:"pid"`
	Calls  int    `json:"calls"`  // of Set
	Killed string `json:"killed"` // the call at which it was killed; "": it was not
}

// ReadReport returns the lives that have ended.
func ReadReport(path string) (lives []Life, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	for d.More() {
		var l Life
		if err := d.Decode(&l); err != nil {
			return nil, fmt.Errorf("the tracer's report %s: %w", path, err)
		}
		lives = append(lives, l)
	}
	return lives, nil
}
