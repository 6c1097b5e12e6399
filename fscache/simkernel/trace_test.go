package simkernel_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/fscache/internal/trace"
	"holdfast/fscache/simkernel"
)

// TestTheModelDoesWhatKernelsDid replays what kernels were recorded to do. A record is SCRIPT@linux-RELEASE.trace; the engines' tests
// of the same name make them.
func TestTheModelDoesWhatKernelsDid(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.trace")
	if err != nil || len(paths) == 0 {
		t.Fatal("no records: ", err)
	}
	for _, path := range paths {
		t.Run(filepath.Base(path), func(t *testing.T) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			mode := simkernel.Cachefiles
			switch script, release, _ := strings.Cut(filepath.Base(path), "@linux-"); {
			case script == "fanotify":
				mode = simkernel.Fanotify
			case strings.HasPrefix(release, "6.1."): // the test machine's has no restore
				mode = simkernel.CachefilesWithoutRestore
			}
			trace.Replay(t, trace.Parse(string(b)), simkernel.NewModel(mode))
		})
	}
}
