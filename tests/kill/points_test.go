package kill

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/tests/points"
)

// A crashCase is a flow with a plan of where to die.
type crashCase struct {
	flow *flow
	plan []string // "point:n"
}

func (c crashCase) String() string { return c.flow.name + " " + strings.Join(c.plan, ",") }

// attempts is how often a case is run that must kill and does not: what comes by a point may depend on time.
const attempts = 5

// insist runs the case until it has killed.
func (c crashCase) insist(o options) (kills int, err error) {
	for range attempts {
		if kills, err = c.run(o); err != nil || kills == len(c.plan) {
			break
		}
	}
	return kills, err
}

// run runs the case, and says how many of the plan's kills happened.
func (c crashCase) run(o options) (kills int, err error) {
	r, err := c.flow.rig(o, strings.Join(c.plan, ","))
	if err != nil {
		return 0, err
	}
	f := &flight{want: c.flow.skip + len(c.plan), stay: linger()}
	err = c.flow.run(r, f)
	if err == nil {
		err = r.verify()
	}
	kills = r.kills() - c.flow.skip
	return kills, r.end(err)
}

// rig starts a host for the flow, with a plan.
func (f *flow) rig(o options, plan string) (*rig, error) {
	o.serve, o.daemon, o.crash = f.serve, f.daemon, plan
	if f.plans != nil {
		o.crash, o.successor = f.plans(plan)
	}
	return newRig(o)
}

// linger is how long a flow goes on for a kill that does not come.
func linger() time.Duration {
	if inVM() {
		return 5 * time.Second
	}
	return 300 * time.Millisecond
}

// A survey is which flows come by which points.
type survey struct {
	engine string
	points []string
	by     map[string][]*flow
}

// surveyed runs every flow once without a kill.
func surveyed(t *testing.T, o options) *survey {
	t.Helper()
	list, err := points.List(root())
	if err != nil {
		t.Fatal(err)
	}
	name, err := engineName(o)
	if err != nil {
		t.Fatal(err)
	}
	s := &survey{engine: name, by: map[string][]*flow{}}
	for _, p := range list {
		s.points = append(s.points, p.Name)
	}
	for i := range flows {
		f := &flows[i]
		if names := os.Getenv("HOLDFAST_FLOWS"); names != "" && !slices.Contains(strings.Split(names, ","), f.name) {
			continue
		}
		if f.engine != "" && f.engine != name {
			continue
		}
		names, err := f.survey(o)
		if err != nil {
			t.Errorf("flow %s without a kill: %v", f.name, err)
		}
		for _, n := range names {
			if !slices.Contains(s.points, n) {
				t.Errorf("a process came by %q, which is not in the source read here: is the binary another source's?", n)
			}
			s.by[n] = append(s.by[n], f)
		}
	}
	return s
}

func (f *flow) survey(o options) ([]string, error) {
	r, err := f.rig(o, "")
	if err != nil && strings.Contains(err.Error(), "flag provided but not defined") {
		return nil, nil // this release does not have what the flow is about
	}
	if err != nil {
		return nil, err
	}
	err = f.run(r, &flight{})
	if err == nil {
		err = r.verify()
	}
	names, seenErr := r.seen()
	slices.Sort(names)
	names = slices.Compact(names)
	return names, r.end(errors.Join(err, seenErr))
}

var shared = struct {
	sync.Once
	*survey
}{}

// prepared returns the case's options and the survey, which is made once.
func prepared(t *testing.T) (options, *survey) {
	t.Helper()
	bin := pointsBinary(t)
	o := options{bin: bin, engine: engine(t, bin), image: layout(t, image), slow: slow(t, image, 20*time.Millisecond)}
	shared.Do(func() { shared.survey = surveyed(t, o) })
	if shared.survey == nil {
		t.Fatal("the survey of what flow comes by what point failed before")
	}
	return o, shared.survey
}

// only is the one case that is asked for; nil: none is.
func only(t *testing.T) *crashCase {
	t.Helper()
	s := os.Getenv("HOLDFAST_CASE")
	if s == "" {
		return nil
	}
	c, err := parseCase(s)
	if err != nil {
		t.Fatalf("HOLDFAST_CASE: %v", err)
	}
	return c
}

// parseCase reads what String writes.
func parseCase(s string) (*crashCase, error) {
	name, plan, _ := strings.Cut(s, " ")
	for i := range flows {
		if flows[i].name == name {
			return &crashCase{&flows[i], strings.Split(plan, ",")}, nil
		}
	}
	return nil, fmt.Errorf("%q: there is no flow %q", s, name)
}

