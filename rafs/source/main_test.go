package source

import (
	"fmt"
	"net/http"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// TestMain fails the package when its tests leave goroutines or descriptors behind: readers that were closed, or whose
// context was cancelled, must hold nothing.
func TestMain(m *testing.M) {
	fds := countFDs()
	code := m.Run()
	if code == 0 {
		http.DefaultTransport.(*http.Transport).CloseIdleConnections() // the tests' own pushes
		code = waitForLeaks(fds)
	}
	os.Exit(code)
}

// waitForLeaks gives what is on its way out time to go, and reports what stays.
func waitForLeaks(fds int) int {
	var left string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		left = leakedGoroutines()
		if left == "" && countFDs() <= fds {
			return 0
		}
	}
	fmt.Fprintf(os.Stderr, "leak: %d descriptors before the tests, %d after; goroutines left:\n%s\n", fds, countFDs(), left)
	return 1
}

func countFDs() int {
	ents, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		panic(err)
	}
	n := 0
	for _, e := range ents {
		// The poller's descriptors come with the first connection and stay.
		if l, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(l, "anon_inode:") {
			n++
		}
	}
	return n
}

func leakedGoroutines() string {
	buf := make([]byte, 1<<20)
	var left []string
	for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(g, "leakedGoroutines") || strings.Contains(g, "created by testing.") ||
			strings.Contains(g, "os/signal") || strings.Contains(g, "go-events.(*Broadcaster)") {
			continue // this one, the runner's own, and the registry's, which has no way to stop them
		}
		left = append(left, g)
	}
	return strings.Join(left, "\n\n")
}
