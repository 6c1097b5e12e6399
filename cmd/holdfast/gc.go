package main

import (
	"errors"
	"fmt"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"holdfast/daemon"
)

func gcCommand() *cli.Command {
	return &cli.Command{
		Name: "gc", Usage: "remove cached data and saved images that nothing on record refers to, and say why of each",
		Description: "An image that was mounted once is on record, with all that is cached of it, until holdfast images rm takes it off.\n\n" +
			"Example:\n   holdfast gc --dry-run",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "dry-run", Usage: "only say what would be removed"},
			jsonFlag(),
		},
		Action: gc,
	}
}

func gc(c *cli.Context) error {
	if _, err := arguments(c); err != nil {
		return err
	}
	client, err := newClient(c)
	if err != nil {
		return err
	}
	defer client.Close()
	r, err := client.GC(c.Context, c.Bool("dry-run"))
	if err != nil {
		return err
	}
	return printGC(c, r)
}

func removeImages(c *cli.Context) error {
	if !c.Args().Present() {
		return usagef("IMAGE is missing: see holdfast images help rm")
	}
	client, err := newClient(c)
	if err != nil {
		return err
	}
	defer client.Close()
	r, err := client.RemoveImages(c.Context, c.Args().Slice()...)
	if err != nil {
		return err
	}
	return printGC(c, r)
}

// printGC prints what was decided; what could not be removed is an error.
func printGC(c *cli.Context, r daemon.GCReport) error {
	failed := 0
	for _, x := range r.Decisions {
		if x.Failed != "" {
			failed++
		}
	}
	var err error
	if c.Bool("json") {
		err = printJSON(c, r)
	} else {
		err = printDecisions(c, r)
	}
	if failed > 0 {
		err = errors.Join(err, fmt.Errorf("%d could not be removed: the next holdfast gc, and the daemon when it next starts, try again", failed))
	}
	return err
}

func printDecisions(c *cli.Context, r daemon.GCReport) error {
	t := tabwriter.NewWriter(c.App.Writer, 0, 0, 2, ' ', 0)
	for _, x := range r.Decisions {
		what := "kept"
		switch {
		case x.Failed != "":
			what = "failed"
		case x.Remove && r.DryRun:
			what = "would be removed"
		case x.Remove:
			what = "removed"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", what, x.What, x.Name, human(x.Bytes), x.Why)
		if x.Failed != "" {
			fmt.Fprintf(t, "\t\t\t\t%s\n", x.Failed)
		}
	}
	freed := "freed"
	if r.DryRun {
		freed = "would be freed"
	}
	fmt.Fprintf(t, "%s %s\n", human(r.Freed), freed)
	return t.Flush()
}
