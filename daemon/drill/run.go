package drill

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// inject does faults until there were enough of them, or the time is over.
func (d *drill) inject(stop context.Context, kinds []Kind) {
	ctx := stop
	if d.o.Duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(stop, d.o.Duration)
		defer cancel()
	}
	s := newSchedule(d.o.Seed, kinds, d.o.Interval)
	for d.o.Count == 0 || len(d.faults) < d.o.Count {
		pause, k := s.next()
		select {
		case <-ctx.Done():
			if stop.Err() != nil {
				d.early = "it was interrupted"
			} else if d.o.Count > 0 {
				d.early = fmt.Sprintf("%d of %d faults were done when the time was over", len(d.faults), d.o.Count)
			}
			return
		case <-time.After(pause):
		}
		err := d.fault(stop, k)
		var not notDone
		switch {
		case errors.As(err, &not):
			d.notDone[k] = err.Error()
			if !s.drop(k) {
				d.early = "none of the faults could be done any more"
				return
			}
		case err != nil:
			d.early = fmt.Sprintf("%s: %v", k, err)
			return
		}
	}
}

// fault does one fault and waits until a daemon answers again. Once begun it is done to its end, which comes in bounded time; when stop ends only what
// is held is let go early.
func (d *drill) fault(stop context.Context, k Kind) error {
	ctx, a := context.WithoutCancel(stop), actions[k]
	before, err := d.site.answers(ctx, 0)
	if err != nil {
		return err
	}
	previous := d.c.at.Load()
	active := &activeFault{previous: previous, number: len(d.faults) + 1, kind: k, at: d.c.now()}
	f := Fault{Number: active.number, Kind: k, At: active.at, Before: before.PID, Pending: d.underWay()}
	d.c.at.Store(active)
	c := &call{site: d.site, ctx: ctx, stop: stop, pid: before.PID}
	err = a.do(c)
	f.Detail = c.detail
	if not := (notDone{}); errors.As(err, &not) {
		d.c.at.Store(previous)
		d.moved(active, previous)
		return err
	}
	if c.ended == 0 {
		c.ended = d.c.now()
	}
	f.Held = c.ended - f.At
	not := 0
	if a.replaces && err == nil {
		not = before.PID
	}
	after, back := d.site.answers(ctx, not)
	f.After, f.Recovery = after.PID, d.c.now()-c.ended
	if back != nil {
		d.c.unanswered(active, back.Error(), "", f.At)
	}
	active.until.Store(int64(d.c.now()))
	active.fault = f
	if err = errors.Join(err, back); err != nil {
		active.fault.Failed = err.Error()
	}
	d.faults = append(d.faults, active)
	return back
}

// moved gives what was counted for a fault that was not done after all to the one before it.
func (d *drill) moved(from, to *activeFault) {
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	number := 0
	if to == nil {
		d.c.quiet = d.c.quiet.plus(from.violated)
	} else {
		to.violated, number = to.violated.plus(from.violated), to.number
	}
	for i := range d.c.list {
		if d.c.list[i].Fault == from.number {
			d.c.list[i].Fault = number
		}
	}
}

// underWay counts the reads that wait for the kernel.
func (d *drill) underWay() (n int) {
	for _, r := range d.readers {
		if r.since.Load() != 0 {
			n++
		}
	}
	return n
}

// report sums up. Readers that never ended are still in their reads.
func (d *drill) report() *Report {
	r := &Report{
		Schema: Schema, Started: d.c.began, Early: d.early, Duration: d.c.now(), Environment: environment(d.site, d.o.Release),
		Options: Settings{
			Faults: d.o.Faults, Duration: d.o.Duration, Count: d.o.Count, Interval: d.o.Interval, Hold: d.o.Hold, Seed: d.o.Seed,
			Readers: d.o.Readers, StallBound: d.o.StallBound, Self: d.o.Self, OwnDaemon: d.o.OwnDaemon,
		},
	}
	for _, t := range d.targets {
		r.Mounts = append(r.Mounts, t.report())
	}
	latency, felt := &histogram{}, newTimeline()
	for _, rd := range d.readers {
		rd.mu.Lock()
		latency.merge(&rd.latency)
		felt.merge(rd.felt)
		rd.mu.Unlock()
	}
	r.Reads = Reads{
		Count: d.c.reads.Load(), Bytes: d.c.bytes.Load(), Errors: d.c.errors.Load(), Excused: d.c.excused.Load(),
		P50: latency.quantile(0.5), P90: latency.quantile(0.9), P99: latency.quantile(0.99), P999: latency.quantile(0.999),
		Max: latency.max, Buckets: latency.buckets(),
	}
	r.Timeline = TimelineReport{Bin: felt.bin, Stall: felt.stall, Reads: felt.reads}
	d.c.mu.Lock()
	r.Quiet, r.Violations = d.c.quiet, d.c.list
	for _, a := range d.faults {
		f := a.fault
		f.MaxStall, f.Violated = time.Duration(a.maxStall.Load()), a.violated
		r.Faults = append(r.Faults, f)
	}
	d.c.mu.Unlock()
	d.mu.Lock()
	r.Notes = slices.Clone(d.notes)
	d.mu.Unlock()
	r.Kinds = totals(d.o.Faults, r.Faults, d.notDone)
	r.verdict()
	return r
}

// totals makes the table of faults against invariants: a row for each kind asked for, in that order.
func totals(kinds []Kind, faults []Fault, notDone map[Kind]string) []KindTotal {
	var rows []KindTotal
	for _, k := range kinds {
		row := KindTotal{Kind: k, NotDone: notDone[k]}
		for _, f := range faults {
			if f.Kind != k {
				continue
			}
			row.Count++
			row.Violated = row.Violated.plus(f.Violated)
			row.MaxStall = max(row.MaxStall, f.MaxStall)
			row.MaxRecovery = max(row.MaxRecovery, f.Recovery)
		}
		if row.Count == 0 && row.NotDone == "" {
			row.NotDone = "its turn did not come"
		}
		rows = append(rows, row)
	}
	return rows
}
