package kill

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/tests/killer"
	"holdfast/tests/load"
)

// tiny is what is read in each case: every page is the same few system calls again.
var tiny = load.Image{Layers: 2, Files: 2, Size: 32 << 10}

// script is what a daemon goes through in each case of this drill: always the same, so that the k-th system call of one case is about
// that of the next.
func script(r *rig) error {
	dir, err := r.mount("own", false)
	if err != nil {
		return err
	}
	l := r.read(dir, 2, 0)
	if err := r.until("pages are read", func() bool { return l.Fresh() <= tiny.Pages()/2 }); err != nil {
		return err
	}
	side, err := r.mount("side", false)
	if err != nil {
		return err
	}
	if _, err := os.ReadFile(filepath.Join(side, tiny.List()[0].Path)); err != nil {
		return fmt.Errorf("O2: %w", err)
	}
	if err := r.umount(side); err != nil {
		return err
	}
	if err := upgrade(r); err != nil {
		return err
	}
	if err := r.stopLoads(); err != nil {
		return err
	}
	return r.verify()
}

// upgrade upgrades, if nobody is killed: on a machine that is busy with other things a successor may be too slow, which is refused.
func upgrade(r *rig) (err error) {
	for range attempts {
		kills := r.kills()
		if _, err = r.optional(r.bin, "upgrade"); err == nil || !r.spared(kills) {
			return nil
		}
	}
	return fmt.Errorf("upgrade without a kill: %w", err)
}

// traced runs the script under the tracer.
func traced(o options, kills ...killer.Kill) ([]killer.Life, error) {
	o.kills = append([]killer.Kill{}, kills...)
	o.env = append(o.env, "GOMAXPROCS=1") // of the daemon: or the order of its calls changes more than it must
	r, err := newRig(o)
	if err != nil {
		return nil, err
	}
	err = script(r)
	if err = r.end(err); err != nil {
		return nil, err
	}
	return r.lives, nil
}

func killsOf(s string) (kills []killer.Kill, err error) {
	for part := range strings.FieldsSeq(s) {
		k, err := killer.ParseKill(part)
		if err != nil {
			return nil, err
		}
		kills = append(kills, k)
	}
	return kills, nil
}

func TestKillAtSystemCalls(t *testing.T) {
	bin := plainBinary(t)
	o := options{bin: bin, engine: engine(t, bin), image: layout(t, tiny)}
	if s := os.Getenv("HOLDFAST_CASE"); s != "" {
		kills, err := killsOf(s)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := traced(o, kills...); err != nil {
			t.Error(err)
		}
		return
	}
	lives, err := traced(o)
	if err != nil {
		t.Fatalf("without a kill: %v", err)
	}
	calls := lives[0].Calls
	cases := everyCall(calls)
	if !full() {
		cases = sampledCalls(calls, number(t, "HOLDFAST_SYSCALLS", 300))
	}
	start, limit, ran, killed := time.Now(), budget(t, 5*time.Minute), 0, 0
	var missed []string
	for _, kills := range cases {
		if !full() && time.Since(start) > limit {
			break
		}
		ran++
		lives, err := traced(o, kills...)
		if err != nil {
			t.Errorf("killed at %v: %v\nagain: %s", kills, err, replay(t, strings.Trim(fmt.Sprint(kills), "[]")))
		}
		n := 0
		for _, l := range lives {
			if l.Killed != "" {
				n++
			}
		}
		killed += n
		if full() && ran%100 == 0 {
			t.Logf("%d of %d cases, %d kills so far, in %v", ran, len(cases), killed, time.Since(start).Round(time.Second))
		}
		if n == 0 && err == nil {
			missed = append(missed, fmt.Sprint(kills))
		}
	}
	took := time.Since(start)
	t.Logf("seed %d: a life has about %d system calls; %d of %d cases, %d kills in %v: %.0f kills a minute, %v a case", seed, calls, ran, len(cases),
		killed, took.Round(time.Second), float64(killed)/took.Minutes(), (took / time.Duration(max(ran, 1))).Round(time.Millisecond))
	if len(missed)*10 > ran { // the last calls of a life are not always made
		t.Errorf("in %d of %d cases nobody was killed: %v", len(missed), ran, missed)
	}
}

// everyCall is the entry and the exit of each of so many calls.
func everyCall(calls int) (cases [][]killer.Kill) {
	for k := 1; k <= calls; k++ {
		cases = append(cases, []killer.Kill{{Call: k}}, []killer.Kill{{Call: k, Exit: true}})
	}
	return cases
}

// sampledCalls are n cases, every other of which kills the next daemon as well.
func sampledCalls(calls, n int) (cases [][]killer.Kill) {
	random := random("system calls")
	for i := range n {
		kills := []killer.Kill{{Call: 1 + random.IntN(calls), Exit: i%2 == 1}}
		if i%4 >= 2 {
			kills = append(kills, killer.Kill{Call: 1 + random.IntN(calls), Exit: random.IntN(2) == 1})
		}
		cases = append(cases, kills)
	}
	return cases
}

// readLives reads the tracer's report, which is complete when the host has ended.
func (r *rig) readLives() (err error) {
	if r.report == "" {
		return nil
	}
	if r.lives, err = killer.ReadReport(r.report); err == nil && len(r.lives) == 0 {
		err = errors.New("the tracer saw no daemon")
	}
	return err
}
