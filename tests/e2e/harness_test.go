package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// bin is the holdfast binary under test.
var bin string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if bin = os.Getenv("HOLDFAST_BIN"); bin == "" {
			dir, err := os.MkdirTemp("", "holdfast-e2e-")
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			defer os.RemoveAll(dir)
			bin = filepath.Join(dir, "holdfast")
			cmd := exec.Command("go", "build", "-o", bin, "holdfast/cmd/holdfast")
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := cmd.CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "build holdfast: %v: %s\n", err, out)
				return 1
			}
		}
		return m.Run()
	}())
}

// needKernel skips the test where the kernel offers no engine, which `holdfast doctor` has to prove by trying. With
// HOLDFAST_ENGINE set there is no skipping.
func needKernel(t *testing.T) string {
	t.Helper()
	if e := os.Getenv("HOLDFAST_ENGINE"); e != "" {
		return e
	}
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root, and this is not root")
	}
	out, err := exec.Command(bin, "--root", workDir(t), "doctor").CombinedOutput()
	if err != nil {
		t.Skipf("this kernel offers no engine, as holdfast doctor found by trying: %s", out)
	}
	return "auto"
}

// workDir is a directory on a file system that an engine can keep a cache on.
func workDir(t *testing.T) string {
	t.Helper()
	base := "/var/tmp"
	if _, err := os.Stat("/cache"); err == nil && os.Getenv("HOLDFAST_VM") != "" {
		base = "/cache"
	}
	dir, err := os.MkdirTemp(base, "holdfast-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return dir
}

// A host is one holdfast installation: its directories, a keeper and a daemon.
type host struct {
	t    *testing.T
	dir  string
	log  string
	keep *exec.Cmd
}

// newHost starts a keeper and a daemon with more flags for serve, and stops them when the test ends.
func newHost(t *testing.T, serve ...string) *host {
	t.Helper()
	engine := needKernel(t)
	h := &host{t: t, dir: workDir(t)}
	h.log = filepath.Join(h.dir, "serve.log")
	h.start(append([]string{"--engine", engine}, serve...)...)
	t.Cleanup(h.stop)
	return h
}

func (h *host) global(args ...string) []string {
	return append([]string{"--root", filepath.Join(h.dir, "root"), "--run", filepath.Join(h.dir, "run")}, args...)
}

func (h *host) start(serve ...string) {
	h.t.Helper()
	out, err := os.OpenFile(h.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		h.t.Fatal(err)
	}
	defer out.Close()
	args := append(h.global("keep", "--", bin), h.global("serve")...)
	h.keep = exec.Command(bin, append(args, serve...)...)
	h.keep.Stdout, h.keep.Stderr = out, out
	if err := h.keep.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.waitUp()
}

// waitUp polls until the daemon answers; it is bounded by 60 s.
func (h *host) waitUp() {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		if exec.CommandContext(ctx, bin, h.global("status", "--json")...).Run() == nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	h.t.Fatalf("the daemon does not answer within 60 s:\n%s", h.logTail())
}

func (h *host) stop() {
	h.t.Helper()
	for _, m := range h.mounts() {
		if out, err := h.run("umount", m); err != nil {
			h.t.Errorf("umount %s: %v: %s", m, err, out)
			if err := unix.Unmount(m, unix.MNT_DETACH); err != nil {
				h.t.Errorf("detach %s: %v", m, err)
			}
		}
	}
	if err := h.keep.Process.Signal(unix.SIGTERM); err != nil {
		h.t.Errorf("stop the keeper: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- h.keep.Wait() }() // ends with the keeper, which is killed below at the latest
	select {
	case err := <-done:
		if err != nil {
			h.t.Errorf("keeper: %v\n%s", err, h.logTail())
		}
	case <-time.After(60 * time.Second):
		h.keep.Process.Kill()
		<-done
		h.t.Errorf("the keeper does not stop within 60 s:\n%s", h.logTail())
	}
	if h.t.Failed() {
		h.t.Logf("the daemon's log:\n%s", h.logTail())
	}
}

// mounts lists the EROFS mounts below the host's directory.
func (h *host) mounts() []string {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		h.t.Fatal(err)
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) > 4 && strings.HasPrefix(f[4], h.dir+"/") && strings.Contains(line, " - erofs ") {
			out = append(out, f[4])
		}
	}
	return out
}

func (h *host) logTail() string {
	b, _ := os.ReadFile(h.log)
	return string(b[max(0, len(b)-8000):])
}

// run runs a holdfast command against this host and returns what it printed.
func (h *host) run(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, bin, h.global(args...)...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), errors.Join(err, errors.New(stderr.String()))
	}
	return stdout.String(), nil
}

func (h *host) must(args ...string) string {
	h.t.Helper()
	out, err := h.run(args...)
	if err != nil {
		h.t.Fatalf("holdfast %s: %v\ndaemon: %s", strings.Join(args, " "), err, h.logTail())
	}
	return out
}

// mount mounts image on a new directory and returns it.
func (h *host) mount(image string, flags ...string) string {
	h.t.Helper()
	dir, err := os.MkdirTemp(h.dir, "mnt-")
	if err != nil {
		h.t.Fatal(err)
	}
	h.must(append(append([]string{"mount"}, flags...), image, dir)...)
	return dir
}

// status is what `holdfast status --json` prints, decoded into v.
func (h *host) status(v any) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(h.must("status", "--json")), v); err != nil {
		h.t.Fatal(err)
	}
}

// dropCaches makes the kernel ask for data again, from the cache files.
func dropCaches(t *testing.T) {
	t.Helper()
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
}
