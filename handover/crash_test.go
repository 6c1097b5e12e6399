//go:build crashpoints

package handover

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// crashPoints lists the names in this package's source that begin with prefix.
func crashPoints(t *testing.T, prefix string) []string {
	t.Helper()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`crash\.Point\("([^"]+)"\)`).FindAllSubmatch(b, -1) {
			if name := string(m[1]); strings.HasPrefix(name, prefix) && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names
}

func TestUpgradeSurvivesDeathAtEveryPoint(t *testing.T) {
	// What must happen beside, for points that a good upgrade does not come by.
	beside := map[string]string{
		"handover.give.before-kill":    "new commits",
		"handover.give.before-resume":  "new commits",
		"handover.take.before-inherit": "old answered-1",
	}
	names := slices.Concat(crashPoints(t, "handover.start."), crashPoints(t, "handover.give."), crashPoints(t, "handover.take."))
	if len(names) < 20 {
		t.Fatalf("only %d points: %q", len(names), names)
	}
	for _, name := range names {
		for _, hit := range []string{"1", "2"} {
			t.Run(name+":"+hit, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				lines, _ := runUpgrade(t, "HOLDFAST_CRASH="+name+":"+hit, "HOLDFAST_CRASH_DIR="+dir, "DIE_AT="+beside[name])
				if _, err := os.Stat(filepath.Join(dir, "killed-0")); err != nil && hit == "1" {
					t.Error("nothing was killed there")
				}
				oldLived := slices.Contains(lines, "old serves") || slices.Contains(lines, "old leaves")
				newServed := slices.Contains(lines, "new ends-true")
				if (oldLived || newServed) && !answeredAll(lines) {
					t.Error("requests were lost")
				}
			})
		}
	}
}
