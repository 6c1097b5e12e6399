// Command demo is holdfast's main job from end to end, on a real image and a slow link: Debian with Python is converted,
// pushed to a registry on loopback, mounted through a link of 50 ms and 100 Mbit/s, and Python runs from it before the
// image is downloaded. The same OCI image, pulled and unpacked whole over the same link, is timed beside it.
//
// It needs root and an engine the kernel offers; where there is none it runs itself in the test VM and says so.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"holdfast/tests/demoimage"
	"holdfast/tests/host"
	"holdfast/tests/link"
	"holdfast/tests/registry"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

const (
	rtt  = 50 * time.Millisecond
	rate = 100_000_000 / 8 // bytes per second

	script = `import json, sys; print(json.dumps({"python": sys.version.split()[0], "modules": len(sys.modules)}))`
)

func main() {
	holdfast := flag.String("holdfast", "bin/holdfast", "the holdfast binary")
	vm := flag.String("vm", "", "command that runs its arguments in the test VM, for kernels without an engine")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *holdfast, *vm); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, binary, vm string) error {
	if os.Geteuid() != 0 {
		return errors.New("mounting an image needs root: run it as root")
	}
	binary, err := filepath.Abs(binary)
	if err != nil {
		return err
	}
	say("the image: Debian with Python, from Debian's packages (made once, then cached)")
	img, err := demoimage.Ensure(ctx)
	if err != nil {
		return err
	}
	work, err := host.WorkDir()
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if reason := host.Doctor(binary, work); reason != nil {
		if vm == "" {
			return fmt.Errorf("this kernel offers neither engine: %w", reason)
		}
		return inVM(ctx, binary, vm, reason)
	}
	d := &demo{binary: binary, work: work, image: img}
	return d.run(ctx)
}

func inVM(ctx context.Context, binary, vm string, reason error) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	say("this kernel offers neither engine, so the rest runs in the test VM (emulated: its times are not those of a machine)")
	fmt.Println("  ", reason)
	args := append(strings.Fields(vm), self, "--holdfast", binary)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

type demo struct {
	binary, work string
	image        *demoimage.Image
	host         *host.Host // once it serves
}

func (d *demo) run(ctx context.Context) error {
	reg, err := registry.Start(filepath.Join(d.work, "registry"))
	if err != nil {
		return err
	}
	defer reg.Close()
	if err := d.publish(ctx, reg.Addr()); err != nil {
		return err
	}
	full, fullBytes, err := d.fullPull(ctx, reg.Addr())
	if err != nil {
		return fmt.Errorf("pull and unpack the whole image: %w", err)
	}
	lazy, lazyBytes, err := d.lazy(ctx, reg.Addr())
	if err != nil {
		return fmt.Errorf("run from the lazy mount: %w", err)
	}
	say("time to first output, %v round trip and %d Mbit/s", rtt, rate*8/1_000_000)
	fmt.Printf("   full pull and unpack   %6.2f s   %6.1f MB fetched\n", full.Seconds(), mb(fullBytes))
	fmt.Printf("   holdfast mount         %6.2f s   %6.1f MB fetched of %.1f MB (%.1f %%)\n", lazy.Seconds(), mb(lazyBytes), mb(fullBytes), 100*float64(lazyBytes)/float64(fullBytes))
	fmt.Printf("   holdfast is %.1f times as fast\n", full.Seconds()/lazy.Seconds())
	return nil
}

// publish puts the ordinary image and its conversion into the registry, next to it and not across the link.
func (d *demo) publish(ctx context.Context, addr string) error {
	say("convert it and push both to a registry on loopback")
	plain, err := d.image.V1()
	if err != nil {
		return err
	}
	ref, err := name.ParseReference(addr+"/demo:plain", name.Insecure)
	if err != nil {
		return err
	}
	if err := remote.Write(ref, plain, remote.WithContext(ctx)); err != nil {
		return fmt.Errorf("push the ordinary image: %w", err)
	}
	return d.holdfast(ctx, "convert", "oci:"+d.image.Layout+":"+demoimage.Tag, "docker://"+addr+"/demo:rafs")
}

// fullPull is what a container runtime without lazy loading does: fetch the layers, unpack them, start. Download and
// unpacking overlap here, which most runtimes do not do.
func (d *demo) fullPull(ctx context.Context, addr string) (time.Duration, int64, error) {
	say("pull and unpack the whole OCI image over the link, then run Python from it")
	l, err := link.Start(addr, link.Config{RTT: rtt, Rate: rate})
	if err != nil {
		return 0, 0, err
	}
	defer l.Close()
	root := filepath.Join(d.work, "full")
	if err := os.Mkdir(root, 0o755); err != nil {
		return 0, 0, err
	}
	start := time.Now()
	ref, err := name.ParseReference(l.Addr()+"/demo:plain", name.Insecure)
	if err != nil {
		return 0, 0, err
	}
	img, err := remote.Image(ref, remote.WithContext(ctx))
	if err != nil {
		return 0, 0, err
	}
	layers, err := img.Layers()
	if err != nil {
		return 0, 0, err
	}
	for _, layer := range layers {
		stream, err := layer.Compressed()
		if err != nil {
			return 0, 0, err
		}
		cmd := exec.CommandContext(ctx, "tar", "-xzf", "-", "-C", root)
		cmd.Stdin, cmd.Stderr = stream, os.Stderr
		err = errors.Join(cmd.Run(), stream.Close())
		if err != nil {
			return 0, 0, err
		}
	}
	if err := d.python(ctx, root); err != nil {
		return 0, 0, err
	}
	_, down := l.Bytes()
	return time.Since(start), down, nil
}

// lazy mounts the converted image across a new link and runs the same command from it.
func (d *demo) lazy(ctx context.Context, addr string) (elapsed time.Duration, fetched int64, err error) {
	say("mount the converted image with holdfast over the same link, then run Python from it")
	l, err := link.Start(addr, link.Config{RTT: rtt, Rate: rate})
	if err != nil {
		return 0, 0, err
	}
	defer l.Close()
	if d.host, err = host.Start(d.binary, d.work); err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, d.host.Stop()) }()
	root := filepath.Join(d.work, "lazy")
	if err := os.Mkdir(root, 0o755); err != nil {
		return 0, 0, err
	}
	start := time.Now()
	if err := d.holdfast(ctx, "mount", "--prefetch=off", "docker://"+l.Addr()+"/demo:rafs", root); err != nil {
		return 0, 0, err
	}
	if err := d.python(ctx, root); err != nil {
		return 0, 0, err
	}
	elapsed = time.Since(start)
	_, fetched = l.Bytes()
	return elapsed, fetched, d.holdfast(ctx, "status")
}

// holdfast runs a command as a user would type it, against the host if there is one.
func (d *demo) holdfast(ctx context.Context, args ...string) error {
	fmt.Println("   $ holdfast", strings.Join(args, " "))
	if d.host != nil {
		out, err := d.host.Run(args...)
		fmt.Print(out)
		return err
	}
	cmd := exec.CommandContext(ctx, d.binary, args...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("holdfast %s: %w", args[0], err)
	}
	return nil
}

func (d *demo) python(ctx context.Context, root string) error {
	fmt.Printf("   $ chroot %s python3 -c '...'\n", filepath.Base(root))
	cmd := exec.CommandContext(ctx, "chroot", root, "/usr/bin/python3", "-c", script)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

func mb(n int64) float64 { return float64(n) / 1e6 }

func say(format string, args ...any) { fmt.Printf("== "+format+"\n", args...) }
