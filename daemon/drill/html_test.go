package drill

import (
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestAxesMapTheirEndsAndCutWhatIsOutside(t *testing.T) {
	tests := []struct {
		a    axis
		v    float64
		want float64
	}{
		{axis{lo: 0, hi: 10, from: 100, to: 200}, 5, 150},
		{axis{lo: 0, hi: 10, from: 200, to: 100}, 10, 100},
		{axis{lo: 0, hi: 10, from: 100, to: 200}, -1, 100},
		{axis{lo: 0, hi: 10, from: 100, to: 200}, 99, 200},
		{axis{lo: 1, hi: 1000, from: 0, to: 300, log: true}, 10, 100},
		{axis{lo: 1, hi: 1000, from: 300, to: 0, log: true}, 1000, 0},
		{axis{lo: 1, hi: 1000, from: 0, to: 300, log: true}, 0, 0},
	}
	for _, tt := range tests {
		if got := tt.a.at(tt.v); math.Abs(got-tt.want) > 1e-9 {
			t.Errorf("%+v at %v: got %v, want %v", tt.a, tt.v, got, tt.want)
		}
	}
}

func TestLogarithmicAxesSpanWholeDecades(t *testing.T) {
	tests := []struct{ lo, hi, wantLo, wantHi float64 }{
		{1, 1000, 1, 1000}, {3, 700, 1, 1000}, {100, 100, 100, 1000}, {99, 1001, 10, 10000},
	}
	for _, tt := range tests {
		a := logAxis(tt.lo, tt.hi, 0, 1)
		n := len(a.decades())
		if math.Abs(a.lo-tt.wantLo) > 1e-6 || math.Abs(a.hi-tt.wantHi) > 1e-6 || n != int(math.Round(math.Log10(a.hi/a.lo)))+1 {
			t.Errorf("%v to %v: got %v to %v with %d decades", tt.lo, tt.hi, a.lo, a.hi, n)
		}
	}
}

func TestTimeAxisNeverHasMoreThanADozenMarks(t *testing.T) {
	for _, span := range []time.Duration{50 * time.Millisecond, 3 * time.Second, time.Minute, 10 * time.Minute, 7 * time.Hour, 72 * time.Hour} {
		if m := marks(span); len(m) > 13 || len(m) < 1 || m[0] != 0 || m[len(m)-1] > span {
			t.Errorf("%v: %v", span, m)
		}
	}
}

func TestJoinedBarsHoldEveryRead(t *testing.T) {
	var h histogram
	for d := time.Microsecond; d < time.Minute; d = d*11/10 + time.Microsecond {
		h.add(d)
	}
	var sum int64
	bars := group(h.buckets())
	for i, b := range bars {
		sum += b.Count
		if i > 0 && b.LE <= bars[i-1].LE {
			t.Errorf("bar %d ends at %v, the one before at %v", i, b.LE, bars[i-1].LE)
		}
	}
	if sum != h.n {
		t.Errorf("%d reads in the bars, want %d", sum, h.n)
	}
}

func sample() *Report {
	r := &Report{
		Schema: Schema, Started: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Duration: time.Minute,
		Options:     Settings{Faults: []Kind{Kill, OOM}, StallBound: 30 * time.Second, Readers: 2},
		Environment: Environment{Host: "<script>alert(1)</script>", Kernel: "6.18"},
		Mounts:      []Mounted{{Dir: "/mnt/\"x", Image: "oci:a:b", Compare: "generator", Files: 1}},
		Reads:       Reads{Count: 1234567, Max: time.Second, P50: time.Millisecond, Buckets: []Bucket{{time.Millisecond, 7}}},
		Timeline:    TimelineReport{Bin: time.Second, Stall: []time.Duration{0, time.Second, time.Millisecond}, Reads: []int64{1, 2, 3}},
		Faults:      []Fault{{Number: 1, Kind: Kill, At: time.Second, Recovery: time.Second, Violated: Violated{Errors: 2}, Before: 5, After: 6}},
		Kinds:       []KindTotal{{Kind: Kill, Count: 1, Violated: Violated{Errors: 2}}, {Kind: OOM, NotDone: "no cgroups"}},
		Violations:  []Violation{{Invariant: "I1", What: "EIO", Path: "/mnt/<b>", Fault: 1}},
	}
	r.verdict()
	return r
}

func TestPageIsOneFileThatNeedsNothingElseAndEscapesWhatItShows(t *testing.T) {
	b, err := sample().HTML()
	if err != nil {
		t.Fatal(err)
	}
	s := string(b)
	for _, bad := range []string{"<script", "http:", "https:", "src=", "<link", "@import", "url(", "NaN", "Inf", "ZgotmplZ", "<b>\n"} {
		if strings.Contains(s, bad) {
			t.Errorf("the page has %q", bad)
		}
	}
	for _, want := range []string{"not passed", "not done: no cgroups", "1\u202f234\u202f567", `class="fault k-kill"`, "I1: 2 reads failed", "/mnt/&lt;b&gt;", "prefers-color-scheme: dark"} {
		if !strings.Contains(s, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
}

func TestEmptyReportCanBeDrawn(t *testing.T) {
	b, err := (&Report{}).HTML()
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"NaN", "Inf", "%!"} {
		if strings.Contains(string(b), bad) {
			t.Errorf("the page has %q", bad)
		}
	}
}

func TestReportIsReadBackAsItWasWritten(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	r := sample()
	if err := r.Write(dir); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "drill.json"))
	if err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if back.Schema != "holdfast.drill/1" || back.Verdict.OK || back.Faults[0] != r.Faults[0] || back.Duration != time.Minute {
		t.Errorf("got %+v", back)
	}
	if _, err := os.Stat(filepath.Join(dir, "drill.html")); err != nil {
		t.Error(err)
	}
}
