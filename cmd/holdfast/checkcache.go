package main

import (
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"holdfast/daemon"
)

func checkCache(c *cli.Context) error {
	r := daemon.CheckRequest{Repair: c.Bool("repair")}
	if c.Args().Present() {
		args, err := arguments(c, "IMAGE")
		if err != nil {
			return err
		}
		r.Image = args[0]
	}
	client, err := newClient(c)
	if err != nil {
		return err
	}
	defer client.Close()
	report, err := client.CheckCache(c.Context, r)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		err = printJSON(c, report)
	} else {
		err = printCacheReport(c, report)
	}
	return errors.Join(err, verdict(report))
}

func printCacheReport(c *cli.Context, r daemon.CacheReport) (err error) {
	line := func(format string, args ...any) {
		_, e := fmt.Fprintf(c.App.Writer, format+"\n", args...)
		err = errors.Join(err, e)
	}
	for _, o := range r.Objects {
		line("%s/%s: %d chunks compared, %s", o.Domain, o.ID, o.Chunks, human(o.Bytes))
		if o.Unchecked != "" {
			line("  not checked: %s", o.Unchecked)
		}
		for _, b := range o.Bad {
			what := "wrong"
			switch {
			case b.Repaired:
				what = "wrong, and repaired"
			case b.Failed != "":
				what = "wrong, and not repaired: " + b.Failed
			}
			line("  %d bytes at %d: %s", b.Bytes, b.Offset, what)
		}
	}
	if r.Repaired > 0 {
		line("what mounts have in their page cache stays until the kernel drops it: echo 1 > /proc/sys/vm/drop_caches does that at once")
	}
	return err
}

// verdict is an error while anything is wrong or was not compared.
func verdict(r daemon.CacheReport) (err error) {
	unchecked := 0
	for _, o := range r.Objects {
		if o.Unchecked != "" {
			unchecked++
		}
	}
	if bad := r.Bad - r.Repaired; bad > 0 {
		err = fmt.Errorf("%d cached chunks are wrong: see holdfast check --cache --repair", bad)
	}
	if unchecked > 0 {
		err = errors.Join(err, fmt.Errorf("%d objects were not checked", unchecked))
	}
	return err
}
