package vm

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// systemdShell is shell on a machine whose PID 1 is the host's systemd.
func systemdShell(t *testing.T, script string) Config {
	t.Helper()
	if _, err := os.Stat("/lib/systemd/systemd"); err != nil {
		t.Skipf("this host has no systemd that the machine could boot: %v", err)
	}
	cfg := shell(t, script)
	cfg.Systemd, cfg.Journal = true, filepath.Join(t.TempDir(), "journal")
	return cfg
}

func TestSystemdIsPIDOneAndTheCommandsServiceRuns(t *testing.T) {
	var out bytes.Buffer
	cfg := systemdShell(t, `cat /proc/1/comm; systemctl is-active basic.target; systemctl list-jobs --no-legend; grep -c . /proc/self/cgroup; sleep 1000 & echo >&2; exit 7`)
	cfg.Stdout = &out
	mustRun(t, cfg, 7)
	if want := "systemd\nactive\n1\n"; out.String() != want {
		t.Errorf("standard output %q, want %q", out.String(), want)
	}
}

func TestJournalOfTheGuestReachesTheHost(t *testing.T) {
	cfg := systemdShell(t, "echo from a command | systemd-cat && journalctl --sync")
	mustRun(t, cfg, 0)
	journal, err := os.ReadFile(cfg.Journal)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(journal), "from a command") {
		t.Errorf("the journal lacks what a command wrote:\n%s", journal)
	}
}

func TestMachineEndsWithItsSystemd(t *testing.T) {
	for name, script := range map[string]string{
		"shutdown": "systemctl poweroff; sleep 1000",
		"crash":    "kill -SEGV 1; sleep 1000",
	} {
		t.Run(name, func(t *testing.T) {
			code, err := Run(t.Context(), systemdShell(t, script))
			if err == nil {
				t.Fatalf("exit code %d of a command that did not end", code)
			}
			if errors.Is(err, ErrTimeout) {
				t.Fatal(err)
			}
		})
	}
}