// runAll runs cases while there is time; the first ones, of which there are must, in any case. It returns which had all their kills.
func runAll(t *testing.T, o options, cases []crashCase, must int, limit time.Duration) map[string]bool {
	t.Helper()
	if c := only(t); c != nil {
		cases, must = []crashCase{*c}, 1
	}
	start, done, killed := time.Now(), map[string]bool{}, 0
	ran := 0
	part, parts := part(t)
	for i, c := range cases {
		if i >= must && !full() && time.Since(start) > limit {
			break
		}
		if i%parts != part-1 {
			continue
		}
		ran++
		run := c.run
		if i < must {
			run = c.insist
		}
		kills, err := run(o)
		if err != nil {
			t.Errorf("%v: %v\nagain: %s", c, err, replay(t, c.String()))
		}
		killed += kills
		done[c.String()] = kills == len(c.plan)
		if full() && ran%100 == 0 { // it takes hours
			t.Logf("%d of %d cases, %d kills so far, in %v", ran, len(cases), killed, time.Since(start).Round(time.Second))
		}
	}
	took := time.Since(start)
	t.Logf("seed %d: %d of %d cases, %d kills in %v: %.0f kills a minute, %v a case", seed, ran, len(cases), killed, took.Round(time.Second),
		float64(killed)/took.Minutes(), (took / time.Duration(max(ran, 1))).Round(time.Millisecond))
	return done
}

// elsewhere says whether a point belongs to an engine that is not the one under test, or to kernels that are not.
func elsewhere(point, engine string) bool {
	if point == "cachefiles.takeover.after-refuse" && kernelRestores() { // it delivers again what is refused without
		return true
	}
	if strings.HasPrefix(point, "daemon.parts.") { // which the daemon refuses to do with cachefiles
		return engine != "fanotify"
	}
	for _, e := range []string{"fanotify", "cachefiles"} {
		if strings.HasPrefix(point, e+".") {
			return e != engine
		}
	}
	return false
}

func TestKillAtEveryPoint(t *testing.T) {
	o, s := prepared(t)
	random := random("points")
	var first, more []crashCase
	for _, p := range s.points {
		if elsewhere(p, s.engine) {
			continue
		}
		if len(s.by[p]) == 0 {
			t.Errorf("%s: no flow comes by this point", p)
			continue
		}
		f := s.by[p][0]
		first = append(first, crashCase{f, []string{p + ":1"}})
		more = append(more, crashCase{f, []string{p + ":2"}}, crashCase{f, []string{fmt.Sprintf("%s:%d", p, 3+random.IntN(30))}})
		if last := s.by[p][len(s.by[p])-1]; last != f && slices.ContainsFunc(s.by[p], func(f *flow) bool { return f.skip > 0 }) {
			more = append(more, crashCase{flowNamed("recovery"), []string{p + ":1"}})
		}
	}
	random.Shuffle(len(more), func(i, j int) { more[i], more[j] = more[j], more[i] })
	limit := budget(t, 2*time.Minute)
	done := runAll(t, o, slices.Concat(first, more), len(first), limit)
	for _, c := range first {
		if killed, ran := done[c.String()]; ran && !killed {
			t.Errorf("%v: nobody was killed, and yet the flow comes by the point", c)
		}
	}
}

// kernelRestores reports whether cachefiles has `restore` (fs/cachefiles/daemon.c, Linux 6.8).
func kernelRestores() bool {
	var u unix.Utsname
	major, minor := 0, 0
	if err := unix.Uname(&u); err == nil {
		_, _ = fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	}
	return major > 6 || major == 6 && minor >= 8
}

func flowNamed(name string) *flow {
	i := slices.IndexFunc(flows, func(f flow) bool { return f.name == name })
	return &flows[i]
}

// engineName starts a daemon to ask which engine it chose.
func engineName(o options) (string, error) {
	if o.engine != "auto" {
		return o.engine, nil
	}
	r, err := newRig(o)
	if err != nil {
		return "", err
	}
	s, err := r.status()
	return s.Engine, r.end(err)
}

func TestKillDuringTheRecoveryOfAKill(t *testing.T) {
	o, s := prepared(t)
	var firsts, seconds []string
	for _, p := range s.points {
		if len(s.by[p]) == 0 {
			continue
		}
		firsts = append(firsts, p)
		if slices.Contains(s.by[p], flowNamed("recovery")) {
			seconds = append(seconds, p)
		}
	}
	var cases []crashCase
	for _, p := range firsts {
		for _, q := range seconds {
			cases = append(cases, crashCase{s.by[p][0], []string{p + ":1", q + ":1"}})
		}
	}
	random := random("pairs")
	random.Shuffle(len(cases), func(i, j int) { cases[i], cases[j] = cases[j], cases[i] })
	runAll(t, o, cases, 0, budget(t, time.Minute))
}
