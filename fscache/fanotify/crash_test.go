//go:build crashpoints

package fanotify

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"sync/atomic"
	"testing"
	"time"
)

// elsewhere are the points that no victim of these tests comes by: they are those of mounts and upgrades.
var elsewhere = map[string]bool{
	"fanotify.abandon.before-detach": true,
	"fanotify.abandon.before-unlink": true,
	"fanotify.expect.before-release": true,
	"fanotify.add.before-hold":       true, // victims have no holder
	"fanotify.drop.before-drop":      true,
}

// points reads the names of the crash points from the source.
func points(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`crash\.Point\("([^"]+)"\)`).FindAllSubmatch(text, -1) {
			names = append(names, string(m[1]))
		}
	}
	return names
}

// TestDeathAtEveryStepIsNotNoticed kills a process at each named step, the first, second and ninth time it comes by, and then the one that takes
// over at its first answer for it.
func TestDeathAtEveryStepIsNotNoticed(t *testing.T) {
	names := points(t)
	if len(names) < 20 {
		t.Fatalf("only %d points found: %v", len(names), names)
	}
	for _, name := range names {
		if elsewhere[name] {
			continue
		}
		for _, hit := range []int{1, 2, 9} {
			t.Run(fmt.Sprintf("%s/%d", name, hit), func(t *testing.T) { dieAt(t, name, hit) })
		}
	}
}

func dieAt(t *testing.T, name string, hit int) {
	l := newLife(t)
	// Somebody else dies first with some events, so that there is something to take over.
	d := l.start(4)
	d.expect("ready")
	var stop atomic.Bool
	_, wait := l.readers(8, &stop)
	d.expect("holding")
	d.kill()

	dir := t.TempDir()
	plan := fmt.Sprintf("%s:%d,fanotify.orphan.before-answer:1", name, hit)
	env := []string{"HOLDFAST_CRASH_DIR=" + dir, "HOLDFAST_CRASH=" + plan}
	killed := func(n int) bool {
		_, err := os.Stat(filepath.Join(dir, fmt.Sprintf("killed-%d", n)))
		return err == nil
	}
	for lives := 0; lives < 3 && !killed(1); lives++ {
		d := l.start(0, env...)
		ended := make(chan struct{})
		go func() { // ends with the process
			_, _ = d.cmd.Process.Wait()
			close(ended)
		}()
		// Some points are come by once in a life, and never again: the process then lives on.
		select {
		case <-ended:
		case <-time.After(700 * time.Millisecond):
			_ = d.cmd.Process.Kill()
			<-ended
		}
	}
	d = l.start(0)
	d.expect("ready")
	stop.Store(true)
	wait()
	if hit == 1 && !killed(0) {
		t.Errorf("no process came by %s", name)
	}
}
