package vm

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"holdfast/tests/vm/wire"
)

// Defaults of Config.
const (
	DefaultMemory   = 2 << 30
	DefaultDiskSize = 4 << 30
	DefaultCPUs     = 2
)

// DiskDir is where the guest finds the ext4 disk.
const DiskDir = wire.DiskDir

// ErrTimeout is what Run's error matches when Config.Timeout ended the machine.
var ErrTimeout = errors.New("timeout")

// byeTime bounds how long the guest may take to power off after it reported the command's end.
const byeTime = 30 * time.Second

// Config says what to boot and what to run. The zero value of every field but Command is usable.
type Config struct {
	Kernel string // path of a vmlinux with PVH; empty: EnsureKernel(DefaultSeries), with progress on Stderr
	Memory int64  // bytes; 0: DefaultMemory
	CPUs   int    // 0: DefaultCPUs

	// Disk is a raw disk image to be mounted at DiskDir, which belongs to the caller and outlives the run; it is created, with
	// DiskSize bytes and an empty ext4, if it does not exist. Empty: a new one that is removed after the run.
	Disk      string
	DiskSize  int64  // bytes, sparse; 0: DefaultDiskSize
	DiskCache string // QEMU's cache mode for Disk, such as "none"; empty: "writeback"

	// Shares are host directories that the guest writes to, at the same path as outside. Everything else of the host is seen as
	// it is, and writes to it are lost.
	Shares []string

	Command string   // looked up in Env's PATH inside
	Args    []string // without the command's name
	Env     []string // nil: the caller's environment and HOLDFAST_VM=1, which tells programs that DiskDir is there
	Dir     string   // working directory inside; empty: the caller's

	Stdout, Stderr io.Writer // nil: discarded

	// Systemd makes the host's own systemd PID 1 of the guest. It runs next to nothing but its journal and a service with the command.
	Systemd bool
	Journal string // file for the journal of that systemd; empty: a temporary one, kept unless the command exits with 0

	Timeout             time.Duration // of the whole run, boot included; 0: none
	KernelLog           string        // file for the kernel's log; empty: a temporary one, kept if the run fails
	AllowKernelWarnings bool          // do not fail on warnings in the kernel's log

	begun bool // the command was handed to the guest
}

// Run boots the machine, runs the command and powers off. It returns the command's exit code (128+n if signal n ended it), or an
// error if the command could not be run to its end, the machine had to be killed (ErrTimeout, or ctx's cause), or the kernel
// complained (*KernelLogError, with the exit code). Errors carry the end of the kernel's log and the path of the rest.
// It may be called from several goroutines at once, with different Disks.
func Run(ctx context.Context, cfg Config) (int, error) {
	if err := cfg.fill(ctx); err != nil {
		return 0, fmt.Errorf("vm: %w", err)
	}
	if cfg.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, cfg.Timeout, ErrTimeout)
		defer cancel()
	}
	ours, err := cfg.logFiles()
	if err != nil {
		return 0, fmt.Errorf("vm: %w", err)
	}
	code, err := cfg.boot(ctx)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = fmt.Errorf("killed: %w", cause)
		}
		err = fmt.Errorf("vm: %w\n%s", err, logTail("the kernel log", cfg.KernelLog))
		if cfg.Systemd {
			err = fmt.Errorf("%w\n%s", err, logTail("the journal", cfg.Journal))
		}
		return 0, err
	}
	log, err := os.ReadFile(cfg.KernelLog)
	if err != nil {
		return 0, fmt.Errorf("vm: %w", err)
	}
	if lines := complaints(string(log)); len(lines) > 0 && !cfg.AllowKernelWarnings {
		return code, fmt.Errorf("vm: %w", &KernelLogError{Lines: lines, Path: cfg.KernelLog})
	}
	for _, path := range ours {
		if path != cfg.Journal || code == 0 {
			os.Remove(path)
		} else {
			fmt.Fprintln(cfg.Stderr, "vm: the journal of the guest is in", path)
		}
	}
	return code, nil
}

// logFiles makes the files for the guest's logs that the caller did not name, and returns their paths.
func (cfg *Config) logFiles() ([]string, error) {
	var ours []string
	make := func(path *string, kind string) error {
		if *path != "" {
			return nil
		}
		f, err := os.CreateTemp("", "holdfast-vm-*."+kind)
		if err != nil {
			return err
		}
		*path = f.Name()
		ours = append(ours, f.Name())
		return f.Close()
	}
	err := make(&cfg.KernelLog, "kernel.log")
	if cfg.Systemd {
		err = errors.Join(err, make(&cfg.Journal, "journal"))
	}
	return ours, err
}

