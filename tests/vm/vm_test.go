package vm

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// kernel is found, or built, once: the build's progress goes to the terminal, as it takes minutes.
var kernel = sync.OnceValues(func() (string, error) {
	return EnsureKernel(context.Background(), DefaultSeries, os.Stderr)
})

// shell is a run of a shell script with bounded time and the tests' kernel.
func shell(t *testing.T, script string) Config {
	t.Helper()
	k, err := kernel()
	if err != nil {
		t.Fatal(err)
	}
	return Config{
		Kernel: k, Command: "sh", Args: []string{"-c", script}, Stdout: t.Output(), Stderr: t.Output(),
		Timeout: 3 * time.Minute, KernelLog: filepath.Join(t.TempDir(), "kernel.log"),
	}
}

// writeFunc is an io.Writer.
type writeFunc func([]byte) (int, error)

func (f writeFunc) Write(b []byte) (int, error) { return f(b) }

// mustRun runs cfg and fails the test unless the machine worked and the command exited with code.
func mustRun(t *testing.T, cfg Config, code int) {
	t.Helper()
	got, err := Run(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if got != code {
		t.Fatalf("exit code %d, want %d", got, code)
	}
}

func TestExitCodePassesThrough(t *testing.T) {
	for script, code := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -9 $$": 128 + 9} {
		t.Run(script, func(t *testing.T) { mustRun(t, shell(t, script), code) })
	}
}

func TestCommandGetsArgumentsEnvironmentAndDirectoryAsGiven(t *testing.T) {
	cfg := shell(t, "")
	cfg.Command, cfg.Args = "sh", []string{"-c", `printf '%s|%s|%s' "$PWD" "$A" "$1"`, "sh", "two words"}
	cfg.Env, cfg.Dir = []string{"PATH=/usr/bin:/bin", "A=b c\n"}, t.TempDir()
	var out bytes.Buffer
	cfg.Stdout = &out
	mustRun(t, cfg, 0)
	if want := cfg.Dir + "|b c\n|two words"; out.String() != want {
		t.Errorf("the command saw %q, want %q", out.String(), want)
	}
}

// TestOutputIsByteExact has a host that reads slowly, so that output is still queued in the port when the command ends: it is lost
// if the guest powers off without waiting for the host.
func TestOutputIsByteExact(t *testing.T) {
	const seed = 1
	file := filepath.Join(t.TempDir(), "noise")
	want := make([]byte, 2<<20+13)
	src := rand.NewChaCha8([32]byte{seed})
	src.Read(want)
	if err := os.WriteFile(file, want, 0o600); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	cfg := shell(t, "cat $NOISE & cat $NOISE >&2; wait")
	cfg.Env = append(os.Environ(), "NOISE="+file)
	slowly := func(b *bytes.Buffer) io.Writer {
		return writeFunc(func(p []byte) (int, error) { time.Sleep(10 * time.Millisecond); return b.Write(p) })
	}
	cfg.Stdout, cfg.Stderr = slowly(&out), slowly(&errs)
	mustRun(t, cfg, 0)
	for name, got := range map[string][]byte{"standard output": out.Bytes(), "standard error": errs.Bytes()} {
		if !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes arrived that differ from the %d written (seed %d)", name, len(got), len(want), seed)
		}
	}
}

func TestOutputLeftInAPipeByABackgroundProcessArrives(t *testing.T) {
	var out bytes.Buffer
	cfg := shell(t, "sleep 1000 & echo done")
	cfg.Stdout = &out
	mustRun(t, cfg, 0)
	if out.String() != "done\n" {
		t.Errorf("standard output %q, want %q", out.String(), "done\n")
	}
}

func TestGoTestBinaryRunsInside(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "wire.test")
	build := exec.Command("go", "test", "-c", "-o", bin, "holdfast/tests/vm/wire")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building a test binary: %v\n%s", err, out)
	}
	var out bytes.Buffer
	cfg := shell(t, "")
	cfg.Command, cfg.Args, cfg.Stdout = bin, []string{"-test.v"}, io.MultiWriter(&out, t.Output())
	mustRun(t, cfg, 0)
	if !strings.Contains(out.String(), "--- PASS: TestFramesComeBackAsTheyWere") || !strings.HasSuffix(out.String(), "PASS\n") {
		t.Error("the test binary exited with 0 without reporting a pass")
	}
}

