package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/urfave/cli/v2"

	"holdfast/rafs/image"
)

const imageUsage = "IMAGE is oci:PATH[:TAG], docker://REF, or rafs:BOOTSTRAP[,BLOBDIR] for a bare bootstrap and blobs named by id.\n\n"

func checkCommand() *cli.Command {
	return &cli.Command{
		Name: "check", Usage: "verify an image from end to end, or what the daemon has cached: its structure and every chunk",
		ArgsUsage: "IMAGE",
		Description: imageUsage + "With --cache the daemon compares what is cached with its digests: of IMAGE, which is then one that holdfast images lists, in all\n" +
			"of its domains, or without IMAGE of all that are mounted. --repair fetches what is wrong and writes it over what is there. What a mount\n" +
			"has in its page cache stays until the kernel drops it: echo 1 > /proc/sys/vm/drop_caches does that at once.\n\n" +
			"Example:\n   holdfast check oci:/srv/images:python\n   holdfast check --cache --repair",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "cache", Usage: "compare what the daemon has cached; IMAGE may be left out"},
			&cli.BoolFlag{Name: "repair", Usage: "with --cache, fetch wrong chunks again"},
			jsonFlag(),
		},
		Action: check,
	}
}

// imageArgument returns the first of the named arguments, which is the reference of an image, with absolute paths.
func imageArgument(c *cli.Context, names ...string) (string, error) {
	args, err := arguments(c, names...)
	if err != nil {
		return "", err
	}
	ref, err := image.ParseReference(args[0])
	if err != nil {
		return "", &exitError{exitUsage, err}
	}
	return ref.String(), nil
}

func check(c *cli.Context) error {
	if c.Bool("cache") {
		return checkCache(c)
	}
	if c.Bool("repair") {
		return usagef("--repair needs --cache")
	}
	ref, err := imageArgument(c, "IMAGE")
	if err != nil {
		return err
	}
	meter := newMeter(os.Stderr)
	report, err := image.Check(c.Context, ref, image.Options{}, meter.checking)
	meter.finish()
	if report == nil {
		return err
	}
	return errors.Join(err, printReport(c, report))
}

func printReport(c *cli.Context, r *image.Report) error {
	if c.Bool("json") {
		return printJSON(c, r)
	}
	for _, d := range r.Damage {
		if _, err := fmt.Fprintln(c.App.Writer, d); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(c.App.Writer, "%s %s\n%d directories, %d files, %d links, %d others; %d chunks of %d blobs compared, %s in %s stored\n",
		r.Ref, r.Digest, r.Directories, r.Files, r.Links, r.Others, r.Chunks, r.Blobs, human(int64(r.ChunkBytes)), human(int64(r.StoredBytes)))
	return err
}

func inspectCommand() *cli.Command {
	return &cli.Command{
		Name: "inspect", Usage: "show an image: tree, blobs, chunks, what deduplication saves",
		ArgsUsage:   "IMAGE",
		Description: imageUsage + "Example:\n   holdfast inspect --json --chunks docker://registry.example/python:rafs",
		Flags: []cli.Flag{
			jsonFlag(),
			&cli.BoolFlag{Name: "chunks", Usage: "with --json, also every chunk of every file"},
		},
		Action: inspect,
	}
}

func inspect(c *cli.Context) error {
	ref, err := imageArgument(c, "IMAGE")
	if err != nil {
		return err
	}
	if c.Bool("chunks") && !c.Bool("json") {
		return usagef("--chunks needs --json")
	}
	d, err := image.Inspect(c.Context, ref, image.Options{}, c.Bool("chunks"))
	switch {
	case err != nil:
		return err
	case c.Bool("json"):
		return printJSON(c, d)
	}
	return d.Print(c.App.Writer)
}
