package drill

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"holdfast/daemon"
)

// Options say what a drill does, and on what.
type Options struct {
	Client    *daemon.Client
	Dirs      []string // mounts to read from; none: all there are
	Self      bool     // on mounts that the drill makes, instead
	OwnDaemon bool     // the daemon was started for the drill; only for the report
	Work      string   // directory in which to make things, if Self
	Size      int64    // bytes of the image that is made

	Faults        []Kind
	Duration      time.Duration // how long; 0: until Count faults are done
	Count         int           // how many faults; 0: as many as fit in Duration
	Interval      time.Duration // mean pause between the end of a fault and the next one
	Hold          time.Duration // how long a fault that lasts is held
	Seed          uint64
	Readers       int
	StallBound    time.Duration
	AllowDiskFull bool // fill the cache's file system although it holds other things too

	Release  string         // of this program
	Progress func(Progress) // called about four times a second, from one goroutine; may be nil
}

// A Progress is how far a drill is.
type Progress struct {
	Elapsed    time.Duration
	Reads      int64
	Bytes      int64
	Faults     int
	Doing      Kind          // the fault being done; "": none
	Stall      time.Duration // for which the longest read has waited so far
	Violations int64
}

// Defaults of [Options].
const (
	DefaultDuration   = time.Minute
	DefaultInterval   = time.Second
	DefaultHold       = 3 * time.Second
	DefaultReaders    = 16
	DefaultStallBound = 30 * time.Second
	DefaultSize       = 64 << 20
)

// A Plan is what a drill would do.
type Plan struct {
	On     string   `json:"on"` // the daemon
	Mounts []string `json:"mounts"`
	Steps  []Step   `json:"steps"`
}

// A Step is a kind of fault in a plan.
type Step struct {
	Kind   Kind   `json:"kind"`
	Does   string `json:"does"`
	Cannot string `json:"cannot,omitempty"` // why it cannot be done; "": it can
}

// Print writes a plan for people.
func (p *Plan) Print() string {
	var b strings.Builder
	fmt.Fprintf(&b, "on %s\n", p.On)
	for _, m := range p.Mounts {
		fmt.Fprintf(&b, "read from %s\n", m)
	}
	for _, s := range p.Steps {
		if s.Cannot == "" {
			fmt.Fprintf(&b, "%-12s %s\n", s.Kind, s.Does)
		} else {
			fmt.Fprintf(&b, "%-12s cannot be done: %s\n", s.Kind, s.Cannot)
		}
	}
	return b.String()
}

// A drill is a run of Run.
type drill struct {
	o       Options
	site    *site
	made    *made // nil unless Self
	targets []*target
	c       *collector
	readers []*reader
	notDone map[Kind]string

	mu    sync.Mutex
	notes []string

	faults []*activeFault // that are over
	early  string         // why not all was done
}

// Run drills. The error says why it could not; what it found is in the report, whose verdict says whether the drill was passed.
func Run(ctx context.Context, o Options) (r *Report, err error) {
	d := &drill{o: o, notDone: map[Kind]string{}}
	d.c = &collector{began: time.Now(), bound: o.StallBound}
	if d.site, err = newSite(ctx, o.Client); err != nil {
		return nil, err
	}
	d.wire()
	d.c.holds.deadline = d.site.status.ReadDeadline
	if o.Self {
		d.made = &made{client: o.Client, root: d.site.status.Root, c: d.c}
		defer func() { err = errors.Join(err, d.made.close()) }()
		if err := d.made.make(ctx, o.Work, o.Seed, o.Size); err != nil {
			return nil, err
		}
		d.targets, d.site.source = d.made.targets, d.made.source
	} else if d.targets, d.notes, err = existing(ctx, o.Client, d.site.status.Root, o.Dirs); err != nil {
		return nil, err
	}
	kinds := d.possible()
	if len(kinds) == 0 {
		return nil, fmt.Errorf("none of the faults can be done here: %s", d.plan().reasons())
	}
	d.load(ctx, kinds)
	return d.report(), nil
}

// Explain says what Run would do, and does nothing but ask the daemon.
func Explain(ctx context.Context, o Options) (*Plan, error) {
	d := &drill{o: o, notDone: map[Kind]string{}, c: &collector{}}
	var err error
	if d.site, err = newSite(ctx, o.Client); err != nil {
		return nil, err
	}
	d.wire()
	if o.Self {
		d.site.source = &registry{} // there will be one
	} else if d.targets, _, err = existing(ctx, o.Client, d.site.status.Root, o.Dirs); err != nil {
		return nil, err
	}
	return d.plan(), nil
}

// ExplainOwn is Explain where the daemon is one that is not started yet.
func ExplainOwn(o Options) *Plan {
	d := &drill{o: o, c: &collector{}, site: &site{diskFull: true, source: &registry{}, supervisor: newKeeper}}
	d.site.status.Root = filepath.Join(o.Work, ownPattern, "root")
	d.wire()
	p := d.plan()
	p.On = "a daemon and a keeper that the drill starts, with a cache in an ext4 of its own in a file below " + o.Work
	return p
}

