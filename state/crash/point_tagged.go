//go:build crashpoints

package crash

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// A plan is what the environment says.
type plan struct {
	dir     string
	entries []string

	mu    sync.Mutex
	kills int    // that were done, by this process's predecessors, or by another one beside it
	name  string // where to die; "": nowhere
	hits  int    // how many more times to come by it, the last of them dying
	seen  map[string]bool
}

var read = sync.OnceValue(func() *plan {
	p := &plan{dir: os.Getenv("HOLDFAST_CRASH_DIR"), entries: strings.Split(os.Getenv("HOLDFAST_CRASH"), ","), seen: map[string]bool{}}
	p.take()
	return p
})

// take takes the entry that follows the kills which were done.
func (p *plan) take() {
	p.name = ""
	if p.dir == "" {
		return
	}
	for p.done() {
		p.kills++
	}
	if p.kills >= len(p.entries) || p.entries[p.kills] == "" {
		return
	}
	name, n, _ := strings.Cut(p.entries[p.kills], ":")
	hits, err := strconv.Atoi(n)
	if err != nil || hits < 1 {
		fmt.Fprintf(os.Stderr, "HOLDFAST_CRASH: %q is not name:n\n", p.entries[p.kills])
		os.Exit(2)
	}
	p.name, p.hits = name, hits
}

// done reports whether somebody did the kill that is this plan's next.
func (p *plan) done() bool {
	_, err := os.Lstat(p.marker(p.kills))
	return err == nil
}

func (p *plan) marker(n int) string { return filepath.Join(p.dir, "killed-"+strconv.Itoa(n)) }

// Point is a step at which tests kill the process.
func Point(name string) {
	p := read()
	if p.dir == "" {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.seen[name] {
		p.seen[name] = true
		mark(filepath.Join(p.dir, "seen-"+name))
	}
	if p.name != "" && p.done() { // the other of the two in a handover
		p.take()
	}
	if name != p.name {
		return
	}
	if p.hits--; p.hits > 0 {
		return
	}
	mark(p.marker(p.kills))
	// The lock is never given back: nobody gets past a point while the process dies.
	_ = syscall.Kill(syscall.Getpid(), syscall.SIGKILL)
	select {}
}

func mark(path string) {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		fmt.Fprintln(os.Stderr, "crash point:", err)
		os.Exit(2)
	}
}
