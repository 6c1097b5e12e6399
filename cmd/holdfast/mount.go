package main

import (
	"fmt"
	"path/filepath"

	"github.com/urfave/cli/v2"

	"holdfast/daemon"
)

func mountCommand() *cli.Command {
	return &cli.Command{
		Name: "mount", Usage: "mount an image through the daemon",
		ArgsUsage:   "IMAGE DIR",
		Description: imageUsage + "Example:\n   holdfast mount docker://registry.example/python:rafs /mnt/python",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "domain", Usage: "share cached blobs only with mounts of the same `DOMAIN`"},
			&cli.StringFlag{Name: "prefetch", Usage: "fetch what nobody reads yet in the background: `on|off` (default: as the daemon was told)"},
			prefetchRateFlag(),
		},
		Action: mount,
	}
}

func mount(c *cli.Context) error {
	ref, err := imageArgument(c, "IMAGE", "DIR")
	if err != nil {
		return err
	}
	r := daemon.MountRequest{Image: ref, Domain: c.String("domain")}
	if r.Dir, err = filepath.Abs(c.Args().Get(1)); err != nil {
		return err
	}
	if c.IsSet("prefetch") {
		on, err := onOff(c, "prefetch")
		if err != nil {
			return err
		}
		r.Prefetch = &on
	}
	if c.IsSet("prefetch-rate") {
		rate := bytesOf(c, "prefetch-rate")
		r.PrefetchBPS = &rate
	}
	client, err := newClient(c)
	if err != nil {
		return err
	}
	defer client.Close()
	m, err := client.Mount(c.Context, r)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(c.App.Writer, "%s %s on %s\n", m.Ref, m.Image, m.Dir)
	return err
}

func umountCommand() *cli.Command {
	return &cli.Command{
		Name: "umount", Usage: "unmount an image",
		ArgsUsage:   "DIR",
		Description: "Example:\n   holdfast umount /mnt/python",
		Action: func(c *cli.Context) error {
			args, err := arguments(c, "DIR")
			if err != nil {
				return err
			}
			dir, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			client, err := newClient(c)
			if err != nil {
				return err
			}
			defer client.Close()
			return client.Umount(c.Context, dir)
		},
	}
}

func newClient(c *cli.Context) (*daemon.Client, error) {
	path, err := socketPath(c)
	return daemon.NewClient(path), err
}