func (d *drill) wire() {
	d.site.diskFull = d.site.diskFull || d.o.AllowDiskFull
	d.site.hold, d.site.back = d.o.Hold, d.o.StallBound+30*time.Second
	d.site.holds, d.site.now = &d.c.holds, d.c.now
}

func (d *drill) plan() *Plan {
	s := d.site.status
	p := &Plan{On: fmt.Sprintf("the daemon that is process %d, release %s, engine %s, supervised by %s", s.PID, s.Release, s.Engine, d.site.supervisor)}
	if d.o.Self {
		p.Mounts = []string{fmt.Sprintf("%d mounts of an image of %d MiB that the drill makes below %s, from its own registry", madeMounts, d.o.Size>>20, d.o.Work)}
	}
	for _, t := range d.targets {
		p.Mounts = append(p.Mounts, fmt.Sprintf("%s, %s: %d files of %d MiB, compared with the image's digests", t.dir, t.image, len(t.files), t.bytes()>>20))
	}
	for _, k := range d.o.Faults {
		step := Step{Kind: k, Does: actions[k].plan(d.site)}
		if cannot := actions[k].cannot; cannot != nil {
			if err := cannot(d.site); err != nil {
				step.Cannot = err.Error()
			}
		}
		p.Steps = append(p.Steps, step)
	}
	return p
}

func (p *Plan) reasons() string {
	var all []string
	for _, s := range p.Steps {
		all = append(all, fmt.Sprintf("%s: %s", s.Kind, s.Cannot))
	}
	return strings.Join(all, "; ")
}

// possible returns the faults that can be done, and takes note of the others.
func (d *drill) possible() (kinds []Kind) {
	for _, s := range d.plan().Steps {
		if s.Cannot == "" {
			kinds = append(kinds, s.Kind)
		} else {
			d.notDone[s.Kind] = s.Cannot
		}
	}
	return kinds
}

// load reads, and does faults meanwhile.
func (d *drill) load(ctx context.Context, kinds []Kind) {
	d.c.began = time.Now()
	reading, stop := context.WithCancel(ctx)
	defer stop()
	var wg, readers sync.WaitGroup
	for i := range d.o.Readers {
		r := newReader(d.c, d.targets, d.o.Seed+uint64(i)<<32)
		d.readers = append(d.readers, r)
		readers.Go(func() { r.run(reading) }) // ends with reading, once the kernel has answered its read; ended waits
	}
	if d.made != nil {
		wg.Go(func() { d.made.renew(reading, d.note) }) // ends with reading
	}
	if d.o.Progress != nil {
		wg.Go(func() { d.show(reading) }) // ends with reading
	}
	d.inject(ctx, kinds)
	stop()
	wg.Wait()
	if d.ended(&readers) && d.made != nil {
		d.lastLook(ctx)
	}
}

// lastLook reads all that the drill mounted once more, now that nothing is done to the daemon.
func (d *drill) lastLook(ctx context.Context) {
	d.made.source.shaper.set(pace{})
	var wg sync.WaitGroup
	for i, t := range d.targets {
		if i < len(d.readers) {
			wg.Go(func() { d.readers[i].sweep(ctx, t) }) // ends with the last file, or with ctx
		}
	}
	d.ended(&wg)
}

// ended waits until no read is under way, for as long as a stall may last. A read that is under way still was not answered.
func (d *drill) ended(readers *sync.WaitGroup) bool {
	done := make(chan struct{})
	go func() { // ends with the readers; one that never ends is what this is about, and this process ends soon
		readers.Wait()
		close(done)
	}()
	select {
	case <-done:
		return true
	case <-time.After(d.o.StallBound):
	}
	now := d.c.now()
	for _, r := range d.readers {
		if waited := r.waiting(now); waited > 0 {
			d.c.unanswered(d.c.touched(now-waited, now), "a read was never answered", *r.path.Load(), now-waited)
		}
	}
	return false
}

// showEvery is how often progress is told.
const showEvery = 250 * time.Millisecond

func (d *drill) show(ctx context.Context) {
	for tick := time.NewTicker(showEvery); ; {
		select {
		case <-ctx.Done():
			tick.Stop()
			return
		case <-tick.C:
		}
		now := d.c.now()
		p := Progress{Elapsed: now, Reads: d.c.reads.Load(), Bytes: d.c.bytes.Load(), Violations: d.c.violated.Load()}
		for _, r := range d.readers {
			p.Stall = max(p.Stall, r.waiting(now))
		}
		if f := d.c.at.Load(); f != nil {
			p.Faults = f.number
			if f.until.Load() == 0 {
				p.Doing = f.kind
			}
		}
		d.o.Progress(p)
	}
}

func (d *drill) note(s string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.notes) < 100 {
		d.notes = append(d.notes, s)
	}
}

func environment(s *site, release string) Environment {
	host, _ := os.Hostname() // shown only
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return Environment{
		Host: host, Kernel: strings.TrimSpace(string(kernel)), CPUs: runtime.NumCPU(), Drill: release, Release: s.status.Release,
		Engine: s.status.Engine, EngineReason: s.status.EngineReason, Supervisor: s.supervisor.String(), Root: s.status.Root,
		ReadDeadline: s.status.ReadDeadline,
	}
}
