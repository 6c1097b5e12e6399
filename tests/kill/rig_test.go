package kill

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/daemon"
	"holdfast/tests/host"
	"holdfast/tests/killer"
	"holdfast/tests/load"
)

// A rig is the host of a case. Its errors are failures of the case.
type rig struct {
	*host.Host
	dir    string
	bin    string
	image  source                // what mount mounts
	slow   source                // slow to come
	shown  map[string]load.Image // by directory
	client *daemon.Client
	keeper keeperLog
	opts   host.Options
	plan   string        // HOLDFAST_CRASH of successors
	marks  string        // HOLDFAST_CRASH_DIR
	others string        // that of successors
	report string        // a tracer's; "": there is none
	lives  []killer.Life // what it says, after end
	loads  []*load.Readers
}

// options say what a case's host is made of.
type options struct {
	bin, engine string
	image, slow source
	crash       string        // HOLDFAST_CRASH
	successor   string        // that of successors
	serve       []string      // more flags
	daemon      []string      // a command line that runs the daemon's
	kills       []killer.Kill // not nil: under the tracer
	env         []string
}

// newRig starts a host.
func newRig(o options) (*rig, error) {
	dir, err := host.WorkDir()
	if err != nil {
		return nil, err
	}
	r := &rig{
		dir: dir, bin: o.bin, image: o.image, slow: o.slow, shown: map[string]load.Image{}, plan: o.successor,
		marks: filepath.Join(dir, "crash"), others: filepath.Join(dir, "crash-successor"),
	}
	if err := errors.Join(os.Mkdir(r.marks, 0o700), os.Mkdir(r.others, 0o700)); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	r.opts = host.Options{
		Bin: o.bin, Dir: dir, Daemon: o.daemon,
		Serve: append([]string{"--engine", o.engine, "--read-ahead", "4KiB", "--prefetch", "off"}, o.serve...),
		Env:   append(o.env, "HOLDFAST_CRASH_DIR="+r.marks, "HOLDFAST_CRASH="+o.crash),
	}
	if o.kills != nil {
		r.report = filepath.Join(dir, "report")
		r.opts.Keeper, r.opts.Daemon = killer.Trace(self, o.bin, r.report, o.kills...), killer.Filter(self)
	}
	if err := r.start(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	r.client = r.Client()
	r.keeper.path = r.LogPath()
	return r, nil
}

// start starts the host. A daemon that is killed before its supervisor holds anything takes the keeper with it, which is then started
// again, as systemd or a person would.
func (r *rig) start() (err error) {
	for kills := r.kills(); ; kills = r.kills() {
		if r.Host, err = host.StartWith(r.opts); err == nil {
			return nil
		}
		if r.kills() == kills {
			return fmt.Errorf("start: %w", err)
		}
		if r.report != "" {
			r.opts.Keeper, r.opts.Daemon = nil, nil // a tracer has one keeper
		}
	}
}

// successor makes a program that is the daemon with its own plan of where to die.
func (r *rig) successor() (string, error) {
	path := filepath.Join(r.dir, "successor")
	script := fmt.Sprintf("#!/bin/sh\nexport HOLDFAST_CRASH_DIR=%q HOLDFAST_CRASH=%q\nexec %q \"$@\"\n", r.others, r.plan, r.bin)
	return path, os.WriteFile(path, []byte(script), 0o700)
}

// kills is how many times crash points and the tracer have killed.
func (r *rig) kills() (n int) {
	for _, dir := range []string{r.marks, r.others} {
		killed, _ := filepath.Glob(filepath.Join(dir, "killed-*"))
		n += len(killed)
	}
	if r.report == "" {
		return n
	}
	lives, err := killer.ReadReport(r.report)
	if err != nil {
		return n // a line is being written
	}
	for _, l := range lives {
		if l.Killed != "" {
			n++
		}
	}
	return n
}

func (r *rig) killMark(n int) string { return filepath.Join(r.marks, "killed-"+strconv.Itoa(n)) }

// seen lists the points that processes came by, and forgets them.
func (r *rig) seen() (names []string, err error) {
	for _, dir := range []string{r.marks, r.others} {
		files, globErr := filepath.Glob(filepath.Join(dir, "seen-*"))
		err = errors.Join(err, globErr)
		for _, f := range files {
			names = append(names, strings.TrimPrefix(filepath.Base(f), "seen-"))
			err = errors.Join(err, os.Remove(f))
		}
	}
	return names, err
}

// until waits for something; it helps the daemon to its feet meanwhile.
func (r *rig) until(what string, is func() bool) error {
	for deadline := time.Now().Add(patience()); !is(); time.Sleep(time.Millisecond) {
		if r.broken() {
			return errors.New("a reader noticed, while waiting: " + what)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not within %v: %s", patience(), what)
		}
		if err := r.help(); err != nil {
			return err
		}
	}
	return nil
}

// help makes the keeper start the daemon without the delay that it has for one which keeps dying.
func (r *rig) help() error {
	if err := r.keeper.update(); err != nil {
		return err
	}
	// Without a delay it is about to start anyway, and the signal would be passed on.
	if k := &r.keeper; !k.running && !k.pushed && (k.staying || k.again > 0) {
		k.pushed = true
		return r.signal(unix.SIGHUP)
	}
	return nil
}

func (r *rig) signal(s unix.Signal) error {
	if err := unix.Kill(r.KeeperPID(), s); err != nil {
		return fmt.Errorf("signal the keeper: %w", err)
	}
	return nil
}

// settled waits until a daemon serves.
func (r *rig) settled() error {
	return r.until("a daemon serves", func() bool {
		_, err := r.status()
		return err == nil
	})
}

func (r *rig) status() (daemon.Status, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience())
	defer cancel()
	return r.client.Status(ctx)
}

