package systemd

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestUnitsAreWhatSystemdUnderstands also runs where systemd is not PID 1.
func TestUnitsAreWhatSystemdUnderstands(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skipf("systemd is not installed: %v", err)
	}
	dir := t.TempDir()
	paths := make([]string, len(unitNames))
	for i, unit := range unitNames {
		b, err := os.ReadFile(filepath.Join(packaging, unit))
		if err != nil {
			t.Fatal(err)
		}
		paths[i] = filepath.Join(dir, unit)
		// It wants the programs to be there, which is what a package sees to.
		if err := os.WriteFile(paths[i], []byte(strings.ReplaceAll(string(b), "/usr/bin/holdfast", "/bin/true")), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command("systemd-analyze", append([]string{"verify", "--man=no"}, paths...)...).CombinedOutput()
	if err != nil {
		t.Errorf("systemd-analyze verify: %v", err)
	}
	for line := range strings.Lines(string(out)) {
		if !strings.Contains(line, "Unknown key 'FileDescriptorStorePreserve'") && strings.Contains(line, dir) { // 254 knows it
			t.Error(line)
		}
	}
}

func TestDaemonHasTheMountNamespaceOfTheHost(t *testing.T) {
	s := newSystem(t)
	s.systemctl("start", service)
	ns := func(pid string) string {
		link, err := os.Readlink("/proc/" + pid + "/ns/mnt")
		if err != nil {
			t.Fatal(err)
		}
		return link
	}
	if daemon, host := ns(s.show("MainPID")), ns("1"); daemon != host {
		t.Errorf("the daemon's mount namespace is %s, the host's %s: nobody else sees what it mounts", daemon, host)
	}
}

func TestCacheDeviceIsNotClosedByHand(t *testing.T) {
	s := newSystem(t)
	if err := command("systemctl", "stop", "holdfast-cachefiles.socket"); err == nil {
		t.Error("systemctl stop closes the device that mounts depend on")
	}
	if err := command("systemctl", "is-active", "holdfast-cachefiles.socket"); err != nil {
		t.Error(err)
	}
	s.systemctl("stop", "holdfast.socket") // the API's is nobody's life
	s.systemctl("start", "holdfast.socket")

	// As docs/systemd.md has it for those who mean it.
	const dir = "/run/systemd/system/holdfast-cachefiles.socket.d"
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "stop.conf"), []byte("[Unit]\nRefuseManualStop=no\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	s.systemctl("daemon-reload")
	s.systemctl("stop", "holdfast-cachefiles.socket")
	device, err := os.OpenFile("/dev/cachefiles", os.O_RDWR, 0)
	if err != nil {
		t.Fatalf("the stopped socket still has the device: %v", err)
	}
	device.Close()
}

func TestServiceIsOutsideOfWhatIsolateAndShutdownStop(t *testing.T) {
	s := newSystem(t)
	s.systemctl("start", service)
	pid := s.number("MainPID")
	const target = "/run/systemd/system/isolated.target"
	if err := os.WriteFile(target, []byte("[Unit]\nAllowIsolate=yes\nRequires=basic.target\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(target) })
	s.systemctl("daemon-reload")
	s.systemctl("isolate", "isolated.target")
	if got := s.number("MainPID"); got != pid {
		t.Errorf("after an isolate the main process is %d, it was %d", got, pid)
	}
	for _, unit := range lasting {
		if err := command("systemctl", "is-active", unit); err != nil {
			t.Errorf("after an isolate: %v", err)
		}
		// Also units that are required are stopped, and take with them what requires them. These two never are.
		for property, allowed := range map[string][]string{"Conflicts": nil, "Requires": {"system.slice", "-.mount"}, "BindsTo": nil, "PartOf": nil} {
			for _, other := range strings.Fields(s.must("systemctl", "show", "--value", "--property="+property, unit)) {
				if !slices.Contains(allowed, other) {
					t.Errorf("%s has %s=%s: it would be stopped at shutdown, before what reads images", unit, property, other)
				}
			}
		}
	}
}

func TestEnabledServiceIsStartedAtBootBehindTheFileSystems(t *testing.T) {
	s := newSystem(t)
	s.systemctl("enable", service)
	t.Cleanup(func() {
		if err := command("systemctl", "disable", service); err != nil {
			t.Error(err)
		}
	})
	for _, unit := range unitNames {
		if err := command("systemctl", "is-enabled", unit); err != nil {
			t.Errorf("%s is not enabled with %s: %v", unit, service, err)
		}
	}
	s.systemctl("start", "multi-user.target") // what a boot comes to, without waiting for the service
	s.until("the service is started", func() bool { return s.show("ActiveState") != "activating" })
	if got := s.show("ActiveState"); got != "active" {
		t.Errorf("the service is %s after a boot", got)
	}
	for property, other := range map[string]string{"After": "local-fs.target", "Before": service} {
		if got := strings.Fields(s.must("systemctl", "show", "--value", "--property="+property, "holdfast-pre.target")); !slices.Contains(got, other) {
			t.Errorf("holdfast-pre.target has %s=%s, without %s", property, got, other)
		}
	}
	if err := command("systemctl", "is-active", "holdfast-pre.target"); err != nil {
		t.Error(err)
	}
}

func TestSystemdThatForgetsAtStopRefusesToStop(t *testing.T) {
	s := newSystem(t)
	const installed = "/run/systemd/system-generators/holdfast-generator"
	b, err := os.ReadFile(filepath.Join(packaging, "holdfast-generator"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(installed, b, 0o755); err != nil {
		t.Fatal(err)
	}
	removed := false
	remove := func() {
		if !removed {
			removed = true
			os.Remove(installed)
			s.systemctl("daemon-reload")
		}
	}
	t.Cleanup(remove) // before the service is stopped: cleanups run in reverse
	s.systemctl("daemon-reload")
	s.systemctl("start", service)
	pid := s.number("MainPID")
	forgets := s.systemdVersion() < 254
	for _, verb := range []string{"stop", "restart"} {
		if err := command("systemctl", verb, service); (err != nil) != forgets {
			t.Errorf("systemctl %s of systemd %d: error %v", verb, s.systemdVersion(), err)
		}
	}
	if forgets {
		if got := s.number("MainPID"); got != pid {
			t.Errorf("a refused stop left process %d, it was %d", got, pid)
		}
		s.systemctl("kill", service)
		s.successor(pid)
	}
	remove()
	s.systemctl("stop", service)
}
