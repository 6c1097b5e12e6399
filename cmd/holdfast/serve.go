package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v2"
	"go.uber.org/zap"

	"holdfast/daemon"
	"holdfast/handover"
)

func serveCommand() *cli.Command {
	return &cli.Command{
		Name: "serve", Usage: "run the daemon",
		Description: "It must run under something that holds its file descriptors while it is not there: holdfast keep, or systemd with\n" +
			"FileDescriptorStoreMax= in the unit (before systemd 254 also Environment=FDSTORE=NUMBER, with the same number).\n\n" +
			"Example:\n   holdfast keep -- holdfast serve --read-ahead 4MiB",
		Flags:  serveFlags(),
		Action: serve,
	}
}

func serveFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "engine", Value: "auto", Usage: "`ENGINE` to use, by name, or auto for the first that works"},
		&cli.GenericFlag{Name: "read-ahead", Value: &size{daemon.DefaultReadAhead}, Usage: "fetch so many `BYTES` for a reader that misses one"},
		&cli.DurationFlag{Name: "read-deadline", Value: daemon.DefaultReadDeadline, Usage: "`TIME` until the reader of an unreachable source gets an error"},
		&cli.IntFlag{Name: "streams", Value: daemon.DefaultStreams, Usage: "`NUMBER` of fetches at a time for the readers of one blob"},
		&cli.DurationFlag{Name: "stop-timeout", Value: daemon.DefaultStopTimeout, Usage: "`TIME` that requests in flight have at the end"},
		prefetchFlag("on"), prefetchRateFlag(),
		&cli.BoolFlag{Name: "allow-unsafe-kernel", Usage: "also run on kernels whose EROFS is known to give wrong bytes to a reader killed at the wrong time"},
	}
}

func prefetchFlag(value string) cli.Flag {
	return &cli.StringFlag{Name: "prefetch", Value: value, Usage: "fetch what nobody reads yet in the background: `on|off`"}
}

func prefetchRateFlag() cli.Flag {
	return &cli.GenericFlag{Name: "prefetch-rate", Value: &size{}, Usage: "prefetch at most so many `BYTES` a second and mount; 0: no limit"}
}

// onOff reads a flag that is on or off.
func onOff(c *cli.Context, flag string) (bool, error) {
	switch v := c.String(flag); v {
	case "on", "off":
		return v == "on", nil
	default:
		return false, usagef("--%s=%q: want on or off", flag, v)
	}
}

func bytesOf(c *cli.Context, flag string) int64 { return c.Generic(flag).(*size).n }

func serve(c *cli.Context) error {
	inherited, err := handover.Inherited()
	if err != nil {
		return err
	}
	if _, err := arguments(c); err != nil {
		return err
	}
	if values, ok := c.App.Metadata[configKey].(map[string]string); ok {
		if err := setFlags(c, values); err != nil {
			return err
		}
	}
	log, err := newLog(c)
	if err != nil {
		return err
	}
	options, err := serveOptions(c, log)
	if err != nil {
		return err
	}
	run, err := makeDirectory(c, "run")
	if err != nil {
		return err
	}
	lock, err := handover.TakeLock(filepath.Join(run, "serve.lock"))
	if err != nil {
		return fmt.Errorf("another daemon uses --run %s: %w", run, err)
	}
	defer lock.Close()
	store, err := handover.OpenStore()
	if err != nil {
		return fmt.Errorf("nothing would hold the mounts while this daemon is not there: %w: run it as `holdfast keep -- holdfast serve`, "+
			"or under systemd with FileDescriptorStoreMax= (and before systemd 254 Environment=FDSTORE=NUMBER)", err)
	}
	defer store.Close()
	handover.IgnoreHangup()
	if err := attachEngine(c, &options, inherited, store); err != nil {
		return err
	}
	return serveEngine(c.Context, options, store, inherited[options.Engine.Name()] == nil)
}

func serveOptions(c *cli.Context, log *zap.Logger) (o daemon.Options, err error) {
	o = daemon.Options{
		Log: log, Release: release, ReadAhead: bytesOf(c, "read-ahead"), ReadDeadline: c.Duration("read-deadline"),
		Streams: c.Int("streams"), StopTimeout: c.Duration("stop-timeout"), PrefetchBPS: bytesOf(c, "prefetch-rate"),
	}
	if o.Prefetch, err = onOff(c, "prefetch"); err != nil {
		return o, err
	}
	if o.Root, err = makeDirectory(c, "root"); err != nil {
		return o, err
	}
	o.Socket, err = socketPath(c)
	return o, err
}

// attachEngine opens the engine, and sees to it that its lifeline is held by the supervisor before anything can be mounted (I4).
func attachEngine(c *cli.Context, o *daemon.Options, inherited map[string]*os.File, store *handover.Store) error {
	kind, reason, err := chooseEngine(c.String("engine"), o.Root, c.Bool("allow-unsafe-kernel"), inherited)
	if err != nil {
		return err
	}
	for name := range inherited {
		if name != kind.name {
			o.Log.Warn("the supervisor holds a descriptor this release does not know: it is left there", zap.String("name", name))
		}
	}
	o.EngineReason = reason
	o.Engine, err = kind.open(cacheDir(o.Root, kind.name), inherited[kind.name], c.Bool("allow-unsafe-kernel"), o.Log.Named(kind.name))
	if err != nil {
		return fmt.Errorf("open the %s engine: %w", kind.name, err)
	}
	if inherited[kind.name] == nil {
		name, lifeline := o.Engine.Lifeline()
		if err := store.Push(name, lifeline); err != nil {
			return errors.Join(err, o.Engine.Close())
		}
	}
	return nil
}

// serveEngine runs the daemon. At its end the supervisor keeps the lifeline, unless nothing that needs it is mounted: for certain
// after a good end, or where the lifeline is fresh, this process's own. (A keeper that held one for nothing would not end.)
func serveEngine(ctx context.Context, o daemon.Options, store *handover.Store, fresh bool) error {
	name, _ := o.Engine.Lifeline()
	o.Ready = func() { tell(o.Log, store, "READY=1") }
	d, err := daemon.New(o)
	if err != nil {
		err = errors.Join(err, o.Engine.Close())
		if fresh {
			err = errors.Join(err, store.Remove(name))
		}
		return err
	}
	err = d.Run(ctx)
	tell(o.Log, store, "STOPPING=1")
	if d.Unused() && (err == nil || fresh) {
		err = errors.Join(err, store.Remove(name))
	}
	return err
}

// tell tells the supervisor what is only for people.
func tell(log *zap.Logger, store *handover.Store, state string) {
	if err := store.Notify(state); err != nil {
		log.Warn("tell the supervisor", zap.String("state", state), zap.Error(err))
	}
}