// fill sets defaults and provides the kernel and QEMU.
func (cfg *Config) fill(ctx context.Context) error {
	if cfg.Command == "" {
		return errors.New("no command given")
	}
	if cfg.Stdout == nil {
		cfg.Stdout = io.Discard
	}
	if cfg.Stderr == nil {
		cfg.Stderr = io.Discard
	}
	if cfg.Env == nil {
		cfg.Env = append(os.Environ(), "HOLDFAST_VM=1")
	}
	if cfg.Dir == "" {
		wd, err := os.Getwd()
		if err != nil {
			return err
		}
		cfg.Dir = wd
	}
	if cfg.Memory == 0 {
		cfg.Memory = DefaultMemory
	}
	if cfg.CPUs == 0 {
		cfg.CPUs = DefaultCPUs
	}
	if cfg.DiskSize == 0 {
		cfg.DiskSize = DefaultDiskSize
	}
	log := func(s string) { fmt.Fprintln(cfg.Stderr, "vm:", s) }
	if err := EnsurePackages(ctx, log, qemuPackages); err != nil {
		return err
	}
	if cfg.Kernel == "" {
		k, err := EnsureKernel(ctx, DefaultSeries, cfg.Stderr)
		if err != nil {
			return err
		}
		cfg.Kernel = k
	}
	return nil
}

// boot makes the files of the machine, runs it, and removes them.
func (cfg *Config) boot(ctx context.Context) (int, error) {
	dir, err := os.MkdirTemp("", "holdfast-vm-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	m := machine{
		kernel: cfg.Kernel, initramfs: filepath.Join(dir, "initramfs"), kernelLog: cfg.KernelLog, journal: cfg.Journal,
		memory: cfg.Memory, cpus: cfg.CPUs, disk: cfg.Disk,
		// The caller's disk has to show what a machine that loses power leaves: all that it had written. Ours is thrown away.
		diskCache: cmp.Or(cfg.DiskCache, "writeback"),
	}
	if m.disk == "" {
		m.disk, m.diskCache = filepath.Join(dir, "disk"), "unsafe"
	}
	if _, err := os.Stat(m.disk); errors.Is(err, fs.ErrNotExist) {
		if err := makeDisk(ctx, m.disk, cfg.DiskSize); err != nil {
			return 0, err
		}
	} else if err != nil {
		return 0, err
	}
	for i, s := range cfg.Shares {
		abs, err := filepath.Abs(s)
		if err != nil {
			return 0, err
		}
		m.shares = append(m.shares, wire.Share{Tag: fmt.Sprintf("share%d", i), Dir: abs})
	}
	if err := writeInitramfs(ctx, m.initramfs); err != nil {
		return 0, err
	}
	for try := 1; ; try++ {
		code, err := cfg.once(ctx, m)
		if !errors.Is(err, errCrashed) || try == maxTries || cfg.begun && (cfg.Disk != "" || len(cfg.Shares) > 0) {
			return code, err
		}
		fmt.Fprintln(cfg.Stderr, "vm: starting again, for the command can have changed nothing:", err)
	}
}

// maxTries is how often a machine is started whose emulator crashes: QEMU 7.2 does when it emulates several processors, about once
// in a hundred boots of a loaded host.
const maxTries = 3

// once boots m and has the command run in it.
func (cfg *Config) once(ctx context.Context, m machine) (int, error) {
	ctx, kill := context.WithCancel(ctx)
	defer kill()
	q, err := startQEMU(ctx, m)
	if err != nil {
		return 0, err
	}
	code, err := cfg.converse(q, wire.Task{
		Command: cfg.Command, Args: cfg.Args, Env: cfg.Env, Dir: cfg.Dir, Disk: true, Shares: m.shares, Systemd: cfg.Systemd,
	})
	if err != nil {
		kill()
	} else {
		defer time.AfterFunc(byeTime, kill).Stop()
	}
	<-q.done
	q.port.Close()
	return code, errors.Join(err, q.err)
}

// converse holds the host's part of the conversation described in package wire. It ends at the latest when QEMU does, because that
// closes the other end of the port.
func (cfg *Config) converse(q *qemu, t wire.Task) (int, error) {
	task, err := json.Marshal(t)
	if err != nil {
		return 0, err
	}
	for {
		kind, payload, err := wire.Read(q.port)
		if err == io.EOF {
			return 0, errors.New("the machine stopped before the command ended")
		}
		if err != nil {
			return 0, err
		}
		switch kind {
		case wire.Hello:
			cfg.begun = true
			err = wire.Write(q.port, wire.Job, task)
		case wire.Stdout:
			_, err = cfg.Stdout.Write(payload)
		case wire.Stderr:
			_, err = cfg.Stderr.Write(payload)
		case wire.Failure:
			return 0, fmt.Errorf("running %s in the guest: %s", cfg.Command, payload)
		case wire.Exit:
			if len(payload) != 4 {
				return 0, fmt.Errorf("exit frame of %d bytes", len(payload))
			}
			return int(int32(binary.LittleEndian.Uint32(payload))), wire.Write(q.port, wire.Bye, nil)
		default:
			return 0, fmt.Errorf("unexpected frame of kind %d from the guest", kind)
		}
		if err != nil {
			return 0, err
		}
	}
}
