package systemd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	service = "holdfast.service"
	root    = "/cache/holdfast" // the daemon's: on the test machine's ext4
	config  = "/etc/holdfast/config.toml"
	dropins = "/run/systemd/system/holdfast.service.d"

	// patience bounds every wait: the machine's processors are emulated, and its host may be busy.
	patience = 2 * time.Minute
)

var (
	packaging string // absolute path of packaging/systemd
	domains   int    // how many were used
)

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if packaging, err = filepath.Abs("../../packaging/systemd"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		if why := unfit(); why == "" {
			if err := install(); err != nil {
				fmt.Fprintln(os.Stderr, "install the units:", err)
				return 1
			}
		}
		return m.Run()
	}())
}

// unfit says why the units cannot be tried here, or nothing.
func unfit() string {
	comm, err := os.ReadFile("/proc/1/comm")
	switch {
	case os.Getenv("HOLDFAST_VM") == "":
		return "this is not the test machine (HOLDFAST_VM is not set)"
	case err != nil || string(comm) != "systemd\n":
		return fmt.Sprintf("PID 1 is %q, not systemd (%v)", comm, err)
	}
	return ""
}

// install does what a package does when it is installed.
func install() error {
	bin := os.Getenv("HOLDFAST_BIN")
	if bin == "" {
		return errors.New("HOLDFAST_BIN does not name the binary under test")
	}
	if err := os.Symlink(bin, "/usr/bin/holdfast"); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := copyUnits("/usr/lib/systemd/system"); err != nil {
		return err
	}
	for _, dir := range []string{root, filepath.Dir(config), dropins} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return command("systemctl", "daemon-reload")
}

// unitNames are all units, and lasting those that live until the machine is down.
var (
	lasting   = []string{"holdfast.service", "holdfast.socket", "holdfast-cachefiles.socket"}
	unitNames = append([]string{"holdfast-pre.target"}, lasting...)
)

func copyUnits(dir string) error {
	for _, unit := range unitNames {
		b, err := os.ReadFile(filepath.Join(packaging, unit))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, unit), b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// command runs a program to its end, within patience.
func command(name string, args ...string) error {
	_, err := output(name, args...)
	return err
}

func output(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
		}
		return string(out), fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return string(out), nil
}

// A system is the machine with the units installed and the sockets listening.
type system struct {
	t      *testing.T
	dir    string // for the test's own files
	domain string // of its mounts
	cursor string // of the journal, where the test begins
}

// newSystem has the sockets listen and the service stopped, with the lines of settings in the daemon's configuration.
func newSystem(t *testing.T, settings ...string) *system {
	t.Helper()
	if why := unfit(); why != "" {
		t.Skip(why)
	}
	domains++
	s := &system{t: t, domain: fmt.Sprintf("test%d", domains)}
	var err error
	if s.dir, err = os.MkdirTemp("/cache", "test-"); err != nil {
		t.Fatal(err)
	}
	lines := append([]string{`root = "` + root + `"`, `engine = "cachefiles"`, `prefetch = "off"`, `log-format = "console"`}, settings...)
	if err := os.WriteFile(config, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.cursor = s.journalCursor()
	t.Cleanup(s.end)
	s.systemctl("start", "holdfast.socket", "holdfast-cachefiles.socket")
	if got := s.show("ActiveState"); got != "inactive" {
		t.Fatalf("the service is %s before the test begins", got)
	}
	return s
}

// end unmounts what is mounted, stops the service and takes away what the test has set.
func (s *system) end() {
	for _, dir := range s.mounts() {
		if err := command("holdfast", "umount", dir); err != nil {
			s.t.Errorf("clean up: %v", err)
		}
	}
	if s.t.Failed() {
		s.t.Logf("systemd and the daemon since the test began:\n%s", s.journal())
	}
	err := errors.Join(command("systemctl", "stop", service), command("systemctl", "reset-failed"))
	err = errors.Join(err, os.RemoveAll(dropins), os.MkdirAll(dropins, 0o755), command("systemctl", "daemon-reload"), os.RemoveAll(s.dir))
	if err != nil {
		s.t.Errorf("clean up: %v", err)
	}
}

func (s *system) journalCursor() string {
	out := s.must("journalctl", "--lines=0", "--show-cursor", "--quiet")
	return strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(out), "-- cursor:"))
}

