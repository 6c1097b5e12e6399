package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"holdfast/daemon/drill"
)

func drillCommand() *cli.Command {
	return &cli.Command{
		Name: "drill", Usage: "kill, freeze and starve the daemon while images are read, and see that no reader is harmed",
		Description: "For staging: it harms the daemon on purpose, and refuses to run where the configuration says environment = \"production\".\n" +
			"Every byte read is compared, every wait is measured. It ends with 0 only if no reader got a wrong byte or an error that no\n" +
			"fault excuses, every read was answered, and none waited for longer than the bound; otherwise with 1. It writes drill.json and\n" +
			"drill.html to the report's directory.\n\n" +
			"Example:\n   holdfast drill --own-daemon --duration 1m --report drill-report",
		Flags:  drillFlags(),
		Action: runDrill,
	}
}

func drillFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringSliceFlag{Name: "mount", Usage: "read from the image mounted on `DIR` (repeatable; default: from all that are mounted)"},
		&cli.BoolFlag{Name: "self", Usage: "read from an image that the drill makes, mounts, and serves slowly from a registry of its own"},
		&cli.BoolFlag{Name: "own-daemon", Usage: "start a keeper and a daemon for the drill, with a cache on a file system of its own, and leave the others alone (implies --self)"},
		&cli.StringFlag{Name: "faults", Value: "all", Usage: "comma-separated `LIST` of " + strings.Join(kindNames(), ", ")},
		&cli.DurationFlag{Name: "duration", Usage: "`TIME` to drill (default: 1m, or as long as it takes if --kills is given)"},
		&cli.IntFlag{Name: "kills", Usage: "end after exactly so many faults (`N`), of whatever kind"},
		&cli.DurationFlag{Name: "interval", Value: drill.DefaultInterval, Usage: "mean `TIME` from when a fault is over to the next"},
		&cli.DurationFlag{Name: "hold", Value: drill.DefaultHold, Usage: "`TIME` for which a fault that lasts is held"},
		&cli.Uint64Flag{Name: "seed", Usage: "`NUMBER` that decides the order of faults, what is read, and what is in the image (default: another each time)"},
		&cli.IntFlag{Name: "readers", Value: drill.DefaultReaders, Usage: "`NUMBER` of reads at a time"},
		&cli.DurationFlag{Name: "stall-bound", Value: drill.DefaultStallBound, Usage: "`TIME` that a read may wait, not counting the time for which a fault was held"},
		&cli.BoolFlag{Name: "allow-disk-full", Usage: "fill the cache's file system even if it holds other things"},
		&cli.StringFlag{Name: "work", Value: "/var/tmp", Usage: "`DIR` in which --self and --own-daemon make what they need"},
		&cli.GenericFlag{Name: "size", Value: &size{drill.DefaultSize}, Usage: "`BYTES` of the image that --self makes"},
		&cli.StringFlag{Name: "report", Value: "drill-report", Usage: "write the report to `DIR`; empty: write none"},
		&cli.BoolFlag{Name: "dry-run", Usage: "say what would be done, on what, and do nothing"},
		jsonFlag(),
	}
}

func kindNames() (names []string) {
	for _, k := range drill.Kinds() {
		names = append(names, string(k))
	}
	return names
}

func runDrill(c *cli.Context) error {
	if _, err := arguments(c); err != nil {
		return err
	}
	o, err := drillOptions(c)
	if err != nil {
		return err
	}
	if c.Bool("dry-run") {
		return explainDrill(c, o)
	}
	if label := productionLabel(c); label != "" {
		return usagef("this host is labelled environment = %q: the drill harms the daemon on purpose, and is for hosts where that does no harm; --dry-run says what it would do", label)
	}
	if o.OwnDaemon {
		return drillOwn(c, o)
	}
	client, err := newClient(c)
	if err != nil {
		return err
	}
	defer client.Close()
	o.Client = client
	return drillOn(c, o, "")
}

// productionLabel returns the label that says so on a host in production. The configuration's cannot be taken back on the command line.
func productionLabel(c *cli.Context) string {
	configured, _ := c.App.Metadata[environmentKey].(string)
	for _, label := range []string{configured, c.String("environment")} {
		if l := strings.ToLower(strings.TrimSpace(label)); l == "prod" || l == "production" {
			return label
		}
	}
	return ""
}

func drillOptions(c *cli.Context) (o drill.Options, err error) {
	o = drill.Options{
		Dirs: c.StringSlice("mount"), OwnDaemon: c.Bool("own-daemon"), Self: c.Bool("self") || c.Bool("own-daemon"), Size: bytesOf(c, "size"),
		Duration: c.Duration("duration"), Count: c.Int("kills"), Interval: c.Duration("interval"), Hold: c.Duration("hold"),
		Seed: c.Uint64("seed"), Readers: c.Int("readers"), StallBound: c.Duration("stall-bound"), AllowDiskFull: c.Bool("allow-disk-full"),
		Release: release,
	}
	if o.Work, err = directory(c, "work"); err != nil {
		return o, err
	}
	if o.Faults, err = drillFaults(c.String("faults")); err != nil {
		return o, err
	}
	if !c.IsSet("seed") {
		o.Seed = uint64(time.Now().UnixNano())
	}
	if o.Duration == 0 && o.Count == 0 {
		o.Duration = drill.DefaultDuration
	}
	switch {
	case o.Self && len(o.Dirs) > 0:
		return o, usagef("--mount cannot be given with --self or --own-daemon, which read from mounts they make")
	case o.Duration < 0 || o.Count < 0 || o.Interval < 0 || o.Hold <= 0 || o.StallBound <= 0:
		return o, usagef("--duration, --kills and --interval cannot be negative, --hold and --stall-bound have to be above 0")
	case o.Readers < 1 || o.Readers > 1024:
		return o, usagef("--readers=%d: want 1 to 1024", o.Readers)
	case o.Size < 1<<20:
		return o, usagef("--size=%d: want at least 1MiB", o.Size)
	}
	for i, dir := range o.Dirs {
		if o.Dirs[i], err = filepath.Abs(dir); err != nil {
			return o, err
		}
	}
	return o, nil
}

