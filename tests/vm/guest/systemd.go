package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"holdfast/tests/vm/wire"
)

// Where the PID 1 that became systemd left its own program, and the job, for the agent: on the tmpfs of /run.
const (
	agentDir  = "/run/holdfast-vm"
	agentFile = agentDir + "/guest"
	jobFile   = agentDir + "/job.json"
)

// unitFiles are what systemd is told. The target is what it boots to: the agent as soon as the basic system is up, and no more.
// Should that not come to pass the machine stops, and the host reports the end of the journal.
var unitFiles = map[string]string{
	"/run/systemd/system/holdfast-vm.target": `[Unit]
Description=Test machine
Requires=basic.target holdfast-vm.service
After=basic.target
JobTimeoutSec=180
JobTimeoutAction=poweroff-force
`,
	// No default dependencies: a command may test what a shutdown does. Delegate: the command has a control group of its own below,
	// which the agent kills as a whole.
	"/run/systemd/system/holdfast-vm.service": `[Unit]
Description=Command under test
DefaultDependencies=no
IgnoreOnIsolate=yes
RefuseManualStop=yes
After=basic.target
SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
Type=exec
ExecStart=` + agentFile + `
Delegate=yes
OOMScoreAdjust=-1000
TasksMax=infinity
LimitNOFILE=1024:524288
LimitCORE=0
`,
	// The limits on messages would lose those of a daemon that is being tortured.
	"/run/systemd/journald.conf.d/holdfast-vm.conf": `[Journal]
Storage=volatile
ForwardToConsole=yes
TTYPath=` + wire.JournalTTY + `
MaxLevelConsole=debug
RateLimitIntervalSec=0
`,
}

// wanted are the units that targets of the host may start in the guest. All others take time, want hardware, or touch what is not theirs.
var wanted = []string{"systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket"}

// becomeSystemd leaves the job for the agent and executes the host's systemd in place of this process. It returns only if it cannot.
func becomeSystemd(job []byte) error {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("reading the agent: %w", err)
	}
	if err := os.MkdirAll(agentDir, 0o700); err != nil {
		return err
	}
	err = errors.Join(os.WriteFile(agentFile, self, 0o700), os.WriteFile(jobFile, job, 0o600))
	for path, content := range unitFiles {
		err = errors.Join(err, os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644))
	}
	if err = errors.Join(err, maskUnits(), maskGenerators()); err != nil {
		return fmt.Errorf("preparing for systemd: %w", err)
	}
	for _, path := range []string{"/usr/lib/systemd/systemd", "/lib/systemd/systemd"} {
		// A crash of PID 1 has to end the machine: -no-reboot makes QEMU exit where the guest reboots.
		err = unix.Exec(path, []string{path, "--unit=holdfast-vm.target", "--show-status=no", "--crash-reboot=yes", "--dump-core=no"},
			[]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=vt220", "LANG=C.UTF-8"})
		if !errors.Is(err, unix.ENOENT) {
			break
		}
	}
	return fmt.Errorf("becoming the host's systemd: %w", err)
}

// maskUnits masks whatever the host's targets want. /etc is the guest's own layer here, and has precedence.
func maskUnits() error {
	var errs []error
	for _, dir := range []string{"/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"} {
		links, err := filepath.Glob(dir + "/*.target.wants/*")
		if err != nil {
			return err
		}
		for _, l := range links {
			if name := filepath.Base(l); !slices.Contains(wanted, name) {
				errs = append(errs, mask(filepath.Join("/etc/systemd/system", name)))
			}
		}
	}
	return errors.Join(errs...)
}

// maskGenerators masks the programs that would make units of what the host has in /etc: file systems, swap, scripts.
func maskGenerators() error {
	var errs []error
	for _, dir := range []string{"/etc/systemd/system-generators", "/usr/local/lib/systemd/system-generators", "/usr/lib/systemd/system-generators", "/lib/systemd/system-generators"} {
		programs, err := filepath.Glob(dir + "/*")
		if err != nil {
			return err
		}
		for _, p := range programs {
			errs = append(errs, mask(filepath.Join("/run/systemd/system-generators", filepath.Base(p))))
		}
	}
	return errors.Join(errs...)
}

func mask(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.Symlink(os.DevNull, path)
}

// agent is the service that goes on with the conversation where PID 1 left it to become systemd.
func agent(job []byte) error {
	p, err := openPort()
	if err != nil {
		return err
	}
	defer p.f.Close()
	var t wire.Task
	if err := json.Unmarshal(job, &t); err != nil {
		return fmt.Errorf("decoding the job: %w", err)
	}
	code, err := inControlGroup(t, p)
	return p.report(code, err)
}

// inControlGroup performs the task in a control group of its own below the agent's, so that what the command leaves behind can be killed.
func inControlGroup(t wire.Task, p *port) (int, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return 0, err
	}
	dir := filepath.Join("/sys/fs/cgroup", strings.TrimPrefix(strings.TrimSpace(string(b)), "0::"), "command")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return 0, fmt.Errorf("making a control group for the command: %w", err)
	}
	group, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer group.Close()
	attr := &syscall.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: int(group.Fd())}
	return perform(t, p, attr, func() error { return os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0) })
}
