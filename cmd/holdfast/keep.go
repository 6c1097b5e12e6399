package main

import (
	"github.com/urfave/cli/v2"

	"holdfast/handover"
)

func keepCommand() *cli.Command {
	return &cli.Command{
		Name: "keep", Usage: "run a daemon, restart it when it dies, and hold its file descriptors meanwhile",
		ArgsUsage: "-- COMMAND [ARGUMENT...]",
		Description: "It is the supervisor for machines without systemd. While mounts depend on what it holds it does not end: SIGTERM\n" +
			"stops the daemon only, and SIGHUP starts it again.\n\n" +
			"Example:\n   holdfast keep -- holdfast serve --engine fanotify",
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "watchdog", Usage: "kill the daemon, to start it again, when it has not said for `TIME` that it lives (0: never)"},
		},
		Action: keep,
	}
}

func keep(c *cli.Context) error {
	if !c.Args().Present() {
		return usagef("COMMAND is missing: see holdfast help keep")
	}
	if c.Duration("watchdog") < 0 {
		return usagef("--watchdog=%v is negative", c.Duration("watchdog"))
	}
	dir, err := makeDirectory(c, "run")
	if err != nil {
		return err
	}
	log, err := newLog(c)
	if err != nil {
		return err
	}
	code, err := handover.Keep(handover.KeepOptions{
		Command: c.Args().Slice(), Trampoline: []string{"holdfast", keepExec}, Dir: dir, Log: log.Named("keep"),
		Watchdog: c.Duration("watchdog"),
	})
	if err == nil && code != 0 {
		err = &exitError{code: code}
	}
	return err
}
