package kill

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync"
)

// lacking remembers which commands a binary does not have.
var lacking sync.Map // "bin command"

// optional runs a command that this release of holdfast may not have, and says whether it has. A command that is there and is
// refused is an error.
func (r *rig) optional(bin string, args ...string) (bool, error) {
	key := bin + " " + args[0]
	if _, ok := lacking.Load(key); ok {
		return false, nil
	}
	out, err := r.Run(args...)
	if err != nil && strings.Contains(err.Error(), "unknown command") {
		lacking.Store(key, true)
		return false, nil
	}
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return true, err
}

// refused is the other half of O2: a daemon that denies a read which a dead one left is not noticed by the reader, whom the kernel gives a second
// attempt (docs/kernel.md), and has lost a request all the same.
func (r *rig) refused() error {
	b, err := os.ReadFile(r.LogPath())
	if err != nil {
		return err
	}
	for line := range bytes.Lines(b) {
		var l struct {
			Msg    string
			Denied int
		}
		if json.Unmarshal(line, &l) == nil && (l.Denied > 0 || strings.HasPrefix(l.Msg, "denied a reader")) {
			return fmt.Errorf("O2: a reader was denied: %s", line)
		}
	}
	return nil
}

// check is O4: what is on record, what the supervisor holds and what the kernel says agree, at the latest a while after the last read:
// a daemon lets go of what has become complete in its own time.
func (r *rig) check() error {
	var last error
	err := r.until("what is on record is what is held", func() bool {
		_, last = r.optional(r.bin, "state", "check")
		return last == nil
	})
	if err != nil {
		return fmt.Errorf("O4: %w: %w", err, last)
	}
	return nil
}
