package main

import (
	"fmt"
	"path/filepath"
	"time"

	"github.com/urfave/cli/v2"

	"holdfast/daemon"
)

func upgradeCommand() *cli.Command {
	return &cli.Command{
		Name: "upgrade", Usage: "put a new release of the daemon in the place of the running one, without a pause for those who read",
		Description: "The daemon starts the new one, hands it what it has, and ends. If that fails before the new one reads the kernel's requests, the\n" +
			"old one serves on. An older release is as good as a newer one, if it understands what it is given.\n\n" +
			"Example:\n   holdfast upgrade --binary /usr/local/bin/holdfast",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "binary", Usage: "`FILE` to run (default: what now lies where the running daemon was started from)"},
			&cli.DurationFlag{Name: "timeout", Value: daemon.DefaultUpgradeTimeout, Usage: "`TIME` that the new daemon may take to get ready; the old one serves meanwhile"},
			jsonFlag(),
		},
		Action: upgrade,
	}
}

func upgrade(c *cli.Context) error {
	if _, err := arguments(c); err != nil {
		return err
	}
	r := daemon.UpgradeRequest{Timeout: c.Duration("timeout")}
	if r.Timeout <= 0 {
		return usagef("--timeout=%v: want more than nothing", r.Timeout)
	}
	if c.String("binary") != "" {
		var err error
		if r.Binary, err = filepath.Abs(c.String("binary")); err != nil {
			return err
		}
	}
	client, err := newClient(c)
	if err != nil {
		return err
	}
	defer client.Close()
	res, err := client.Upgrade(c.Context, r)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(c, res)
	}
	_, err = fmt.Fprintf(c.App.Writer, "process %d serves now: %s instead of %s; ready after %v, a pause of %v, %d requests in flight\n",
		res.PID, res.To, res.From, res.Prepare.Round(time.Millisecond), res.Pause.Round(time.Microsecond), res.Left)
	return err
}
