package kill

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"time"
)

// A keeperLog follows what the keeper says of the daemon.
type keeperLog struct {
	path string
	off  int64
	rest []byte

	starts  int           // how many daemons there were, those that took over from another included
	pid     int           // of the last
	running bool          // it has not ended
	ready   bool          // it has said so
	again   time.Duration // else: in what time it is started again
	pushed  bool          // and it was told to do that now
	staying bool          // it was stopped, and is not started again
	idles   int           // how often it ended for having nothing to do
}

// update reads what is new.
func (k *keeperLog) update() error {
	f, err := os.Open(k.path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Seek(k.off, io.SeekStart); err != nil {
		return err
	}
	b, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	k.off += int64(len(b))
	k.rest = append(k.rest, b...)
	for {
		line, rest, ok := bytes.Cut(k.rest, []byte("\n"))
		if !ok {
			return nil
		}
		k.rest = rest
		k.line(line)
	}
}

func (k *keeperLog) line(line []byte) {
	var l struct {
		Logger, Msg string
		PID         int
		Again       string `json:"start again in"`
	}
	if json.Unmarshal(line, &l) != nil || l.Logger != "keep" {
		return
	}
	switch l.Msg {
	case "the command was started":
		k.starts++
		k.pid, k.running, k.ready, k.staying, k.pushed = l.PID, true, false, false, false
	case "the command has handed over to another process":
		k.starts++
		k.pid, k.running, k.ready = l.PID, true, true
	case "the command is idle: it is started again when it is wanted":
		k.running, k.ready, k.again = false, false, 0
		k.idles++
	case "the command is ready":
		k.ready = true
	case "the command ended by itself", "the command cannot be started":
		k.running, k.ready, k.pushed = false, false, false
		k.again, _ = time.ParseDuration(l.Again)
	case "the command was stopped":
		k.running, k.ready, k.staying = false, false, true
	}
}
