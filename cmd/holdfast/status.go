package main

import (
	"context"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"holdfast/daemon"
)

func imagesCommand() *cli.Command {
	return &cli.Command{
		Name: "images", Usage: "list the images that the daemon knows, or remove some",
		Description: "With --dedup it shows of the mounted images how much of each other images of its domain share, and for each domain and the host what " +
			"the cache would hold more if nothing were shared. Copied are chunks that another object of the domain had, so that they were not fetched; " +
			"reflinked is what of that takes no space of its own (fanotify, on xfs or btrfs).\n\n" +
			"Example:\n   holdfast images --dedup --json\n   holdfast images rm docker://registry.example/python:rafs",
		Flags: []cli.Flag{jsonFlag(), &cli.BoolFlag{Name: "dedup", Usage: "show what is shared and saved, per image, domain and host"}},
		Subcommands: []*cli.Command{{
			Name: "rm", Usage: "remove images that are not mounted, and all that is cached of them and of no other image",
			ArgsUsage:   "IMAGE...",
			Description: "IMAGE is a digest, or a reference as holdfast images shows it.\n\nExample:\n   holdfast images rm oci:/srv/images:python",
			Flags:       []cli.Flag{jsonFlag()},
			Action:      func(c *cli.Context) error { return named("holdfast images rm", removeImages(c)) },
		}},
		Action: func(c *cli.Context) error {
			if c.Bool("dedup") {
				return show(c, (*daemon.Client).Dedup, printSharing)
			}
			return show(c, (*daemon.Client).Images, func(t *tabwriter.Writer, list []daemon.ImageInfo) {
				fmt.Fprintln(t, "IMAGE\tREF\tSIZE\tCACHED\tDOMAINS\tMOUNTED ON")
				for _, i := range list {
					fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", i.Digest, i.Ref, human(i.Size), human(i.Present), strings.Join(i.Domains, " "), strings.Join(i.Mounts, " "))
				}
			})
		},
	}
}

func printSharing(t *tabwriter.Writer, s daemon.Sharing) {
	fmt.Fprintln(t, "IMAGE\tREF\tDOMAIN\tSIZE\tSHARED\tCOPIED\tREFLINKED")
	for _, i := range s.Images {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", i.Digest, i.Ref, i.Domain, human(i.Size), human(i.Shared), human(i.Copied), human(i.Reflinked))
	}
	fmt.Fprintln(t, "\nDOMAIN\tIMAGES\tOBJECTS\tSIZE\tSHARED\tSAVED\tCOPIED\tREFLINKED")
	row := func(name string, s daemon.SharingSums) {
		fmt.Fprintf(t, "%s\t%d\t%d\t%s\t%s\t%s\t%s\t%s\n", name, s.Images, s.Objects, human(s.Size), human(s.Shared), human(s.Saved), human(s.Copied), human(s.Reflinked))
	}
	for _, d := range s.Domains {
		row(d.Domain, d.SharingSums)
	}
	row("(host)", s.Host)
}

func statusCommand() *cli.Command {
	return &cli.Command{
		Name: "status", Usage: "say what the daemon is doing",
		Description: "Example:\n   holdfast status --json",
		Flags:       []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			return show(c, fullStatus, printStatus)
		},
	}
}

// A statusAnswer is the daemon's status with the mounts themselves in place of their number.
type statusAnswer struct {
	daemon.Status
	Mounts []daemon.MountInfo `json:"mounts"`
}

func fullStatus(client *daemon.Client, ctx context.Context) (s statusAnswer, err error) {
	if s.Status, err = client.Status(ctx); err == nil {
		s.Mounts, err = client.Mounts(ctx)
	}
	return s, err
}

func printStatus(t *tabwriter.Writer, s statusAnswer) {
	fmt.Fprintf(t, "release\t%s, process %d, for %v\n", s.Release, s.PID, time.Since(s.Started).Round(time.Second))
	fmt.Fprintf(t, "engine\t%s (%s)\n", s.Engine, s.EngineReason)
	fmt.Fprintf(t, "requests\t%d pending, the oldest for %v\n", s.Pending, s.OldestAge.Round(time.Millisecond))
	fmt.Fprintf(t, "data\t%s fetched, %s copied from other images, %s served\n", human(s.Fetched), human(s.Copied), human(s.Served))
	fmt.Fprintf(t, "errors\t%d wrong chunks, %d failed fetches, %d requests refused\n", s.Mismatches, s.Failures, s.Refused)
	if x := s.Scrub; x != nil {
		fmt.Fprintf(t, "scrub\t%s compared, %d wrong chunks found, %d passes\n", human(x.Bytes), x.Bad, x.Passes)
	}
	fmt.Fprintf(t, "space\t%s of %s free, %d objects culled, and %s of mounted ones\n", human(s.Space.Free), human(s.Space.Total), s.Space.Culled, human(s.Space.Parts))
	if s.Space.Stopped {
		fmt.Fprintf(t, "\tfull: nothing new is written (see --bstop and --fstop); unmount images, or make room\n")
	}
	for _, d := range s.Damaged {
		fmt.Fprintf(t, "damaged\t%s\n", d)
	}
	for _, what := range s.Lost {
		fmt.Fprintf(t, "lost\t%s\n", what)
	}
	for _, m := range s.Mounts {
		fmt.Fprintf(t, "mount\t%s on %s in domain %s\n", m.Ref, m.Dir, m.Domain)
		if m.Offline {
			fmt.Fprintf(t, "\tmounted without a daemon\n")
		}
		if m.Broken != "" {
			fmt.Fprintf(t, "\tcannot be served: %s\n", m.Broken)
		}
	}
	for _, o := range s.Objects {
		fmt.Fprintf(t, "object\t%s/%s: %s of %s cached\n", o.Domain, o.ID, human(o.Present), human(o.Size))
	}
	for _, src := range s.Sources {
		fmt.Fprintf(t, "source\t%s: %s in %d requests\n", src.Name, human(src.Fetched), src.Requests)
	}
}

// show asks the daemon and prints its answer: as JSON, or as print does for people.
func show[T any](c *cli.Context, ask func(*daemon.Client, context.Context) (T, error), print func(*tabwriter.Writer, T)) error {
	if _, err := arguments(c); err != nil {
		return err
	}
	client, err := newClient(c)
	if err != nil {
		return err
	}
	defer client.Close()
	answer, err := ask(client, c.Context)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(c, answer)
	}
	t := tabwriter.NewWriter(c.App.Writer, 0, 0, 2, ' ', 0)
	print(t, answer)
	return t.Flush()
}