// journal is what systemd and the daemon wrote since the test began.
func (s *system) journal() string {
	out, err := output("journalctl", "--after-cursor="+s.cursor, "--quiet", "--no-pager", "--output=short-monotonic")
	if err != nil {
		return err.Error()
	}
	return out[max(0, len(out)-20_000):]
}

func (s *system) must(name string, args ...string) string {
	s.t.Helper()
	out, err := output(name, args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

func (s *system) systemctl(args ...string) string {
	s.t.Helper()
	return s.must("systemctl", args...)
}

// show is one property of the service.
func (s *system) show(property string) string {
	s.t.Helper()
	return strings.TrimSpace(s.must("systemctl", "show", "--value", "--property="+property, service))
}

func (s *system) number(property string) int {
	s.t.Helper()
	n, err := strconv.Atoi(s.show(property))
	if err != nil {
		s.t.Fatalf("property %s: %v", property, err)
	}
	return n
}

// held is how many descriptors systemd holds for the service.
func (s *system) held() int { s.t.Helper(); return s.number("NFileDescriptorStore") }

// holding is held of a service that has something to lose.
func (s *system) holding() int {
	s.t.Helper()
	n := s.held()
	if n == 0 {
		s.t.Error("systemd holds no descriptor of a daemon with a mount")
	}
	return n
}

// set puts lines into the service's [Service] section until the test ends.
func (s *system) set(lines ...string) {
	s.t.Helper()
	text := "[Service]\n" + strings.Join(lines, "\n") + "\n"
	if err := os.WriteFile(filepath.Join(dropins, "test.conf"), []byte(text), 0o644); err != nil {
		s.t.Fatal(err)
	}
	s.systemctl("daemon-reload")
}

// until waits for what is about to be true.
func (s *system) until(what string, is func() bool) {
	s.t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// successor waits until another process than old is the service's main one, and ready.
func (s *system) successor(old int) int {
	s.t.Helper()
	var pid int
	s.until("another process serves", func() bool {
		pid = s.number("MainPID")
		return pid != 0 && pid != old && s.show("ActiveState") == "active"
	})
	return pid
}

// signal sends the service's main process a signal and returns its id.
func (s *system) signal(sig syscall.Signal) int {
	s.t.Helper()
	pid := s.number("MainPID")
	if pid == 0 {
		s.t.Fatal("the service has no main process to send a signal to")
	}
	if err := syscall.Kill(pid, sig); err != nil {
		s.t.Fatalf("signal %v to process %d: %v", sig, pid, err)
	}
	return pid
}

// status is the part of `holdfast status --json` that is looked at here.
type status struct {
	PID     int `json:"pid"`
	Pending int `json:"pending"`
	Mounts  []struct {
		Dir      string `json:"dir"`
		Complete bool   `json:"complete"`
		Broken   string `json:"broken"`
	} `json:"mounts"`
}

func (s *system) status() (st status, err error) {
	out, err := output("holdfast", "status", "--json")
	if err != nil {
		return st, err
	}
	return st, json.Unmarshal([]byte(out), &st)
}

// complete waits until the image on dir needs no daemon.
func (s *system) complete(dir string) {
	s.t.Helper()
	s.until("the image is complete", func() bool {
		st, err := s.status()
		for _, m := range st.Mounts {
			if err == nil && m.Dir == dir && m.Complete {
				return true
			}
		}
		return false
	})
}

// systemdVersion is the number that systemd's documentation gives changes by.
func (s *system) systemdVersion() int {
	s.t.Helper()
	out := s.must("systemctl", "--version")
	var v int
	if _, err := fmt.Sscanf(out, "systemd %d", &v); err != nil {
		s.t.Fatalf("version of systemd in %q: %v", out, err)
	}
	return v
}

// kernelOpensAnew says whether the kernel asks for an object again whose descriptor is gone (Linux 6.8, together with `restore`:
// fs/cachefiles/ondemand.c, CACHEFILES_ONDEMAND_OBJSTATE_REOPENING).
func (s *system) kernelOpensAnew() bool {
	s.t.Helper()
	release := s.must("uname", "-r")
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		s.t.Fatalf("release of the kernel in %q: %v", release, err)
	}
	return major > 6 || major == 6 && minor >= 8
}
