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
		Action: keep,
	}
}

func keep(c *cli.Context) error {
	if !c.Args().Present() {
		return usagef("COMMAND is missing: see holdfast help keep")
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
	})
	if err == nil && code != 0 {
		err = &exitError{code: code}
	}
	return err
}