// mount mounts the image in a domain, however often the daemon dies over it.
func (r *rig) mount(domain string, prefetch bool) (string, error) {
	dir, err := os.MkdirTemp(r.dir, "mnt-")
	if err != nil {
		return "", err
	}
	r.shown[dir] = r.image.Image
	var last error
	err = r.until("mount", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), patience())
		defer cancel()
		_, last = r.client.Mount(ctx, daemon.MountRequest{Image: r.image.ref, Dir: dir, Domain: domain, Prefetch: &prefetch})
		return last == nil || r.mounted(dir)
	})
	if err != nil {
		err = errors.Join(err, last)
	}
	return dir, err
}

func (r *rig) mounted(dir string) bool {
	list, err := r.client.Mounts(context.Background())
	return err == nil && slices.ContainsFunc(list, func(m daemon.MountInfo) bool { return m.Dir == dir && m.Broken == "" })
}

// umount unmounts, likewise.
func (r *rig) umount(dir string) error {
	var last error
	err := r.until("unmount "+dir, func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), patience())
		defer cancel()
		if last = r.client.Umount(ctx, dir); last == nil {
			return true
		}
		list, err := r.client.Mounts(ctx)
		return err == nil && !slices.ContainsFunc(list, func(m daemon.MountInfo) bool { return m.Dir == dir }) && !slices.Contains(r.Mounts(), dir)
	})
	if err != nil {
		return errors.Join(err, last)
	}
	return os.Remove(dir)
}

// read puts readers on a mount.
func (r *rig) read(dir string, readers int, pause time.Duration) *load.Readers {
	l := load.Start(load.Config{Dir: dir, Image: r.shown[dir], Readers: readers, Seed: seed, Pause: pause, Bound: patience()})
	r.loads = append(r.loads, l)
	return l
}

// forget takes readers that have ended off the list.
func (r *rig) forget(l *load.Readers) {
	r.loads = slices.DeleteFunc(r.loads, func(other *load.Readers) bool { return other == l })
}

// broken says whether a reader has seen what it may not.
func (r *rig) broken() bool {
	return slices.ContainsFunc(r.loads, func(l *load.Readers) bool {
		select {
		case <-l.Failed():
			return true
		default:
			return false
		}
	})
}

// stopLoads ends the readers.
func (r *rig) stopLoads() error {
	var errs []error
	for _, l := range r.loads {
		errs = append(errs, l.Stop())
	}
	r.loads = nil
	return errors.Join(errs...)
}

