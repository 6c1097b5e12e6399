package main

import (
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"holdfast/daemon"
)

func stateCommand() *cli.Command {
	return &cli.Command{
		Name: "state", Usage: "show what is on record, and whether the supervisor and the kernel agree",
		Description: "While no daemon runs it reads the files, and can compare the mounts only.\n\nExample:\n   holdfast state check",
		Subcommands: []*cli.Command{
			{
				Name: "export", Usage: "print all records, those of state.db and those of this boot's session",
				Description: "Example:\n   holdfast state export --json",
				Flags:       []cli.Flag{jsonFlag()},
				Action:      func(c *cli.Context) error { return named("holdfast state export", exportState(c)) },
			},
			{
				Name: "check", Usage: "compare records, supervisor and kernel; exit code 1 if they disagree",
				Description: "Example:\n   holdfast state check --json",
				Flags:       []cli.Flag{jsonFlag()},
				Action:      func(c *cli.Context) error { return named("holdfast state check", checkState(c)) },
			},
		},
		Action: func(c *cli.Context) error { return usagef("say export or check: see holdfast help state") },
	}
}

// report asks the daemon, or reads the files where none runs.
func report(c *cli.Context) (r daemon.StateReport, err error) {
	if _, err := arguments(c); err != nil {
		return r, err
	}
	client, err := newClient(c)
	if err != nil {
		return r, err
	}
	defer client.Close()
	r, err = client.State(c.Context)
	var answered *daemon.Error
	if err == nil || errors.As(err, &answered) {
		return r, err
	}
	root, err2 := directory(c, "root")
	run, err3 := directory(c, "run")
	if err := errors.Join(err2, err3); err != nil {
		return r, err
	}
	offline, err4 := daemon.ExportOffline(root, run)
	if err4 != nil {
		return r, fmt.Errorf("%w; and the files cannot be read: %w", err, err4)
	}
	return offline, nil
}

func exportState(c *cli.Context) error {
	r, err := report(c)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(c, r)
	}
	t := tabwriter.NewWriter(c.App.Writer, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "state.db\tschema %d, by %s\n", r.State.Schema, r.State.Release)
	for _, m := range r.State.Mounts {
		stage := ""
		if m.Stage != "" {
			stage = ", stage " + string(m.Stage)
		}
		fmt.Fprintf(t, "  mount\t%s on %s in domain %s, boot %s%s\n", m.Ref, m.Dir, m.Domain, m.Boot, stage)
	}
	for _, i := range r.State.Images {
		fmt.Fprintf(t, "  image\t%s %s\n", i.Digest, i.Ref)
	}
	for _, o := range r.State.Objects {
		fmt.Fprintf(t, "  settled\t%s/%s in boot %s\n", o.Domain, o.ID, o.Boot)
	}
	fmt.Fprintf(t, "session.db\tschema %d, by %s, boot %s\n", r.Session.Schema, r.Session.Release, r.Session.Boot)
	for _, o := range r.Session.Objects {
		fmt.Fprintf(t, "  held\t%s: %s/%s, %s, handle %d\n", o.Name, o.Domain, o.ID, human(o.Size), o.Handle)
	}
	for _, q := range r.Session.Pending {
		fmt.Fprintf(t, "  in flight\t%d: %s/%s, %d bytes at %d, for %v\n", q.Number, q.Domain, q.ID, q.Len, q.Off, time.Since(q.Since).Round(time.Millisecond))
	}
	return t.Flush()
}

func checkState(c *cli.Context) error {
	r, err := report(c)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		err = printJSON(c, r.Findings)
	} else {
		for _, f := range r.Findings {
			if _, err := fmt.Fprintln(c.App.Writer, f); err != nil {
				return err
			}
		}
	}
	if len(r.Findings) > 0 {
		return errors.Join(err, fmt.Errorf("%d disagreements", len(r.Findings)))
	}
	return err
}
