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
	dir   string
	name  string // where to die; "": nowhere
	hits  int    // how many more times to come by it, the last of them dying
	kills int    // that were done before this process

	mu   sync.Mutex
	seen map[string]bool
}

var read = sync.OnceValue(func() *plan {
	p := &plan{dir: os.Getenv("HOLDFAST_CRASH_DIR"), seen: map[string]bool{}}
	entries := strings.Split(os.Getenv("HOLDFAST_CRASH"), ",")
	for p.dir != "" {
		if _, err := os.Lstat(p.marker(p.kills)); err != nil {
			break
		}
		p.kills++
	}
	if p.dir == "" || p.kills >= len(entries) || entries[p.kills] == "" {
		return p
	}
	name, n, _ := strings.Cut(entries[p.kills], ":")
	hits, err := strconv.Atoi(n)
	if err != nil || hits < 1 {
		fmt.Fprintf(os.Stderr, "HOLDFAST_CRASH: %q is not name:n\n", entries[p.kills])
		os.Exit(2)
	}
	p.name, p.hits = name, hits
	return p
})

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
