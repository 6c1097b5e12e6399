// Command holdfast lets containers start before their images are downloaded, and never lets go of them.
//
// This package holds flags, wiring and exit codes, a file for each command, and nothing else: what a command does is in the packages
// it calls. github.com/urfave/cli/v2 parses the command line; github.com/BurntSushi/toml reads the configuration file, and tells
// which of its keys nobody asked for; github.com/vbauerster/mpb/v8 draws progress on a terminal, and cupwriter beside it knows what
// a terminal is; go.uber.org/zap is the program's log.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"

	"holdfast/handover"
)

// release is this build's name, set by the linker.
var release = "unknown"

// keepExec is the first argument of the keeper's trampoline (see handover.KeepOptions). It is looked for before anything else
// happens, so that no flag or configuration comes between the keeper and its command.
const keepExec = "keep-exec"

func main() { os.Exit(run(os.Args)) }

// run runs a command line and returns the exit code.
func run(args []string) int {
	if len(args) > 1 && args[1] == keepExec {
		fmt.Fprintln(os.Stderr, "holdfast keep:", handover.Exec(args[2:]))
		return exitCommand
	}
	app := newApp(os.Stdout, os.Stderr)
	ctx, stop := handover.StopContext(context.Background())
	defer stop()
	err := app.RunContext(ctx, args)
	if err == nil {
		return exitOK
	}
	var silent *exitError
	if !errors.As(err, &silent) || silent.err != nil {
		fmt.Fprintln(os.Stderr, strings.ReplaceAll(err.Error(), "\n", "; ")) // of joined errors
	}
	return exitCode(err)
}

func newApp(stdout, stderr io.Writer) *cli.App {
	app := &cli.App{
		Name:  "holdfast",
		Usage: "mount container images before they are downloaded, and never let go of them",
		Description: "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the kernel lacks a feature, 4 another instance is running,\n" +
			"5 the state was written by a newer release, 7 idle (serve --idle-exit).",
		HideVersion: true,
		Writer:      stdout, ErrWriter: stderr,
		Flags:  globalFlags(),
		Before: loadConfig,
		Commands: []*cli.Command{
			serveCommand(), keepCommand(), convertCommand(), checkCommand(), inspectCommand(), mountCommand(), umountCommand(), prefetchCommand(), exportCommand(),
			imagesCommand(), gcCommand(), statusCommand(), upgradeCommand(), stateCommand(), drillCommand(), doctorCommand(), versionCommand(),
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("unknown command %q: see holdfast help", c.Args().First())
			}
			return errors.Join(cli.ShowAppHelp(c), usagef("no command given"))
		},
		OnUsageError:   func(_ *cli.Context, err error, _ bool) error { return named("holdfast", &exitError{exitUsage, err}) },
		ExitErrHandler: func(*cli.Context, error) {}, // run does that
	}
	for _, c := range app.Commands {
		name, action := c.Name, c.Action
		c.HideHelpCommand = true
		c.Action = func(c *cli.Context) error { return named("holdfast "+name, action(c)) }
		c.OnUsageError = func(_ *cli.Context, err error, _ bool) error {
			return named("holdfast "+name, &exitError{exitUsage, err})
		}
	}
	return app
}

func globalFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "root", Value: "/var/lib/holdfast", Usage: "`DIR` for what survives a reboot: state, images, cache"},
		&cli.StringFlag{Name: "run", Value: "/run/holdfast", Usage: "`DIR` for what lives with this boot: sockets, locks"},
		&cli.StringFlag{Name: "socket", Usage: "`PATH` of the daemon's API socket (default: api.sock in --run)"},
		&cli.StringFlag{Name: "config", Value: defaultConfig, Usage: "read flags not given from this TOML `FILE`; the default may be missing"},
		&cli.StringFlag{Name: "environment", Usage: "`LABEL` of what this host is for: drill refuses to run in production"},
		&cli.StringFlag{Name: "log-level", Value: "info", Usage: "log from this `LEVEL` on: debug, info, warn or error"},
		&cli.StringFlag{Name: "log-format", Value: "auto", Usage: "`FORMAT` of the log: json, console, or auto, which is console on a terminal"},
	}
}

// directory returns a directory flag's value as an absolute path.
func directory(c *cli.Context, flag string) (string, error) {
	dir, err := filepath.Abs(c.String(flag))
	if err != nil || c.String(flag) == "" {
		return "", usagef("--%s=%q is no directory", flag, c.String(flag))
	}
	return dir, nil
}

// makeDirectory is directory, and makes it for nobody but its owner.
func makeDirectory(c *cli.Context, flag string) (string, error) {
	dir, err := directory(c, flag)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make --%s: %w", flag, err)
	}
	return dir, nil
}

// socketPath returns where the API's socket is, as an absolute path.
func socketPath(c *cli.Context) (string, error) {
	if c.String("socket") != "" {
		return directory(c, "socket")
	}
	dir, err := directory(c, "run")
	return filepath.Join(dir, "api.sock"), err
}

// arguments checks that a command was given exactly the named arguments.
func arguments(c *cli.Context, names ...string) ([]string, error) {
	args := c.Args().Slice()
	if len(args) < len(names) {
		return nil, usagef("%s is missing: see holdfast help %s", names[len(args)], c.Command.Name)
	}
	if len(args) > len(names) {
		return nil, usagef("unexpected argument %q (flags go before the others): see holdfast help %s", args[len(names)], c.Command.Name)
	}
	return args, nil
}
