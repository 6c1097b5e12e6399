package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v2"

	"holdfast/daemon"
	"holdfast/rafs/image"
)

func mountCommand() *cli.Command {
	return &cli.Command{
		Name: "mount", Usage: "mount an image through the daemon, or a complete one without it",
		ArgsUsage: "IMAGE DIR",
		Description: imageUsage + "With --offline, no daemon may run: what is mounted is what an earlier one left complete in the cache, under --root, whatever has happened\n" +
			"to the host since. IMAGE is then as it was mounted, or a digest. What nothing on record vouches for is checked by digest first.\n\n" +
			"Example:\n   holdfast mount docker://registry.example/python:rafs /mnt/python",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "domain", Usage: "share cached blobs only with mounts of the same `DOMAIN` (default: one for each registry and set of credentials for it, or local); with --offline, use what is cached in it"},
			&cli.StringFlag{Name: "prefetch", Usage: "fetch what nobody reads yet in the background: `on|off` (default: as the daemon was told)"},
			prefetchRateFlag(),
			&cli.BoolFlag{Name: "offline", Usage: "without a daemon and without a network, an image that is complete in the cache"},
		},
		Action: mount,
	}
}

func mount(c *cli.Context) error {
	if c.Bool("offline") {
		return mountOffline(c)
	}
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
	_, err = fmt.Fprintf(c.App.Writer, "%s %s on %s in domain %s\n", m.Ref, m.Image, m.Dir, m.Domain)
	return err
}

// mountOffline mounts what is complete in the cache.
func mountOffline(c *cli.Context) error {
	args, err := arguments(c, "IMAGE", "DIR")
	if err != nil {
		return err
	}
	for _, f := range []string{"prefetch", "prefetch-rate"} {
		if c.IsSet(f) {
			return usagef("--%s has no meaning with --offline: nothing is fetched", f)
		}
	}
	r := daemon.OfflineRequest{Release: release, Domain: c.String("domain")}
	var ok bool
	if r.Image, ok = imageOrDigest(args[0]); !ok {
		_, err := image.ParseReference(args[0])
		return &exitError{exitUsage, err}
	}
	if r.Dir, err = filepath.Abs(args[1]); err != nil {
		return err
	}
	if r.Root, err = directory(c, "root"); err != nil {
		return err
	}
	meter := newMeter(os.Stderr)
	r.Progress = func(done, total int64) { meter.show(done, total, "check") }
	m, err := daemon.MountOffline(c.Context, r)
	meter.finish()
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(c.App.Writer, "%s %s on %s, without a daemon; %s checked by digest\n", m.Ref, m.Image, m.Dir, human(m.Checked))
	return err
}

func umountCommand() *cli.Command {
	return &cli.Command{
		Name: "umount", Usage: "unmount an image",
		ArgsUsage:   "DIR",
		Description: "Through the daemon; while none runs, what was mounted with --offline.\n\nExample:\n   holdfast umount /mnt/python",
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
			err = client.Umount(c.Context, dir)
			var answered *daemon.Error
			if err == nil || errors.As(err, &answered) {
				return err
			}
			root, err2 := directory(c, "root")
			if err2 != nil {
				return err2
			}
			if there, err2 := daemon.UmountOffline(root, release, dir); there {
				return err2
			}
			return err
		},
	}
}

func newClient(c *cli.Context) (*daemon.Client, error) {
	path, err := socketPath(c)
	return daemon.NewClient(path), err
}
