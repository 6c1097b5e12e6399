package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"holdfast/tests/link"
)

// A drillReport is the part of drill.json that tests look at.
type drillReport struct {
	Verdict struct {
		OK      bool     `json:"ok"`
		Reasons []string `json:"reasons"`
	} `json:"verdict"`
	Reads struct {
		Count int64 `json:"count"`
	} `json:"reads"`
	Mounts []struct {
		Dir     string `json:"dir"`
		Compare string `json:"compared_with"`
	} `json:"mounts"`
	Faults []struct {
		Kind   string `json:"kind"`
		Before int    `json:"pid_before"`
		After  int    `json:"pid_after"`
	} `json:"faults"`
	Violations []any `json:"violations"`
}

// drill runs the drill, which has to be passed, and returns its report.
func (h *testHost) drill(flags ...string) (r drillReport) {
	h.t.Helper()
	dir := filepath.Join(h.Dir, "report")
	out, err := h.Run(append([]string{"drill", "--report", dir, "--work", h.Dir, "--json"}, flags...)...)
	if jsonErr := json.Unmarshal([]byte(out), &r); jsonErr != nil {
		h.t.Fatalf("%v: %v\nthe daemon's log:\n%s", err, jsonErr, h.Log())
	}
	if err != nil || !r.Verdict.OK {
		h.t.Errorf("%v: %v; the first violations: %v", err, r.Verdict.Reasons, r.Violations[:min(5, len(r.Violations))])
	}
	for _, name := range []string{"drill.json", "drill.html"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			h.t.Error(err)
		}
	}
	return r
}

func TestDrillThatKillsTheDaemonIsPassedAndLeavesNothingMounted(t *testing.T) {
	h := newHost(t)
	r := h.drill("--self", "--size", "16MiB", "--faults", "kill", "--kills", "6", "--interval", "300ms", "--readers", "8", "--seed", "1")
	if len(r.Faults) != 6 || r.Reads.Count == 0 {
		t.Errorf("%d faults and %d reads, want 6 and some", len(r.Faults), r.Reads.Count)
	}
	for i, f := range r.Faults {
		if f.Kind != "kill" || f.Before == f.After || i > 0 && f.Before != r.Faults[i-1].After {
			t.Errorf("fault %d: %+v: want another process after each kill, and no other in between", i+1, f)
		}
	}
	if mounts := h.Mounts(); len(mounts) > 0 {
		t.Errorf("still mounted: %v", mounts)
	}
	if left, err := filepath.Glob(filepath.Join(h.Dir, "holdfast-drill-*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestDrillOnAMountThatWasThereComparesItsChunkDigests(t *testing.T) {
	h := newHost(t)
	_, image, _ := counted(t, h, link.Config{Rate: 4 << 20}, 4)
	mnt := h.mount(image, "--prefetch=off")
	r := h.drill("--mount", mnt, "--faults", "freeze,source-cut", "--hold", "200ms", "--kills", "3", "--interval", "100ms", "--readers", "4")
	if len(r.Mounts) != 1 || r.Mounts[0].Dir != mnt || r.Mounts[0].Compare != "chunk digests" {
		t.Errorf("mounts %+v", r.Mounts)
	}
	kinds := []string{}
	for _, f := range r.Faults {
		kinds = append(kinds, f.Kind)
		if f.Before != f.After {
			t.Errorf("a frozen daemon is another one afterwards: %+v", f)
		}
	}
	if !slices.Equal(kinds, []string{"freeze", "freeze", "freeze"}) {
		t.Errorf("faults %v, want three times freeze: the source is not the drill's", kinds)
	}
	if mounts := h.Mounts(); !slices.Equal(mounts, []string{mnt}) {
		t.Errorf("mounted afterwards: %v, want %s", mounts, mnt)
	}
}
