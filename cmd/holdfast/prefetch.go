package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"holdfast/daemon"
	"holdfast/rafs/image"
)

func prefetchCommand() *cli.Command {
	return &cli.Command{
		Name: "prefetch", Usage: "bring all of a mounted image into the cache now",
		ArgsUsage: "IMAGE|DIR",
		Description: imageUsage + "It may also be a digest, or the directory where an image is mounted. The limit of --prefetch-rate no longer holds for the image.\n" +
			"The daemon does the work: it goes on when this command is interrupted. What is not mounted is mounted first, with holdfast mount.\n\n" +
			"With --wait the command ends when all of the image is in the cache and would outlive a power failure.\n\n" +
			"Example:\n   holdfast prefetch --wait /mnt/python",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "wait", Usage: "until all of it is in the cache"},
			&cli.StringFlag{Name: "domain", Usage: "only where the image is mounted in this `DOMAIN`"},
			jsonFlag(),
		},
		Action: prefetch,
	}
}

// How long --wait lets pass before it asks the daemon again: a sixteenth of what it has waited, within bounds, so that little of what the
// prefetch takes is waiting for its end to be noticed. And for how long the daemon may be away: it is started again when it dies, and
// replaced by another release.
const (
	askSoon    = 5 * time.Millisecond
	askLate    = 200 * time.Millisecond
	awayAtMost = time.Minute
)

func prefetch(c *cli.Context) error {
	r, err := prefetchRequest(c)
	if err != nil {
		return err
	}
	client, err := newClient(c)
	if err != nil {
		return err
	}
	defer client.Close()
	p, err := client.Prefetch(c.Context, r)
	if err != nil {
		return err
	}
	if c.Bool("wait") {
		if p, err = awaitPrefetch(c.Context, client, r, p); err != nil && p.Failed == "" {
			return err
		}
	}
	if c.Bool("json") {
		return errors.Join(err, printJSON(c, p))
	}
	what := "being brought in"
	switch {
	case p.Done:
		what = "complete"
	case p.Failed != "":
		what = "incomplete"
	}
	_, e := fmt.Fprintf(c.App.Writer, "%s %s: %s of %s cached, %s\n", p.Ref, p.Image, human(p.Present), human(p.Size), what)
	return errors.Join(err, e)
}

// prefetchRequest reads the one argument: an image, by reference or digest, or a directory.
func prefetchRequest(c *cli.Context) (r daemon.PrefetchRequest, err error) {
	args, err := arguments(c, "IMAGE|DIR")
	if err != nil {
		return r, err
	}
	r.Domain = c.String("domain")
	if ref, ok := imageOrDigest(args[0]); ok {
		r.Image = ref
		return r, nil
	}
	r.Dir, err = filepath.Abs(args[0])
	return r, err
}

// imageOrDigest says whether s is an image's reference, which it returns with absolute paths, or a digest.
func imageOrDigest(s string) (string, bool) {
	if strings.HasPrefix(s, "sha256:") {
		return s, true
	}
	ref, err := image.ParseReference(s)
	if err != nil {
		return "", false
	}
	return ref.String(), true
}

// awaitPrefetch asks the daemon until the prefetch is over, and shows how far it is. The error says why it did not bring everything in.
func awaitPrefetch(ctx context.Context, client *daemon.Client, r daemon.PrefetchRequest, p daemon.PrefetchInfo) (daemon.PrefetchInfo, error) {
	meter := newMeter(os.Stderr)
	defer meter.finish()
	began := time.Now()
	for heard := began; ; {
		what := "prefetch"
		if p.Trouble != "" {
			what += ", trying again: " + p.Trouble
		}
		meter.show(p.Present, p.Size, what)
		switch {
		case p.Done:
			return p, nil
		case p.Failed != "":
			return p, fmt.Errorf("%s of %s are in the cache, the rest cannot be brought in: %s", human(p.Present), human(p.Size), p.Failed)
		}
		select {
		case <-time.After(min(max(askSoon, time.Since(began)/64), askLate)):
		case <-ctx.Done():
			return p, fmt.Errorf("interrupted at %s of %s; the daemon goes on with it", human(p.Present), human(p.Size))
		}
		next, err := client.Prefetching(ctx, r)
		var answered *daemon.Error
		switch {
		case err == nil:
			p, heard = next, time.Now()
		case ctx.Err() != nil:
		case errors.As(err, &answered) && answered.Code != daemon.CodeGone, time.Since(heard) > awayAtMost:
			return p, err
		}
	}
}
