package spare

import (
	"os"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"
)

func reserve(t *testing.T) (*Reserve, *observer.ObservedLogs) {
	t.Helper()
	core, logs := observer.New(zapcore.ErrorLevel)
	r, err := New(zap.New(core))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r, logs
}

// limit lowers the process's limit until the test ends, or the returned function is called.
func limit(t *testing.T, n int) (undo func()) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	set := func(cur uint64) {
		if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: cur, Max: old.Max}, nil); err != nil {
			t.Error(err)
		}
	}
	set(uint64(n))
	t.Cleanup(func() { set(old.Cur) })
	return func() { set(old.Cur) }
}

// free takes all numbers that are free, up to max, and returns how many there were.
func free(r *Reserve, most int) int {
	var list []int
	for len(list) < most {
		n, ok := r.copy(0)
		if !ok {
			break
		}
		list = append(list, n)
	}
	for _, n := range list {
		release(n)
	}
	return len(list)
}

// lowest returns the lowest free number.
func lowest(t *testing.T, r *Reserve) int {
	t.Helper()
	n, ok := r.copy(0)
	if !ok {
		t.Fatal("no number is free")
	}
	release(n)
	return n
}

func TestReserveIsFreeForTheReadAndTakenBackAfterIt(t *testing.T) {
	r, _ := reserve(t)
	limit(t, lowest(t, r))
	for range 3 {
		if n := free(r, size+1); n != 0 {
			t.Fatalf("%d numbers are free before the read", n)
		}
		if !r.Ready() {
			t.Fatal("not ready, with a full reserve")
		}
		if n := free(r, size+1); n != size {
			t.Fatalf("%d numbers are free for the read, want %d", n, size)
		}
		r.Done(false)
	}
}

func TestReadsUseTheReserveUpToItsLeast(t *testing.T) {
	r, _ := reserve(t)
	limit(t, lowest(t, r))
	var events []int
	for r.Ready() {
		n, ok := r.copy(0) // as the kernel does
		if !ok {
			t.Fatal("Ready, and no number is free")
		}
		events = append(events, n)
		r.Lowest(n)
		r.Done(true)
	}
	if len(events) != size-least+1 {
		t.Errorf("%d reads, want %d", len(events), size-least+1)
	}
	release(events[0])
	if !r.Ready() {
		t.Error("not ready once a number was given back")
	}
	r.Done(false)
	for _, n := range events[1:] {
		release(n)
	}
}

func TestLoweredLimitIsNoticedByTheNextReads(t *testing.T) {
	r, _ := reserve(t)
	if !r.Ready() {
		t.Fatal("not ready")
	}
	r.Done(true)
	raise := limit(t, 0)
	late := 0
	for ; r.Ready(); late++ {
		r.Done(true)
	}
	if late >= freshReads {
		t.Errorf("%d reads after the limit was lowered, want less than %d", late, freshReads)
	}
	raise()
	if !r.Ready() {
		t.Error("not ready once the limit was raised")
	}
	r.Done(false)
}

func TestPausesGrowAndTheReasonIsSaidOnce(t *testing.T) {
	r, logs := reserve(t)
	raise := limit(t, 0)
	for _, want := range []int{5, 10, 20, 40, 50, 50} {
		if r.Ready() {
			t.Fatal("ready without a descriptor")
		}
		if d := r.Pause(); d.Milliseconds() != int64(want) {
			t.Errorf("a pause of %v, want %d ms", d, want)
		}
	}
	if n := logs.FilterMessageSnippet("LimitNOFILE=").Len(); n != 1 {
		t.Errorf("said %d times", n)
	}
	raise()
	if !r.Ready() {
		t.Fatal("not ready")
	}
	r.Done(false)
	if d := r.Pause(); d != minPause || logs.Len() != 2 {
		t.Errorf("the next shortage begins with a pause of %v, and was said %d times in all", d, logs.Len())
	}
}

func TestCloseGivesAllBack(t *testing.T) {
	count := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	before := count()
	r, err := New(zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	if n := count(); n != before {
		t.Errorf("%d descriptors, were %d", n, before)
	}
}
