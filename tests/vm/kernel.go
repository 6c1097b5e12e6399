package vm

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// DefaultSeries is the kernel series that Run boots when no kernel is named.
const DefaultSeries = "6.12"

// Series lists the kernels we test on: 6.12 has all that cachefiles has, 6.1 has no `restore`.
var Series = []string{DefaultSeries, "6.1"}

// kernelFiles hold one configuration for each series, kernel/fragment-SERIES.config, and for some a change of the source,
// kernel/patch-SERIES.diff, which says why.
//
//go:embed kernel/fragment-*.config kernel/patch-*.diff
var kernelFiles embed.FS

// EnsureKernel returns the path of a bootable vmlinux of the given series (such as "6.12"), building it from Debian's package
// linux-source-SERIES if the user's cache directory has none of this fragment, source version and compiler. A build takes minutes
// and 2 GB below the cache directory while it runs; progress gets a line for each step. Two callers at once share one build.
// As root it installs the Debian packages it lacks; otherwise it fails with the command that does.
func EnsureKernel(ctx context.Context, series string, progress io.Writer) (string, error) {
	log := func(s string) { fmt.Fprintf(progress, "test kernel %s: %s\n", series, s) }
	fragment, err := kernelFiles.ReadFile("kernel/fragment-" + series + ".config")
	if err != nil {
		return "", fmt.Errorf("building the test kernel: no configuration for series %q (there are %s): %w", series, strings.Join(Series, ", "), err)
	}
	patch, err := kernelFiles.ReadFile("kernel/patch-" + series + ".diff")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("building test kernel %s: %w", series, err)
	}
	if err := EnsurePackages(ctx, log, kernelPackages(series)); err != nil {
		return "", fmt.Errorf("building test kernel %s: %w", series, err)
	}
	b := kernelBuild{series: series, fragment: fragment, patch: patch, log: log}
	key, err := b.key(ctx)
	if err != nil {
		return "", fmt.Errorf("building test kernel %s: %w", series, err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("building test kernel %s: %w", series, err)
	}
	b.dir = filepath.Join(cache, "holdfast", "kernel", key)
	vmlinux := filepath.Join(b.dir, "vmlinux")
	if _, err := os.Stat(vmlinux); err == nil {
		return vmlinux, nil
	}
	if err := b.locked(ctx); err != nil {
		return "", fmt.Errorf("building test kernel %s: %w", series, err)
	}
	return vmlinux, nil
}

// kernelBuild is one build of one kernel into dir, which exists only once it is complete.
type kernelBuild struct {
	series   string
	fragment []byte
	patch    []byte // empty: none
	dir      string
	log      func(string)
}

// key hashes everything that decides what the kernel will be.
func (b *kernelBuild) key(ctx context.Context) (string, error) {
	h := sha256.New()
	h.Write(b.fragment)
	h.Write(b.patch)
	for _, args := range [][]string{
		{"dpkg-query", "-W", "-f", "${Version}", "linux-source-" + b.series},
		{"gcc", "--version"},
	} {
		out, err := exec.CommandContext(ctx, args[0], args[1:]...).Output()
		if err != nil {
			return "", fmt.Errorf("asking %s for a version: %w", args[0], err)
		}
		fmt.Fprintf(h, "\x00%s", out)
	}
	return b.series + "-" + hex.EncodeToString(h.Sum(nil))[:16], nil
}

// locked builds under the lock of this key, unless another process did so while this one waited for the lock.
func (b *kernelBuild) locked(ctx context.Context) error {
	if err := os.MkdirAll(filepath.Dir(b.dir), 0o755); err != nil {
		return err
	}
	lock, err := os.OpenFile(b.dir+".lock", os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := flock(ctx, lock, b.log); err != nil {
		return fmt.Errorf("locking %s: %w", lock.Name(), err)
	}
	if _, err := os.Stat(b.dir); err == nil {
		return nil
	}
	// Nobody else uses this name while the lock is held, so what is there is the rest of a build that was killed.
	work := b.dir + ".build"
	if err := os.RemoveAll(work); err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if err := os.Mkdir(work, 0o755); err != nil {
		return err
	}
	return b.build(ctx, work)
}

// flock takes an exclusive lock, asking again every half second: a blocking flock(2) could not be interrupted.
func flock(ctx context.Context, f *os.File, log func(string)) error {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for waiting := false; ; waiting = true {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return err
		}
		if !waiting {
			log("another process is building it, waiting")
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}

// build unpacks, configures, compiles and strips in work, and renames the result into place.
func (b *kernelBuild) build(ctx context.Context, work string) error {
	start := time.Now()
	src, out := filepath.Join(work, "src"), filepath.Join(work, "out")
	for _, d := range []string{src, out} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	fragment := filepath.Join(work, "fragment.config")
	if err := os.WriteFile(fragment, b.fragment, 0o644); err != nil {
		return err
	}
	b.log("unpacking the source")
	if err := b.step(ctx, work, "tar", "-xf", "/usr/src/linux-source-"+b.series+".tar.xz", "-C", src, "--strip-components=1"); err != nil {
		return err
	}
	if len(b.patch) > 0 {
		diff := filepath.Join(work, "patch.diff")
		if err := os.WriteFile(diff, b.patch, 0o644); err != nil {
			return err
		}
		if err := b.step(ctx, src, "patch", "-p1", "--fuzz=0", "-i", diff); err != nil {
			return err
		}
	}
	if err := b.step(ctx, src, "scripts/kconfig/merge_config.sh", "-n", fragment); err != nil {
		return err
	}
	config, err := os.ReadFile(filepath.Join(src, ".config"))
	if err != nil {
		return err
	}
	if lost := lostOptions(b.fragment, config); len(lost) > 0 {
		return fmt.Errorf("options that kernel/fragment-%s.config wants and the kernel's configuration does not have (a dependency is missing): %s",
			b.series, strings.Join(lost, ", "))
	}
	b.log("compiling, which takes about 8 minutes on two cores and is done once")
	if err := b.step(ctx, src, "nice", "make", fmt.Sprintf("-j%d", runtime.NumCPU()), "vmlinux"); err != nil {
		return err
	}
	if err := b.step(ctx, src, "strip", "-s", "-o", filepath.Join(out, "vmlinux"), "vmlinux"); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(out, ".config"), config, 0o644); err != nil {
		return err
	}
	if err := os.Rename(out, b.dir); err != nil {
		return err
	}
	b.log("built in " + time.Since(start).Round(time.Second).String())
	return nil
}

// step runs one command in dir. What it printed is only of interest if it failed.
func (b *kernelBuild) step(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "ARCH=x86_64", "KBUILD_BUILD_USER=holdfast", "KBUILD_BUILD_HOST=holdfast")
	// make's own children outlive it unless the whole group is killed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, tail(string(out), 30))
	}
	return nil
}

// lostOptions returns the lines of the fragment that config does not fulfil. "# CONFIG_X is not set" is fulfilled by X's absence.
func lostOptions(fragment, config []byte) []string {
	have := make(map[string]string)
	for line := range strings.Lines(string(config)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && strings.HasPrefix(name, "CONFIG_") {
			have[name] = value
		}
	}
	var lost []string
	for line := range strings.Lines(string(fragment)) {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutSuffix(line, " is not set"); ok {
			if _, set := have[strings.TrimPrefix(name, "# ")]; set {
				lost = append(lost, line)
			}
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		if ok && strings.HasPrefix(name, "CONFIG_") && have[name] != value {
			lost = append(lost, line)
		}
	}
	return lost
}
