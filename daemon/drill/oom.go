package drill

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"holdfast/daemon/drill/inject"
)

// oomLimit is what a process may take before the kernel kills it, from when it is moved to its cgroup on: what it has already is not counted there.
const oomLimit = 64 << 10

// oomPatience is how long a process may live on so little.
const oomPatience = 10 * time.Second

// A memoryGroup is a memory cgroup, of either version, for one process.
type memoryGroup struct {
	dir   string
	limit string // the file that holds the limit
	home  string // where its process was before
}

// memoryRoots are where memory cgroups are, with the name of the limit's file.
var memoryRoots = []struct{ dir, limit, controllers string }{
	{"/sys/fs/cgroup", "memory.max", "0::"},
	{"/sys/fs/cgroup/memory", "memory.limit_in_bytes", ":memory:"},
}

func cannotOOM(*site) error {
	_, err := memoryRoot()
	return err
}

func memoryRoot() (int, error) {
	for i, r := range memoryRoots {
		switch i {
		case 0:
			if b, err := os.ReadFile(filepath.Join(r.dir, "cgroup.subtree_control")); err != nil || !strings.Contains(string(b), "memory") {
				continue
			}
		default:
			if _, err := os.Stat(filepath.Join(r.dir, r.limit)); err != nil {
				continue
			}
		}
		return i, nil
	}
	return 0, errors.New("no memory cgroup can be made: neither does /sys/fs/cgroup/cgroup.subtree_control list memory nor is there /sys/fs/cgroup/memory. " +
		"The kernel's own choice of whom to kill when all memory is used up is not tried: it may choose another process")
}

// newMemoryGroup makes a cgroup and moves a process there. end moves it back, if it lives, and removes the cgroup.
func newMemoryGroup(pid int) (*memoryGroup, error) {
	i, err := memoryRoot()
	if err != nil {
		return nil, err
	}
	r := memoryRoots[i]
	home, err := cgroupOf(pid, r.controllers)
	if err != nil {
		return nil, err
	}
	g := &memoryGroup{
		dir: filepath.Join(r.dir, "holdfast-drill-"+strconv.Itoa(os.Getpid())), home: filepath.Join(r.dir, home), limit: r.limit,
	}
	if err := os.Mkdir(g.dir, 0o755); err != nil {
		return nil, fmt.Errorf("make a memory cgroup: %w", err)
	}
	err = errors.Join(g.write(g.limit, strconv.Itoa(oomLimit)), g.write("cgroup.procs", strconv.Itoa(pid)))
	if err != nil {
		return nil, errors.Join(err, os.Remove(g.dir))
	}
	_ = g.write("memory.swap.max", "0") // version 2, where there is swap
	return g, nil
}

// cgroupOf finds a process's place in a hierarchy.
func cgroupOf(pid int, controllers string) (string, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return "", fmt.Errorf("find the cgroup of process %d: %w", pid, err)
	}
	for line := range strings.Lines(string(b)) {
		if _, path, ok := strings.Cut(strings.TrimSpace(line), controllers); ok {
			return path, nil
		}
	}
	return "", fmt.Errorf("process %d is in no memory cgroup", pid)
}

func (g *memoryGroup) write(file, value string) error {
	if err := os.WriteFile(filepath.Join(g.dir, file), []byte(value), 0); err != nil {
		return fmt.Errorf("set up a memory cgroup: %w", err)
	}
	return nil
}

// kills returns how many processes of the cgroup the kernel has killed for want of memory.
func (g *memoryGroup) kills() string {
	for _, file := range []string{"memory.events", "memory.oom_control"} {
		b, _ := os.ReadFile(filepath.Join(g.dir, file))
		for line := range strings.Lines(string(b)) {
			if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
				return strings.TrimSpace(n)
			}
		}
	}
	return "?"
}

func (g *memoryGroup) end(p *inject.Process) error {
	if !p.Gone() {
		if err := os.WriteFile(filepath.Join(g.home, "cgroup.procs"), []byte(strconv.Itoa(p.PID)), 0); err != nil && !p.Gone() {
			return fmt.Errorf("move process %d out of its cgroup again: %w", p.PID, err)
		}
	}
	var err error
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(pollEvery) {
		if err = os.Remove(g.dir); err == nil { // EBUSY until its parent has taken note of the death
			return nil
		}
	}
	return fmt.Errorf("remove a cgroup: %w", err)
}

func outOfMemory(c *call) (err error) {
	p, err := inject.Find(c.pid)
	if err != nil {
		return err
	}
	defer p.Release()
	g, err := newMemoryGroup(c.pid)
	if err != nil {
		return notDone{err}
	}
	defer func() { err = errors.Join(err, g.end(p)) }()
	for end := time.Now().Add(oomPatience); time.Now().Before(end); time.Sleep(pollEvery) {
		if p.Gone() {
			c.ended = c.now()
			c.detail = "killed for want of memory: " + g.kills()
			return nil
		}
		ctx, cancel := context.WithTimeout(c.ctx, 10*pollEvery)
		_, _ = c.client.Status(ctx) // so that it needs some
		cancel()
	}
	c.ended = c.now()
	return notDone{fmt.Errorf("the daemon lived on for %v with %d KiB of memory more", oomPatience, oomLimit>>10)}
}
