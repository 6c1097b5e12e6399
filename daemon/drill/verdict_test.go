package drill

import (
	"strings"
	"testing"
	"time"
)

const sec = time.Second

func TestWhatIsAViolation(t *testing.T) {
	cut := hold{SourceCut, 10 * sec, 60 * sec}   // longer than the deadline below
	brief := hold{SourceCut, 10 * sec, 20 * sec} // shorter
	open := hold{kind: SourceCut, from: 10 * sec}
	full := hold{DiskFull, 10 * sec, 20 * sec}
	frozen := hold{Freeze, 10 * sec, 60 * sec}
	none := Violated{}
	failed, wrong, over := Violated{Errors: 1}, Violated{Wrong: 1}, Violated{OverBound: 1}
	tests := []struct {
		name  string
		holds []hold
		o     outcome
		want  Violated
	}{
		{"a good read", nil, outcome{start: 1 * sec, end: 2 * sec}, none},
		{"a wrong byte", nil, outcome{wrong: true}, wrong},
		{"a wrong byte while the disk is full", []hold{full}, outcome{start: 11 * sec, end: 12 * sec, wrong: true}, wrong},
		{"a wrong byte while the source is cut", []hold{cut}, outcome{start: 11 * sec, end: 55 * sec, wrong: true, several: true}, wrong},
		{"a wrong byte before an error that is excused", []hold{full}, outcome{start: 11 * sec, end: 12 * sec, errno: "ENOSPC", wrong: true}, wrong},
		{"an error", nil, outcome{errno: "EIO"}, failed},
		{"an error while the daemon is frozen", []hold{frozen}, outcome{start: 11 * sec, end: 12 * sec, errno: "EIO"}, failed},
		{"EIO of a cut source after the deadline", []hold{cut}, outcome{start: 20 * sec, end: 50 * sec, errno: "EIO"}, none},
		{"EIO of a cut source before the deadline", []hold{cut}, outcome{start: 11 * sec, end: 39 * sec, errno: "EIO"}, failed},
		{"EIO of a source cut for less than the deadline", []hold{brief}, outcome{start: 11 * sec, end: 41 * sec, errno: "EIO"}, Violated{Errors: 1}},
		{"EIO of a read that began when the source was back", []hold{cut}, outcome{start: 61 * sec, end: 62 * sec, errno: "EIO"}, failed},
		{"EIO while the source is cut still", []hold{open}, outcome{start: 11 * sec, end: 41 * sec, errno: "EIO"}, none},
		{"EPERM of a cut source after the deadline", []hold{cut}, outcome{start: 20 * sec, end: 50 * sec, errno: "EPERM"}, failed},
		{"ENOSPC of a full disk", []hold{full}, outcome{start: 11 * sec, end: 12 * sec, errno: "ENOSPC"}, none},
		{"EIO of a full disk", []hold{full}, outcome{start: 19 * sec, end: 21 * sec, errno: "EIO"}, none},
		{"EPERM of a full disk", []hold{full}, outcome{start: 11 * sec, end: 12 * sec, errno: "EPERM"}, failed},
		{"ENOSPC after the disk was full", []hold{full}, outcome{start: 21 * sec, end: 22 * sec, errno: "ENOSPC"}, failed},
		{"ENOSPC before the disk was full", []hold{full}, outcome{start: 8 * sec, end: 9 * sec, errno: "ENOSPC"}, failed},
		{"a stall over the bound", nil, outcome{start: 1 * sec, end: 42 * sec}, over},
		{"a stall at the bound", nil, outcome{start: 1 * sec, end: 31 * sec}, none},
		{"a stall over the bound for which the daemon was frozen", []hold{frozen}, outcome{start: 11 * sec, end: 61 * sec}, none},
		{"a stall over the bound beyond a freeze", []hold{frozen}, outcome{start: 55 * sec, end: 91 * sec}, over},
		{"a failed read over the bound", nil, outcome{start: 1 * sec, end: 42 * sec, errno: "EIO"}, Violated{Errors: 1, OverBound: 1}},
		{"a comparison of many reads", nil, outcome{start: 1 * sec, end: 99 * sec, several: true}, none},
	}
	for _, tt := range tests {
		h := &holds{deadline: 30 * sec, list: tt.holds}
		if got := judge(tt.o, h, 30*sec); got != tt.want {
			t.Errorf("%s: got %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

func TestDrillIsPassedOnlyIfSomethingWasDoneAndNothingViolated(t *testing.T) {
	read := Reads{Count: 1}
	did := func(v Violated) []KindTotal { return []KindTotal{{Kind: Kill, Count: 1, Violated: v}} }
	tests := []struct {
		name string
		r    Report
		want Verdict // without reasons
		says string
	}{
		{"all is well", Report{Reads: read, Kinds: did(Violated{})}, Verdict{OK: true, I1: true, I2: true, Bound: true}, ""},
		{"wrong bytes", Report{Reads: read, Kinds: did(Violated{Wrong: 2})}, Verdict{I2: true, Bound: true}, "I1: 2 reads gave wrong bytes"},
		{"errors", Report{Reads: read, Kinds: did(Violated{Errors: 3})}, Verdict{I2: true, Bound: true}, "3 reads failed"},
		{"unanswered", Report{Reads: read, Kinds: did(Violated{Unanswered: 1})}, Verdict{I1: true, Bound: true}, "never came back"},
		{"stalled", Report{Reads: read, Kinds: did(Violated{OverBound: 1})}, Verdict{I1: true, I2: true}, "longer than the bound"},
		{"while no fault was at work", Report{Reads: read, Kinds: did(Violated{}), Quiet: Violated{Wrong: 1}}, Verdict{I2: true, Bound: true}, "wrong bytes"},
		{"no fault done", Report{Reads: read, Kinds: []KindTotal{{Kind: OOM, NotDone: "no cgroups"}}}, Verdict{I1: true, I2: true, Bound: true}, "no fault was done"},
		{"interrupted", Report{Reads: read, Kinds: did(Violated{}), Early: "it was interrupted"}, Verdict{I1: true, I2: true, Bound: true}, "ended early: it was interrupted"},
		{"nothing read", Report{Kinds: did(Violated{})}, Verdict{I1: true, I2: true, Bound: true}, "nothing was read"},
	}
	for _, tt := range tests {
		tt.r.verdict()
		got := tt.r.Verdict
		says := strings.Join(got.Reasons, "; ")
		got.Reasons = nil
		if got.OK != tt.want.OK || got.I1 != tt.want.I1 || got.I2 != tt.want.I2 || got.Bound != tt.want.Bound || !strings.Contains(says, tt.says) {
			t.Errorf("%s: got %+v, %q", tt.name, got, says)
		}
	}
}

func TestReadBelongsToTheLastFaultItWasTouchedBy(t *testing.T) {
	c := &collector{bound: time.Hour}
	first := &activeFault{number: 1, at: 10 * sec}
	first.until.Store(int64(12 * sec))
	second := &activeFault{number: 2, at: 20 * sec, previous: first}
	tests := []struct {
		name       string
		last       *activeFault
		start, end time.Duration
		want       int
	}{
		{"before any fault", nil, 1 * sec, 2 * sec, 0},
		{"that ended before the fault", first, 1 * sec, 9 * sec, 0},
		{"in the middle of it", first, 9 * sec, 11 * sec, 1},
		{"begun before the daemon was back", first, 11 * sec, 15 * sec, 1},
		{"begun after", first, 13 * sec, 14 * sec, 0},
		{"through both", second, 11 * sec, 21 * sec, 2},
		{"in the second, which is not over", second, 21 * sec, 99 * sec, 2},
	}
	for _, tt := range tests {
		c.at.Store(tt.last)
		got := 0
		if f := c.touched(tt.start, tt.end); f != nil {
			got = f.number
		}
		if got != tt.want {
			t.Errorf("a read %s: fault %d, want %d", tt.name, got, tt.want)
		}
	}
	c.at.Store(second)
	c.note(outcome{start: 11 * sec, end: 22 * sec}, "", 0, 1)
	c.note(outcome{start: 13 * sec, end: 33 * sec, errno: "EIO"}, "f", 0, 1)
	if first.maxStall.Load() != int64(11*sec) || second.maxStall.Load() != int64(20*sec) {
		t.Errorf("longest waits %v and %v", time.Duration(first.maxStall.Load()), time.Duration(second.maxStall.Load()))
	}
	if first.violated.Sum() != 0 || second.violated.Errors != 1 || len(c.list) != 1 || c.list[0].Fault != 2 {
		t.Errorf("violations %+v, %+v, %+v", first.violated, second.violated, c.list)
	}
}

func TestViolationsAreAllCountedAndNotAllListed(t *testing.T) {
	c := &collector{bound: time.Hour}
	for range maxViolations + 5 {
		c.note(outcome{wrong: true}, "f", 0, 1)
	}
	if c.quiet.Wrong != maxViolations+5 || len(c.list) != maxViolations {
		t.Errorf("%d counted, %d listed", c.quiet.Wrong, len(c.list))
	}
}

func TestFaultThatWasNotDoneAfterAllLeavesItsViolationsToTheOneBefore(t *testing.T) {
	d := &drill{c: &collector{bound: time.Hour}}
	for _, before := range []*activeFault{nil, {number: 1}} {
		from := &activeFault{number: 2, previous: before}
		d.c.at.Store(from)
		d.c.list = nil
		d.c.note(outcome{wrong: true}, "f", 0, 1)
		d.moved(from, before)
		want := 0
		if before != nil {
			want = before.number
			if before.violated.Wrong != 1 {
				t.Errorf("the one before has %+v", before.violated)
			}
		} else if d.c.quiet.Wrong != 1 {
			t.Errorf("none has %+v", d.c.quiet)
		}
		if d.c.list[0].Fault != want {
			t.Errorf("listed for fault %d, want %d", d.c.list[0].Fault, want)
		}
	}
}
