// Command hfvm runs one command in a test virtual machine and exits with its exit code.
//
//	hfvm [flags] -- command [argument...]   run it, in the current directory with the current environment
//	hfvm [flags] kernel                     build the kernel if it is not cached, and print its path
//
// It exits with 125 if the machine itself failed, and with 2 on wrong usage.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"holdfast/tests/vm"
)

// exitMachine is the exit code for a failure that is not the command's, as in env(1) and podman-run(1).
const exitMachine = 125

func main() {
	var (
		cfg    = vm.Config{Stdout: os.Stdout, Stderr: os.Stderr}
		series = flag.String("series", vm.DefaultSeries, "kernel `series` to build and boot: "+strings.Join(vm.Series, " or "))
		memory = flag.Int64("memory", vm.DefaultMemory>>20, "memory in `MiB`")
		disk   = flag.Int64("disk-size", vm.DefaultDiskSize>>20, "size of a new disk in `MiB`")
	)
	flag.IntVar(&cfg.CPUs, "cpus", vm.DefaultCPUs, "`number` of CPUs")
	flag.StringVar(&cfg.Disk, "disk", "", "disk image `file` to use and keep, created if missing (default: a temporary one)")
	flag.StringVar(&cfg.DiskCache, "disk-cache", "", "QEMU's cache `mode` for -disk (default: writeback)")
	flag.DurationVar(&cfg.Timeout, "timeout", 0, "kill the machine after this `time` (default: never)")
	flag.StringVar(&cfg.KernelLog, "kernel-log", "", "`file` for the kernel's log (default: a temporary one, kept on failure)")
	flag.BoolVar(&cfg.Systemd, "systemd", false, "boot the host's systemd as PID 1, and run the command in a service of it")
	flag.StringVar(&cfg.Journal, "journal", "", "`file` for the journal of that systemd (default: a temporary one, kept on failure)")
	flag.BoolVar(&cfg.AllowKernelWarnings, "allow-kernel-warnings", false, "do not fail if the kernel's log has warnings")
	flag.Func("share", "`directory` that the guest may write to (repeatable)", func(s string) error {
		cfg.Shares = append(cfg.Shares, s)
		return nil
	})
	flag.Usage = usage
	flag.Parse()
	cfg.Memory, cfg.DiskSize = *memory<<20, *disk<<20

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if flag.NArg() == 0 {
		usage()
		os.Exit(2)
	}
	kernel, err := vm.EnsureKernel(ctx, *series, os.Stderr)
	if err != nil {
		fail(err)
	}
	// `hfvm kernel` builds; `hfvm -- kernel` runs a program of that name.
	if args := os.Args[len(os.Args)-flag.NArg()-1:]; args[0] != "--" && flag.Arg(0) == "kernel" {
		fmt.Println(kernel)
		return
	}
	cfg.Kernel, cfg.Command, cfg.Args = kernel, flag.Arg(0), flag.Args()[1:]
	code, err := vm.Run(ctx, cfg)
	if err != nil {
		fail(err)
	}
	os.Exit(code)
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "hfvm:", err)
	os.Exit(exitMachine)
}

func usage() {
	fmt.Fprint(os.Stderr, "usage: hfvm [flags] -- command [argument...]\n       hfvm [flags] kernel\n\nflags:\n")
	flag.PrintDefaults()
}
