package drill

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/daemon"
	"holdfast/daemon/drill/inject"
)

// A site is what a drill works on: a daemon, who starts it again, and the source of the mounts where that is the drill's own.
type site struct {
	client     *daemon.Client
	status     daemon.Status // at the start
	supervisor supervisor
	source     *registry // nil: the mounts' own
	diskFull   bool      // may fill the cache's file system whatever else is on it
	hold       time.Duration
	back       time.Duration // how long to wait for a daemon to answer again
	holds      *holds
	now        func() time.Duration
}

// A supervisor starts the daemon again: systemd, by its unit, or a keeper, by its process.
type supervisor struct {
	unit   string
	keeper int
}

func (s supervisor) String() string {
	switch {
	case s.unit != "":
		return "systemd, " + s.unit
	case s == newKeeper:
		return "its keeper"
	case s.keeper != 0:
		return "holdfast keep, process " + strconv.Itoa(s.keeper)
	}
	return "unknown"
}

// newKeeper is the keeper of a daemon that is not started yet.
var newKeeper = supervisor{keeper: -1}

// process names the daemon's process, as it was at the start.
func (s *site) process() string {
	if s.status.PID == 0 {
		return "the daemon"
	}
	return "process " + strconv.Itoa(s.status.PID)
}

// newSite asks the daemon who it is.
func newSite(ctx context.Context, client *daemon.Client) (*site, error) {
	s := &site{client: client}
	var err error
	if s.status, err = client.Status(ctx); err != nil {
		return nil, err
	}
	if s.status.ReadDeadline == 0 { // a release that does not say
		s.status.ReadDeadline = daemon.DefaultReadDeadline
	}
	s.supervisor = findSupervisor(s.status.PID)
	return s, nil
}

// findSupervisor looks for a keeper among a process's ancestors, then for its systemd unit.
func findSupervisor(pid int) supervisor {
	for up := pid; up > 1; {
		ppid, command, err := inject.Parent(up)
		if err != nil {
			break
		}
		if slices.Contains(command, "keep") && slices.Contains(command, "serve") {
			return supervisor{keeper: ppid}
		}
		up = ppid
	}
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return supervisor{}
	}
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return supervisor{}
	}
	return supervisor{unit: unitOf(string(b))}
}

// unitOf finds a service's name in the format of /proc/PID/cgroup (cgroups(7)): "id:controllers:path", of which systemd's hierarchy is the one with no
// controllers or named systemd.
func unitOf(cgroups string) string {
	for line := range strings.Lines(cgroups) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) == 3 && (f[1] == "" || f[1] == "name=systemd") {
			if unit := filepath.Base(f[2]); strings.HasSuffix(unit, ".service") {
				return unit
			}
		}
	}
	return ""
}

// pollEvery is how often the drill looks whether something has come about.
const pollEvery = 2 * time.Millisecond

// askTime is how long one question to the daemon may take: it may be frozen.
const askTime = 2 * time.Second

// ask asks the daemon for its status, without waiting long.
func (s *site) ask(ctx context.Context) (daemon.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	return s.client.Status(ctx)
}

var errNotBack = errors.New("no daemon answered again")

// answers waits until a daemon answers, another one than process not.
func (s *site) answers(ctx context.Context, not int) (daemon.Status, error) {
	var last error
	for end := time.Now().Add(s.back); time.Now().Before(end); {
		s.client.Close() // a connection that is kept leads to the old process for as long as that lives
		st, err := s.ask(ctx)
		if err == nil && st.PID != not {
			return st, nil
		}
		if err == nil {
			err = fmt.Errorf("process %d still answers", not)
		}
		last = err
		select {
		case <-ctx.Done():
			return st, context.Cause(ctx)
		case <-time.After(pollEvery):
		}
	}
	return daemon.Status{}, fmt.Errorf("%w within %v: %w", errNotBack, s.back, last)
}

// gone waits until a process has ended.
func (s *site) gone(ctx context.Context, p *inject.Process) error {
	for end := time.Now().Add(s.back); time.Now().Before(end); {
		if p.Gone() {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pollEvery):
		}
	}
	return fmt.Errorf("process %d did not end within %v", p.PID, s.back)
}

// cacheDir is a directory on the file system that the cache is on.
func (s *site) cacheDir() string {
	dir := filepath.Join(s.status.Root, "cache")
	if _, err := os.Stat(dir); err != nil {
		return s.status.Root
	}
	return dir
}

// dedicated reports whether the file system of the cache holds nothing but what is the daemon's.
func (s *site) dedicated() bool {
	return inject.IsMountPoint(s.status.Root) || inject.IsMountPoint(filepath.Join(s.status.Root, "cache"))
}