// verify is the oracle: what all mounts show now, to readers who begin anew.
func (r *rig) verify() error {
	if err := errors.Join(r.stopLoads(), r.settled()); err != nil {
		return err
	}
	for _, m := range r.Mounts() {
		if err := r.compare(m); err != nil {
			return err
		}
	}
	return errors.Join(r.refused(), r.check())
}

// compare reads all of a mount, within a bound (O3).
func (r *rig) compare(mount string) error {
	i, done := r.shown[mount], make(chan error, 1)
	go func() { done <- i.Compare(mount) }() // ends when the kernel lets it
	select {
	case err := <-done:
		return err
	case <-time.After(2 * patience()):
		return fmt.Errorf("O3: %s is not read within %v", mount, 2*patience())
	}
}

// end ends a case: it stops the host, and returns err with what went wrong over that, and the log. After a failure it does not wait
// for those who hang.
func (r *rig) end(err error) error {
	defer r.client.Close()
	if err == nil {
		err = r.stopLoads()
		for _, m := range r.Mounts() {
			err = errors.Join(err, r.umount(m))
		}
	}
	if err == nil {
		err = errors.Join(r.stop(), r.readLives())
	}
	if err == nil {
		return os.RemoveAll(r.dir)
	}
	for _, l := range r.loads {
		err = errors.Join(err, l.Err())
	}
	log := r.Log()
	// A daemon that hangs writes to its log where, behind what is printed here.
	if r.keeper.update() == nil && r.keeper.running && unix.Kill(r.keeper.pid, unix.SIGQUIT) == nil {
		for wait := time.Now().Add(time.Second); time.Now().Before(wait) && unix.Kill(r.keeper.pid, 0) == nil; time.Sleep(time.Millisecond) {
		}
	}
	r.abandon()
	_ = r.stopLoads() // what they see from here on is nobody's fault
	return fmt.Errorf("%w\nthe log, in %s:\n%s", err, r.dir, log)
}

// stop stops daemon and keeper. A daemon killed while it stops is started again and told again.
func (r *rig) stop() error {
	kills := r.kills()
	done := make(chan error, 1)
	go func() { done <- r.Stop() }() // ends within a minute; waited for below
	for again := false; ; {
		select {
		case err := <-done:
			if err != nil && r.kills() > kills && strings.Contains(err.Error(), "exit status 137") {
				return nil // the keeper ends as its command did
			}
			if err != nil && r.report != "" && strings.Contains(err.Error(), "exit status 255") {
				return nil // it cannot learn how a command ended that it did not start and that the tracer has not let go of
			}
			return err
		case <-time.After(time.Millisecond):
		}
		if err := r.keeper.update(); err != nil {
			return err
		}
		switch k := &r.keeper; {
		case k.staying && !again:
			again = true
			if err := r.signal(unix.SIGHUP); err != nil {
				return err
			}
		case again && k.ready:
			again = false
			if err := r.signal(unix.SIGTERM); err != nil {
				return err
			}
		}
	}
}

// abandon takes a host down that is beyond help: readers get out of the kernel when nobody holds the engine any more.
func (r *rig) abandon() {
	for _, m := range r.Mounts() {
		_ = unix.Unmount(m, unix.MNT_DETACH)
	}
	// The keeper first, or it would start others. What is left after an upgrade that went wrong may be nobody's child.
	_ = unix.Kill(r.KeeperPID(), unix.SIGKILL)
	processes, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range processes {
		b, err := os.ReadFile(p)
		if pid, atoiErr := strconv.Atoi(filepath.Base(filepath.Dir(p))); err == nil && atoiErr == nil && bytes.Contains(b, []byte(r.dir+"/run")) {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// replay is the command that runs a case again.
func replay(t *testing.T, name string) string {
	engine := ""
	if e := os.Getenv("HOLDFAST_ENGINE"); e != "" {
		engine = " HOLDFAST_ENGINE=" + e
	}
	test, _, _ := strings.Cut(t.Name(), "/")
	return fmt.Sprintf("HOLDFAST_SEED=%d HOLDFAST_CASE=%q%s go test ./tests/kill -run '^%s$'", seed, name, engine, test)
}
