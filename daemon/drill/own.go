package drill

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"holdfast/daemon"
	"holdfast/daemon/drill/inject"
)

// An Own is a keeper and a daemon that were started for a drill. Its cache is on a file system of its own, in a file, so that a full disk harms nobody
// else; where that cannot be made it is in an ordinary directory.
type Own struct {
	Client *daemon.Client
	Note   string // why the cache is in an ordinary directory; "": it is not
	dir    string
	disk   string // where the file system is mounted; "": there is none
	keeper *exec.Cmd
	log    string
	ended  chan error
}

const ownPattern = "holdfast-drill-daemon-*"

// ownDisk bounds the file system in the file; the file itself takes only what is written.
const ownDisk = 6 << 30

// startTime is how long a daemon may take to answer for the first time.
const startTime = time.Minute

// StartOwn starts a keeper and a daemon with directories of their own below work. command makes the keeper's command line of the daemon's root and run
// directories.
func StartOwn(ctx context.Context, work string, command func(root, run string) []string) (o *Own, err error) {
	o = &Own{ended: make(chan error, 1)}
	if o.dir, err = os.MkdirTemp(work, ownPattern); err != nil {
		return nil, fmt.Errorf("make a directory for the drill's daemon: %w", err)
	}
	root, run := filepath.Join(o.dir, "root"), filepath.Join(o.dir, "run")
	if err := os.Mkdir(root, 0o700); err != nil {
		return nil, errors.Join(err, o.Stop())
	}
	if err := o.mountDisk(ctx, root); err != nil {
		o.Note = "the drill's cache is in an ordinary directory: " + err.Error()
	}
	o.log = filepath.Join(o.dir, "log")
	if err := o.start(ctx, command(root, run), filepath.Join(run, "api.sock")); err != nil {
		return nil, errors.Join(err, o.Stop())
	}
	return o, nil
}

// mountDisk mounts an ext4 on dir. It has no blocks that only root may use: full is to mean full.
func (o *Own) mountDisk(ctx context.Context, dir string) error {
	file := filepath.Join(o.dir, "disk")
	free, _, err := inject.Space(o.dir)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(min(ownDisk, free/2)), f.Close()); err != nil {
		return err
	}
	for _, c := range [][]string{{"mkfs.ext4", "-q", "-F", "-m", "0", file}, {"mount", "-o", "loop", file, dir}} {
		if out, err := exec.CommandContext(ctx, c[0], c[1:]...).CombinedOutput(); err != nil {
			return errors.Join(fmt.Errorf("%s: %w: %s", c[0], err, strings.TrimSpace(string(out))), os.Remove(file))
		}
	}
	o.disk = dir
	return nil
}

func (o *Own) start(ctx context.Context, command []string, socket string) error {
	log, err := os.OpenFile(o.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	o.keeper = exec.Command(command[0], command[1:]...)
	o.keeper.Stdout, o.keeper.Stderr = log, log
	inject.OwnGroup(o.keeper)
	if err := o.keeper.Start(); err != nil {
		o.keeper = nil
		return fmt.Errorf("start the drill's keeper: %w", err)
	}
	go func() { o.ended <- o.keeper.Wait() }() // ends with the keeper, for which Stop waits
	o.Client = daemon.NewClient(socket)
	for end := time.Now().Add(startTime); ; {
		_, err := o.Client.Status(ctx)
		if err == nil {
			return nil
		}
		select {
		case err := <-o.ended:
			o.keeper = nil
			return fmt.Errorf("the drill's keeper ended: %v: %s", err, o.Log())
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pollEvery):
		}
		if time.Now().After(end) {
			return fmt.Errorf("the drill's daemon does not answer: %w: %s", err, o.Log())
		}
	}
}

// Log is the end of what the keeper and the daemon logged.
func (o *Own) Log() string {
	b, _ := os.ReadFile(o.log) // shown only
	return string(b[max(0, len(b)-4000):])
}

// Stop ends the daemon and the keeper, which must have nothing mounted, and removes what they had. After an error the directory stays.
func (o *Own) Stop() error {
	var errs []error
	if o.Client != nil {
		o.Client.Close()
	}
	if o.keeper != nil {
		errs = append(errs, o.keeper.Process.Signal(os.Interrupt))
		select {
		case err := <-o.ended:
			if err != nil {
				errs = append(errs, fmt.Errorf("the drill's keeper: %w: %s", err, o.Log()))
			}
		case <-time.After(patience):
			errs = append(errs, fmt.Errorf("the drill's keeper, process %d, does not end: something is mounted through it still: %s", o.keeper.Process.Pid, o.Log()))
		}
	}
	if o.disk != "" && errors.Join(errs...) == nil {
		if out, err := exec.Command("umount", o.disk).CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("umount %s: %w: %s", o.disk, err, strings.TrimSpace(string(out))))
		}
	}
	if errors.Join(errs...) == nil {
		errs = append(errs, os.RemoveAll(o.dir))
	}
	return errors.Join(errs...)
}
