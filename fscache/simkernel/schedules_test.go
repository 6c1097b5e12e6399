package simkernel_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"holdfast/fscache/simkernel"
)

var modes = map[string]simkernel.Mode{
	"cachefiles":               simkernel.Cachefiles,
	"cachefilesWithoutRestore": simkernel.CachefilesWithoutRestore,
	"fanotify":                 simkernel.Fanotify,
}

// schedules is how many are run in each mode, and stepsOfOne how many things happen in each on average; HOLDFAST_SCHEDULES says otherwise
// of the former.
const (
	schedules  = 34_000
	stepsOfOne = 40
)

func mountPoints(t *testing.T) []string {
	dirs := []string{filepath.Join(t.TempDir(), "1"), filepath.Join(t.TempDir(), "2")}
	for _, d := range dirs {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return dirs
}

// rapidChooser draws from rapid, which records and shrinks.
type rapidChooser struct{ rt *rapid.T }

var generators = func() (g [64]*rapid.Generator[int]) {
	for i := range g {
		g[i] = rapid.IntRange(0, max(i-1, 0))
	}
	return g
}()

func (c rapidChooser) pick(what string, n int) int {
	if n <= 1 {
		return 0
	}
	return generators[n].Draw(c.rt, what)
}

// TestSchedules runs seeded schedules of readers, deliveries, crashes, restarts, upgrades and faults of the store and the source. A
// failure prints how to run it again; rapid shrinks it first.
func TestSchedules(t *testing.T) {
	n := schedules / slowdown
	if s := os.Getenv("HOLDFAST_SCHEDULES"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	for name, mode := range modes {
		t.Run(name, func(t *testing.T) {
			setFlag(t, "rapid.checks", n)
			setFlag(t, "rapid.steps", stepsOfOne)
			dirs := mountPoints(t)
			total, began := 0, time.Now()
			rapid.Check(t, func(rt *rapid.T) {
				w := newWorld(mode, none, dirs, rapidChooser{rt})
				w.fail = func(format string, args ...any) {
					rt.Helper()
					rt.Fatalf(format, args...)
				}
				w.start()
				do := make(map[string]func(*rapid.T), len(actions))
				for i, a := range actions {
					do[a.name] = func(*rapid.T) {
						total++
						w.act(i)
					}
				}
				rt.Repeat(do)
				w.settle()
			})
			t.Logf("%d schedules, %d actions, %v a schedule", n, total, time.Since(began)/time.Duration(n))
		})
	}
}

// setFlag sets a flag of rapid's for a test, unless the command line has it.
func setFlag(t *testing.T, name string, n int) {
	f := flag.Lookup(name)
	if f.Value.String() != f.DefValue {
		return
	}
	if err := flag.Set(name, strconv.Itoa(n)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = flag.Set(name, f.DefValue) })
}

// seededChooser draws from a seed.
type seededChooser struct{ *rand.Rand }

func (c seededChooser) pick(_ string, n int) int {
	if n <= 1 {
		return 0
	}
	return c.IntN(n)
}

// A broken schedule is one that a rule was broken in.
type brokenSchedule struct{ what string }

// runSeed runs one schedule of a seed, and returns what was broken.
func runSeed(mode simkernel.Mode, m mutation, dirs []string, seed uint64, trace bool) (what string, log []string) {
	c := seededChooser{rand.New(rand.NewPCG(seed, uint64(mode)))}
	w := newWorld(mode, m, dirs, c)
	w.tracing = trace
	w.fail = func(format string, args ...any) { panic(brokenSchedule{fmt.Sprintf(format, args...)}) }
	defer func() {
		switch r := recover().(type) {
		case nil:
		case brokenSchedule:
			what, log = r.what, w.log
		default:
			panic(r)
		}
	}()
	w.start()
	for range 20 + c.IntN(60) {
		w.act(c.IntN(len(actions)))
	}
	w.settle()
	return "", w.log
}

// TestSeeds runs schedules like TestSchedules, without rapid: to look at one, HOLDFAST_SEED=n with -v prints what happened in it.
func TestSeeds(t *testing.T) {
	first, n, trace := uint64(0), uint64(2000), false
	if s := os.Getenv("HOLDFAST_SEED"); s != "" {
		var err error
		if first, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
		n, trace = 1, true
	}
	for name, mode := range modes {
		t.Run(name, func(t *testing.T) {
			dirs := mountPoints(t)
			for seed := first; seed < first+n; seed++ {
				what, log := runSeed(mode, none, dirs, seed, trace)
				if trace {
					t.Log(strings.Join(log, "\n"))
				}
				if what != "" {
					t.Fatalf("seed %d: %s\nsee it with: HOLDFAST_SEED=%d go test -v -run %s ./fscache/simkernel", seed, what, seed, t.Name())
				}
			}
		})
	}
}
