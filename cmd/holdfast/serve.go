package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/urfave/cli/v2"
	"go.uber.org/zap"

	"holdfast/daemon"
	"holdfast/fscache"
	"holdfast/fscache/fanotify"
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
	return append([]cli.Flag{
		&cli.StringFlag{Name: "engine", Value: "auto", Usage: "`ENGINE` to use, by name, or auto for the first that works"},
		&cli.GenericFlag{Name: "read-ahead", Value: &size{daemon.DefaultReadAhead}, Usage: "fetch so many `BYTES` for a reader that misses one"},
		&cli.DurationFlag{Name: "read-deadline", Value: daemon.DefaultReadDeadline, Usage: "`TIME` until the reader of an unreachable source gets an error"},
		&cli.IntFlag{Name: "streams", Value: daemon.DefaultStreams, Usage: "`NUMBER` of fetches at a time for the readers of one blob"},
		&cli.DurationFlag{Name: "stop-timeout", Value: daemon.DefaultStopTimeout, Usage: "`TIME` that requests in flight have at the end"},
		&cli.StringFlag{Name: "remount", Value: string(daemon.RemountYes), Usage: "what to do about what was mounted before the host was started anew: `yes|no|report`"},
		&cli.DurationFlag{Name: "idle-exit", Usage: "end when nothing was asked for so long; whoever asks next starts the daemon again (0: never)"},
		prefetchFlag("on"), prefetchRateFlag(),
		&cli.GenericFlag{Name: "scrub-rate", Value: &size{}, Usage: "compare what is cached of mounted images with its digests, so many `BYTES` a second, and report in log and status (0: not)"},
		&cli.BoolFlag{Name: "allow-unsafe-kernel", Usage: "also run on kernels whose EROFS is known to give wrong bytes to a reader killed at the wrong time"},
	}, spaceFlags()...)
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
	handover.IgnoreHangup()
	reserved, conn, err := dial()
	if err != nil {
		return err
	}
	store, err := handover.OpenStore()
	if err != nil {
		return fmt.Errorf("nothing would hold the mounts while this daemon is not there: %w: run it as `holdfast keep -- holdfast serve`, "+
			"or under systemd with FileDescriptorStoreMax= (and before systemd 254 Environment=FDSTORE=NUMBER)", err)
	}
	defer store.Close()
	run, err := makeDirectory(c, "run")
	if err != nil {
		return err
	}
	options.Ready = func() { tell(log, store, "READY=1") }
	options.Watchdog = store.Watchdog()
	options.Upgrade = &daemon.UpgradeOptions{Args: os.Args[1:], Environment: store.Environment(), Run: run, MainPID: store.MainPID}
	origin := daemon.Origin{Run: run, Inherited: inherited, Supervisor: store}
	if conn != nil {
		return succeed(c, conn, reserved, origin, options)
	}
	return attach(c, origin, options)
}

// attach makes this process the daemon, after a dead one or as the first.
func attach(c *cli.Context, a daemon.Origin, o daemon.Options) error {
	lock, err := handover.TakeLock(filepath.Join(a.Run, "serve.lock"))
	if err != nil {
		return fmt.Errorf("another daemon uses --run %s: %w", a.Run, err)
	}
	defer lock.Close()
	o.Upgrade.Lock = lock.File()
	unsafe := c.Bool("allow-unsafe-kernel")
	kind, reason, err := chooseEngine(c.String("engine"), o.Root, unsafe, a.Inherited)
	if err != nil {
		return err
	}
	o.EngineReason, a.Engine = reason, kind.name
	a.Open = opener(c, o, nil)
	if err := daemon.Attach(a, &o); err != nil {
		return err
	}
	if o.Listener, err = daemon.AttachSocket(c.Context, o.Socket, a.Inherited, a.Supervisor); err != nil {
		return errors.Join(err, o.Abort())
	}
	d, err := daemon.New(o)
	if err != nil {
		return errors.Join(err, o.Abort())
	}
	return leave(d, d.Run(c.Context))
}

// leave ends a daemon that has run.
func leave(d *daemon.Daemon, err error) error {
	err = errors.Join(err, d.Leave(err == nil))
	if err == nil && d.Idle() {
		return &exitError{code: exitIdle}
	}
	return err
}

// dial connects this process to the predecessor that started it; nil: none did. The numbers that a predecessor's events can have are
// reserved before anything else can take them.
func dial() (*fanotify.Reservation, *handover.Conn, error) {
	if !handover.Succeeds() {
		return nil, nil, nil
	}
	base, err := handover.Base()
	if err != nil {
		return nil, nil, err
	}
	reserved, err := fanotify.Reserve(base)
	if err != nil {
		return nil, nil, err
	}
	conn, err := handover.Dial()
	return reserved, conn, err
}

// succeed makes this process the daemon in place of one that runs.
func succeed(c *cli.Context, conn *handover.Conn, reserved *fanotify.Reservation, a daemon.Origin, o daemon.Options) error {
	a.Open = opener(c, o, reserved)
	o.EngineReason = "taken over from the daemon before"
	d, err := daemon.Succeed(c.Context, conn, a, o)
	if d == nil {
		return err
	}
	return leave(d, err)
}

// opener opens an engine by name.
func opener(c *cli.Context, o daemon.Options, reserved *fanotify.Reservation) func(string, fscache.Inherited, fscache.Inbox, fscache.Holder) (fscache.Engine, error) {
	return func(name string, in fscache.Inherited, inbox fscache.Inbox, h fscache.Holder) (fscache.Engine, error) {
		i := slices.IndexFunc(engineKinds, func(k engineKind) bool { return k.name == name })
		if i < 0 {
			return nil, fmt.Errorf("open engine %q: this release has %s", name, engineNames())
		}
		e, err := engineKinds[i].open(engineConfig{
			dir: daemon.CacheDir(o.Root, name), inherited: in, inbox: inbox, holder: h, reserved: reserved,
			limits: o.Limits, unsafe: c.Bool("allow-unsafe-kernel"), log: o.Log.Named(name),
		})
		if err != nil {
			return nil, fmt.Errorf("open the %s engine: %w", name, err)
		}
		return e, nil
	}
}

func serveOptions(c *cli.Context, log *zap.Logger) (o daemon.Options, err error) {
	o = daemon.Options{
		Log: log, Release: release, ReadAhead: bytesOf(c, "read-ahead"), ReadDeadline: c.Duration("read-deadline"),
		Streams: c.Int("streams"), StopTimeout: c.Duration("stop-timeout"), PrefetchBPS: bytesOf(c, "prefetch-rate"), ScrubRate: bytesOf(c, "scrub-rate"),
		IdleExit: c.Duration("idle-exit"), CullMounted: c.Bool("cull-mounted"), SpaceDeadline: c.Duration("space-deadline"), DomainQuota: c.Generic("domain-quota").(*quota).bytes,
	}
	if o.Limits, err = limits(c); err != nil {
		return o, err
	}
	if o.Prefetch, err = onOff(c, "prefetch"); err != nil {
		return o, err
	}
	if o.Remount, err = daemon.ParseRemount(c.String("remount")); err != nil {
		return o, usagef("--remount=%w", err)
	}
	if o.Root, err = makeDirectory(c, "root"); err != nil {
		return o, err
	}
	o.Socket, err = socketPath(c)
	return o, err
}

// tell tells the supervisor what is only for people.
func tell(log *zap.Logger, s daemon.Supervisor, state string) {
	if err := s.Notify(state); err != nil {
		log.Warn("tell the supervisor", zap.String("state", state), zap.Error(err))
	}
}
