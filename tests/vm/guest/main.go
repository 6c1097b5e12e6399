// Command guest is PID 1 of the virtual machines that package vm boots: it makes the file systems, runs one command, reports its
// output and exit code over the virtio-serial port, and powers off. Where systemd is to be PID 1 it makes the file systems and the
// unit files, becomes systemd, and does the rest as a service (the agent). It never runs on a host: it refuses to be anything but
// PID 1, or a service that such a PID 1 has left a job for.
package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/tests/vm/wire"
)

// drainTime bounds how long output is awaited after the command ended and everything else was killed: only a process that
// cannot be killed (asleep in the kernel) holds a pipe open longer.
const drainTime = 5 * time.Second

// portTime bounds the wait for the virtio-serial port, which the kernel announces from a work queue after it started PID 1.
const portTime = 20 * time.Second

func main() {
	role := serve
	switch job, err := os.ReadFile(jobFile); {
	case os.Getpid() == 1:
	case err == nil:
		role = func() error { return agent(job) }
	default:
		fmt.Fprintln(os.Stderr, "guest: this is PID 1 of a test virtual machine and does nothing elsewhere")
		os.Exit(2)
	}
	if err := role(); err != nil {
		// Standard error is the console or the journal here, so this lands in a log.
		fmt.Fprintln(os.Stderr, "guest:", err)
	}
	syscall.Sync()
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	fmt.Fprintln(os.Stderr, "guest: powering off:", err)
}

// serve holds the conversation described in package wire, up to the Job if systemd takes over there.
func serve() error {
	if err := mountKernelFS(""); err != nil {
		return err
	}
	p, err := openPort()
	if err != nil {
		return err
	}
	defer p.f.Close()
	if err := p.send(wire.Hello, nil); err != nil {
		return err
	}
	kind, job, err := wire.Read(p.f)
	if err != nil {
		return err
	}
	if kind != wire.Job {
		return fmt.Errorf("expected a job, got frame of kind %d", kind)
	}
	var t wire.Task
	if err := json.Unmarshal(job, &t); err != nil {
		return fmt.Errorf("decoding the job: %w", err)
	}
	if err := prepare(t); err != nil {
		return p.report(0, err)
	}
	if t.Systemd {
		return p.report(0, becomeSystemd(job)) // it returns only if it failed
	}
	// Everything but PID 1 is the command's.
	code, err := perform(t, p, &syscall.SysProcAttr{Setsid: true}, func() error { return unix.Kill(-1, unix.SIGKILL) })
	return p.report(code, err)
}

// report ends the conversation: with the command's exit code, or with why it could not be run.
func (p *port) report(code int, err error) error {
	if err != nil {
		err = p.send(wire.Failure, []byte(err.Error()))
	} else {
		err = p.send(wire.Exit, binary.LittleEndian.AppendUint32(nil, uint32(code)))
	}
	if err != nil {
		return err
	}
	if kind, _, err := wire.Read(p.f); err != nil || kind != wire.Bye {
		return fmt.Errorf("expected bye, got frame of kind %d, error %v", kind, err)
	}
	return nil
}

// port is the guest's end of the conversation; both output pumps write to it.
type port struct {
	mu sync.Mutex
	f  *os.File
}

func (p *port) send(k wire.Kind, payload []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return wire.Write(p.f, k, payload)
}

// openPort finds the port by name in sysfs: device numbers depend on the order of PCI slots.
func openPort() (*port, error) {
	for deadline := time.Now().Add(portTime); ; time.Sleep(5 * time.Millisecond) {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			b, err := os.ReadFile(n)
			if err != nil {
				return nil, fmt.Errorf("reading the name of a virtio port: %w", err)
			}
			if strings.TrimSpace(string(b)) == wire.PortName {
				f, err := os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR, 0)
				return &port{f: f}, err
			}
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("no virtio port named %s within %v", wire.PortName, portTime)
		}
	}
}

// perform runs the command with attr to its end, kills what it left behind, and returns its exit code: 128+n if signal n ended it.
func perform(t wire.Task, p *port, attr *syscall.SysProcAttr, killRest func() error) (int, error) {
	ws, err := run(t, p, attr, killRest)
	if err != nil {
		return 0, err
	}
	if t.Disk {
		// A mount that is still in use keeps the disk busy; its journal and the sync then do what unmounting would.
		if err := unix.Unmount(wire.DiskDir, 0); err != nil && !errors.Is(err, unix.EBUSY) {
			return 0, fmt.Errorf("unmounting %s: %w", wire.DiskDir, err)
		}
	}
	syscall.Sync()
	if ws.Signaled() {
		return 128 + int(ws.Signal()), nil
	}
	return ws.ExitStatus(), nil
}

// run starts the command, pumps its output, reaps every child of this process until the command has ended, then kills the rest.
// It does not use exec.Cmd: PID 1 has to wait for any child, which would steal the status that Cmd.Wait wants.
func run(t wire.Task, p *port, attr *syscall.SysProcAttr, killRest func() error) (syscall.WaitStatus, error) {
	for _, e := range t.Env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			os.Setenv("PATH", v)
		}
	}
	if err := os.Chdir(t.Dir); err != nil {
		return 0, fmt.Errorf("entering the working directory: %w", err)
	}
	path, err := exec.LookPath(t.Command)
	if err != nil {
		return 0, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	var pumps sync.WaitGroup
	stdout, err := pump(&pumps, p, wire.Stdout)
	if err != nil {
		return 0, err
	}
	stderr, err := pump(&pumps, p, wire.Stderr)
	if err != nil {
		return 0, err
	}
	pid, err := syscall.ForkExec(path, append([]string{t.Command}, t.Args...), &syscall.ProcAttr{
		Dir: t.Dir, Env: t.Env, Files: []uintptr{null.Fd(), stdout.Fd(), stderr.Fd()}, Sys: attr,
	})
	stdout.Close()
	stderr.Close()
	if err != nil {
		return 0, fmt.Errorf("starting %s: %w", path, err)
	}
	ws, err := reapUntil(pid)
	if err != nil {
		return 0, err
	}
	if err := killRest(); err != nil && !errors.Is(err, unix.ESRCH) { // which means that nothing else was running
		return 0, fmt.Errorf("killing what the command left running: %w", err)
	}
	drained := make(chan struct{})
	go func() { pumps.Wait(); close(drained) }() // ends with the machine at the latest
	select {
	case <-drained:
	case <-time.After(drainTime):
		fmt.Fprintln(os.Stderr, "guest: a process that cannot be killed still holds the command's output open")
	}
	return ws, nil
}

// pump makes a pipe and starts a goroutine, counted in wg, that sends what is written to it until its last writer closes it.
func pump(wg *sync.WaitGroup, p *port, k wire.Kind) (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	wg.Go(func() {
		defer r.Close()
		buf := make([]byte, 64<<10)
		for {
			n, err := r.Read(buf)
			if n > 0 {
				if err := p.send(k, buf[:n]); err != nil {
					fmt.Fprintln(os.Stderr, "guest: sending output:", err)
					return
				}
			}
			if err == io.EOF {
				return
			}
			if err != nil {
				fmt.Fprintln(os.Stderr, "guest: reading output:", err)
				return
			}
		}
	})
	return w, nil
}

// reapUntil waits for children, orphans included, until pid has ended, and returns its status.
func reapUntil(pid int) (syscall.WaitStatus, error) {
	for {
		var ws syscall.WaitStatus
		got, err := syscall.Wait4(-1, &ws, 0, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("waiting for the command: %w", err)
		}
		if got == pid {
			return ws, nil
		}
	}
}