func TestCachefilesBindsOnDemandOnTheDisk(t *testing.T) {
	// One write(2) per command, which is what the shell's printf makes. The refusal on tmpfs shows that the kernel looked.
	mustRun(t, shell(t, `
		mkdir /cache/store /run/store || exit 1
		exec 3<>/dev/cachefiles || exit 2
		printf 'dir /run/store' >&3 && printf 'tag test' >&3 || exit 3
		! printf 'bind ondemand' >&3 || exit 4
		exec 3>&-
		exec 3<>/dev/cachefiles || exit 5
		printf 'dir /cache/store' >&3 && printf 'tag test' >&3 || exit 6
		printf 'bind ondemand' >&3 || exit 7
		test -d /cache/store/cache || exit 8
	`), 0)
}

func TestOnlySharesAreWritten(t *testing.T) {
	share, other := t.TempDir(), t.TempDir()
	cfg := shell(t, "echo in > $SHARE/file && echo in > $OTHER/file && test -s $OTHER/file")
	cfg.Env, cfg.Shares = append(os.Environ(), "SHARE="+share, "OTHER="+other), []string{share}
	mustRun(t, cfg, 0)
	if b, err := os.ReadFile(filepath.Join(share, "file")); err != nil || string(b) != "in\n" {
		t.Errorf("file written in the share: %q, error %v", b, err)
	}
	if _, err := os.Stat(filepath.Join(other, "file")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("file written outside the share: error %v, want that it does not exist on the host", err)
	}
}

func TestSyncedFileOnTheCallersDiskSurvivesPowerCut(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	cut := shell(t, "echo kept > /cache/file && sync && echo b > /proc/sysrq-trigger; sleep 1000")
	cut.Disk = disk
	if code, err := Run(t.Context(), cut); err == nil {
		t.Fatalf("the machine that lost power reported exit code %d", code)
	} else if errors.Is(err, ErrTimeout) {
		t.Fatal(err)
	}
	var out bytes.Buffer
	again := shell(t, "cat /cache/file")
	again.Disk, again.Stdout = disk, &out
	mustRun(t, again, 0)
	if out.String() != "kept\n" {
		t.Errorf("after the power cut the file holds %q, want %q", out.String(), "kept\n")
	}
}

func TestTimeoutKillsTheMachine(t *testing.T) {
	cfg := shell(t, "sleep 1000")
	cfg.Timeout = 8 * time.Second
	_, err := Run(t.Context(), cfg)
	if !errors.Is(err, ErrTimeout) {
		t.Fatalf("error %v, want %v", err, ErrTimeout)
	}
	if !strings.Contains(err.Error(), cfg.KernelLog) || !strings.Contains(err.Error(), "] ") {
		t.Errorf("error %q has no end of the kernel log", err)
	}
}

func TestCancelKillsTheMachine(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cfg := shell(t, "echo started; sleep 1000")
	cfg.Stdout = writeFunc(func(b []byte) (int, error) { cancel(); return len(b), nil })
	if _, err := Run(ctx, cfg); !errors.Is(err, context.Canceled) || errors.Is(err, ErrTimeout) {
		t.Fatalf("error %v, want %v", err, context.Canceled)
	}
}

func TestKernelWarningFailsARunUnlessAllowed(t *testing.T) {
	cfg := shell(t, "echo '<4>WARNING: CPU: 0 PID: 1 at a test' > /dev/kmsg; exit 3")
	code, err := Run(t.Context(), cfg)
	var complaint *KernelLogError
	if !errors.As(err, &complaint) || len(complaint.Lines) != 1 || !strings.Contains(complaint.Lines[0], "at a test") || code != 3 {
		t.Fatalf("exit code %d, error %v; want 3 and the warning", code, err)
	}
	cfg.AllowKernelWarnings = true
	mustRun(t, cfg, 3)
}

func TestMissingCommandIsTheMachinesError(t *testing.T) {
	cfg := shell(t, "")
	cfg.Command = "no-such-command"
	if code, err := Run(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "no-such-command") {
		t.Fatalf("exit code %d, error %v; want an error that names the command", code, err)
	}
}