func drillFaults(list string) (kinds []drill.Kind, err error) {
	if list == "all" {
		return drill.Kinds(), nil
	}
	for name := range strings.SplitSeq(list, ",") {
		k := drill.Kind(strings.TrimSpace(name))
		if !slices.Contains(drill.Kinds(), k) {
			return nil, usagef("--faults: unknown fault %q: want all, or some of %s", name, strings.Join(kindNames(), ", "))
		}
		if !slices.Contains(kinds, k) {
			kinds = append(kinds, k)
		}
	}
	return kinds, nil
}

func explainDrill(c *cli.Context, o drill.Options) error {
	p := drill.ExplainOwn(o)
	if !o.OwnDaemon {
		client, err := newClient(c)
		if err != nil {
			return err
		}
		defer client.Close()
		o.Client = client
		if p, err = drill.Explain(c.Context, o); err != nil {
			return err
		}
	}
	if c.Bool("json") {
		return printJSON(c, p)
	}
	if label := productionLabel(c); label != "" {
		fmt.Fprintf(c.App.Writer, "this host is labelled environment = %q: without --dry-run the drill would refuse\n", label)
	}
	_, err := fmt.Fprint(c.App.Writer, p.Print())
	return err
}

// drillOwn drills a daemon that it starts.
func drillOwn(c *cli.Context, o drill.Options) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	own, err := drill.StartOwn(c.Context, o.Work, func(root, run string) []string {
		global := []string{"--root", root, "--run", run, "--config", c.String("config")}
		if !c.IsSet("config") {
			global = global[:4]
		}
		return slices.Concat([]string{self}, global, []string{"keep", "--", self}, global, []string{"serve"})
	})
	if err != nil {
		return err
	}
	o.Client = own.Client
	return errors.Join(drillOn(c, o, own.Note), own.Stop())
}

// drillOn drills, reports, and fails if the drill was not passed.
func drillOn(c *cli.Context, o drill.Options, note string) error {
	line := newDrillLine(os.Stderr)
	o.Progress = line.show
	report, err := drill.Run(c.Context, o)
	line.finish()
	if report == nil {
		return err
	}
	if note != "" {
		report.Notes = append(report.Notes, note)
	}
	if dir := c.String("report"); dir != "" {
		err = errors.Join(err, report.Write(dir))
	}
	if c.Bool("json") {
		err = errors.Join(err, printJSON(c, report))
	} else {
		err = errors.Join(err, printDrill(c, report))
	}
	if err == nil && !report.Verdict.OK {
		return fmt.Errorf("the drill was not passed: %s", strings.Join(report.Verdict.Reasons, "; "))
	}
	return err
}

func printDrill(c *cli.Context, r *drill.Report) error {
	fmt.Fprintf(c.App.Writer, "%d reads of %s in %v, seed %d: half within %v, 99 %% within %v, the longest %v\n", r.Reads.Count, human(r.Reads.Bytes),
		r.Duration.Round(time.Millisecond), r.Options.Seed, r.Reads.P50, r.Reads.P99, r.Reads.Max.Round(time.Microsecond))
	t := tabwriter.NewWriter(c.App.Writer, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "FAULT\tDONE\tWRONG\tERRORS\tUNANSWERED\tOVER BOUND\tMAX STALL\tMAX RECOVERY\tREMARK")
	row := func(name string, done any, v drill.Violated, rest string) {
		fmt.Fprintf(t, "%s\t%v\t%d\t%d\t%d\t%d\t%s\n", name, done, v.Wrong, v.Errors, v.Unanswered, v.OverBound, rest)
	}
	for _, k := range r.Kinds {
		row(string(k.Kind), k.Count, k.Violated, fmt.Sprintf("%v\t%v\t%s", k.MaxStall.Round(time.Millisecond), k.MaxRecovery.Round(time.Millisecond), k.NotDone))
	}
	row("(none)", "", r.Quiet, "\t\t")
	if err := t.Flush(); err != nil {
		return err
	}
	for _, n := range r.Notes {
		fmt.Fprintln(c.App.Writer, "note:", n)
	}
	return nil
}

// A drillLine shows how a drill goes: one line that changes on a terminal, a line now and then elsewhere.
type drillLine struct {
	out      *os.File
	terminal bool
	said     time.Time
	last     drill.Progress
}

func newDrillLine(out *os.File) *drillLine {
	return &drillLine{out: out, terminal: isTerminal(out), said: time.Now()}
}

func (l *drillLine) show(p drill.Progress) {
	rate := float64(p.Reads-l.last.Reads) / max((p.Elapsed-l.last.Elapsed).Seconds(), 0.001)
	text := fmt.Sprintf("%v  %.0f reads/s  %d faults  stall %v  %d violations  %s", p.Elapsed.Round(time.Second), rate, p.Faults,
		p.Stall.Round(time.Millisecond), p.Violations, p.Doing)
	if l.terminal {
		l.last = p
		fmt.Fprintf(l.out, "\r\x1b[K%s", text)
	} else if time.Since(l.said) >= lineEvery {
		l.last, l.said = p, time.Now()
		fmt.Fprintln(l.out, text)
	}
}

// finish leaves the last line where it is.
func (l *drillLine) finish() {
	if l.terminal {
		fmt.Fprintln(l.out)
	}
}
