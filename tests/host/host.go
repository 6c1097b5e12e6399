// Package host runs one holdfast installation as a user would: a keeper, a daemon under it, and the commands that talk
// to it, all with directories of their own, so that several live side by side. Tests, benchmarks and the demo use it.
package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/daemon"
)

// A Host is a running keeper and daemon.
type Host struct {
	Dir  string // holds root, run and serve.log
	bin  string
	keep *exec.Cmd
	done chan error
}

// Start starts a keeper and a daemon (with more flags for serve) of the holdfast binary bin, and waits until the daemon
// answers, 60 s at most.
func Start(bin, dir string, serve ...string) (*Host, error) {
	return StartWith(Options{Bin: bin, Dir: dir, Serve: serve})
}

// Options say what a host is made of. Bin and Dir are required.
type Options struct {
	Bin, Dir string
	Serve    []string // more flags for serve
	Keep     []string // more flags for keep
	Env      []string // more of the keeper's and the daemon's environment
	Keeper   []string // a command line that runs the one which follows it: put before the keeper's
	Daemon   []string // likewise, before the daemon's
}

// StartWith is Start with more to say.
func StartWith(o Options) (*Host, error) {
	h := &Host{Dir: o.Dir, bin: o.Bin, done: make(chan error, 1)}
	out, err := os.OpenFile(h.LogPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	args := slices.Concat(o.Keeper, []string{o.Bin}, h.global("keep"), o.Keep, []string{"--"}, o.Daemon, []string{o.Bin}, h.global("serve"), o.Serve)
	h.keep = exec.Command(args[0], args[1:]...)
	h.keep.Stdout, h.keep.Stderr = out, out
	h.keep.Env = append(os.Environ(), o.Env...)
	if err := h.keep.Start(); err != nil {
		return nil, err
	}
	go func() { h.done <- h.keep.Wait() }() // ends with the keeper; Stop waits
	if err := h.waitUp(); err != nil {
		return nil, errors.Join(err, h.Stop())
	}
	return h, nil
}

func (h *Host) global(args ...string) []string {
	return append([]string{"--root", filepath.Join(h.Dir, "root"), "--run", filepath.Join(h.Dir, "run")}, args...)
}

// LogPath is where the keeper and the daemon log.
func (h *Host) LogPath() string { return filepath.Join(h.Dir, "serve.log") }

// Client returns a client of the daemon, to be closed.
func (h *Host) Client() *daemon.Client {
	return daemon.NewClient(filepath.Join(h.Dir, "run", "api.sock"))
}

func (h *Host) waitUp() error {
	client := h.Client()
	defer client.Close()
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if _, err := client.Status(context.Background()); err == nil {
			return nil
		}
		select {
		case err := <-h.done:
			h.done <- err
			return fmt.Errorf("the keeper ended (%v):\n%s", err, h.Log())
		default:
		}
	}
	return fmt.Errorf("the daemon does not answer within 60 s:\n%s", h.Log())
}

// KillKeeper kills the keeper and waits for its end; the daemon goes on.
func (h *Host) KillKeeper() error {
	if err := h.keep.Process.Kill(); err != nil {
		return err
	}
	<-h.done
	return nil
}

// Restart starts a keeper and a daemon anew, in the place of ones that have ended, and waits until the daemon answers.
func (h *Host) Restart(serve ...string) error {
	next, err := Start(h.bin, h.Dir, serve...)
	if err != nil {
		return err
	}
	*h = *next
	return nil
}

// Stop unmounts what is mounted below Dir and stops the daemon and the keeper.
func (h *Host) Stop() error {
	var errs []error
	for _, m := range h.Mounts() {
		if _, err := h.Run("umount", m); err != nil {
			errs = append(errs, fmt.Errorf("umount %s: %w", m, err), unix.Unmount(m, unix.MNT_DETACH))
		}
	}
	if err := h.keep.Process.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		errs = append(errs, err)
	}
	select {
	case err := <-h.done:
		if err != nil {
			errs = append(errs, fmt.Errorf("keeper: %w", err))
		}
	case <-time.After(60 * time.Second):
		errs = append(errs, errors.New("the keeper does not stop within 60 s"), h.keep.Process.Kill())
		<-h.done
	}
	if len(errs) > 0 {
		errs = append(errs, fmt.Errorf("the daemon's log:\n%s", h.Log()))
	}
	return errors.Join(errs...)
}

// Mounts lists the EROFS mounts below Dir.
func (h *Host) Mounts() []string {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) > 4 && strings.HasPrefix(f[4], h.Dir+"/") && strings.Contains(line, " - erofs ") {
			out = append(out, f[4])
		}
	}
	return out
}

// Log is the end of what keeper and daemon logged.
func (h *Host) Log() string {
	b, _ := os.ReadFile(h.LogPath())
	return string(b[max(0, len(b)-64000):])
}

// KeeperPID is the keeper's process id.
func (h *Host) KeeperPID() int { return h.keep.Process.Pid }

// Run runs a holdfast command against this host and returns what it printed to its standard output. The error ends with
// what it printed to its standard error.
func (h *Host) Run(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, h.bin, h.global(args...)...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("holdfast %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// Status is the part of `holdfast status --json` that tests look at.
type Status struct {
	PID     int     `json:"pid"`
	Engine  string  `json:"engine"`
	Pending int     `json:"pending"`
	Fetched int64   `json:"fetched"` // bytes
	Copied  int64   `json:"copied"`  // bytes
	Mounts  []Mount `json:"mounts"`
}

// A Mount is an image on a directory.
type Mount struct {
	Dir      string `json:"dir"`
	Complete bool   `json:"complete"`
}

// Status asks the daemon.
func (h *Host) Status() (Status, error) {
	var s Status
	out, err := h.Run("status", "--json")
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal([]byte(out), &s)
}

// WaitComplete waits until every object of the image on dir is complete, 3 minutes at most.
func (h *Host) WaitComplete(dir string) error {
	for deadline := time.Now().Add(3 * time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		s, err := h.Status()
		if err != nil {
			return err
		}
		for _, m := range s.Mounts {
			if m.Dir == dir && m.Complete {
				return nil
			}
		}
	}
	return fmt.Errorf("%s is not complete after 3 minutes:\n%s", dir, h.Log())
}

// Doctor returns nil where this kernel offers an engine for a cache below dir, else why not.
func Doctor(bin, dir string) error {
	out, err := exec.Command(bin, "--root", dir, "doctor").CombinedOutput()
	if err != nil {
		return errors.New(strings.TrimSpace(string(out)))
	}
	return nil
}

// WorkDir makes a directory on a file system that an engine can keep a cache on: the cache disk in the test VM
// (HOLDFAST_VM is set there), /var/tmp elsewhere.
func WorkDir() (string, error) {
	base := "/var/tmp"
	if os.Getenv("HOLDFAST_VM") != "" {
		base = "/cache"
	}
	return os.MkdirTemp(base, "holdfast-")
}

// DropCaches makes the kernel read data again, from the cache files or from the daemon.
func DropCaches() error {
	unix.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}
