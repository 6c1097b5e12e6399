package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"holdfast/tests/vm/wire"
)

// portFD is the number under which QEMU inherits its end of the socket behind the virtio-serial port.
const portFD = 3

// kernelArgs: a panic ends the machine at once (-no-reboot), the emulated TSC needs no watchdog, and a task asleep for a minute is
// reported. Sleeps that a signal can kill, such as a reader's wait for data, are not counted as hung by the kernel.
const kernelArgs = "console=ttyS0 panic=-1 tsc=reliable rdinit=/init sysctl.kernel.hung_task_timeout_secs=60"

// machine is the files of one boot.
type machine struct {
	kernel, initramfs, kernelLog string
	journal                      string // empty: the guest has no second serial line
	memory                       int64
	cpus                         int
	disk                         string // empty: none
	diskCache                    string // QEMU's cache mode
	shares                       []wire.Share
}

// args returns QEMU's command line. CPUs are always emulated: where KVM is offered inside another virtual machine it may open, create a
// CPU and then hang in the first instruction, which no probe tells from a slow boot, and tests should see one machine everywhere.
func (m machine) args() []string {
	a := []string{
		"-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max",
		"-smp", fmt.Sprint(m.cpus), "-m", fmt.Sprintf("%dk", m.memory>>10),
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-kernel", m.kernel, "-initrd", m.initramfs, "-append", kernelArgs,
		"-serial", "file:" + escape(m.kernelLog),
		"-device", "virtio-serial-pci",
		"-chardev", fmt.Sprintf("socket,id=port,fd=%d", portFD),
		"-device", "virtserialport,chardev=port,name=" + wire.PortName,
	}
	if m.journal != "" {
		a = append(a, "-serial", "file:"+escape(m.journal)) // which is wire.JournalTTY
	}
	a = append(a, share9p("root", wire.RootTag, "/", ",readonly=on")...)
	for i, s := range m.shares {
		a = append(a, share9p(fmt.Sprintf("fs%d", i), s.Tag, s.Dir, "")...)
	}
	if m.disk != "" {
		a = append(a, "-drive", "if=none,id=disk,format=raw,discard=unmap,cache="+m.diskCache+",file="+escape(m.disk), "-device", "virtio-blk-pci,drive=disk")
	}
	return a
}

// share9p exports a directory. multidevs=remap keeps inode numbers apart when other file systems are mounted below it.
func share9p(id, tag, dir, options string) []string {
	return []string{
		"-fsdev", "local,id=" + id + ",security_model=none,multidevs=remap" + options + ",path=" + escape(dir),
		"-device", "virtio-9p-pci,fsdev=" + id + ",mount_tag=" + tag,
	}
}

// escape protects commas in a value of QEMU's option syntax.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// qemu is a running emulator.
type qemu struct {
	port *os.File      // the host's end of the virtio-serial port
	done chan struct{} // closed when the process has ended
	err  error         // why it ended; valid after done is closed
}

// startQEMU starts the emulator; it is killed when ctx ends, and by the kernel if this process ends first.
func startQEMU(ctx context.Context, m machine) (*qemu, error) {
	ends, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("making the socket for QEMU: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(ends[0]), "vm port"), os.NewFile(uintptr(ends[1]), "vm port, QEMU's end")
	defer theirs.Close()
	var messages strings.Builder
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", m.args()...)
	cmd.Stdout, cmd.Stderr = &messages, &messages
	cmd.ExtraFiles = []*os.File{theirs}
	// Its own process group: a terminal's Ctrl-C reaches only us, and the machine is then ended by ctx, once.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	q := &qemu{port: ours, done: make(chan struct{})}
	started := make(chan error, 1)
	// This goroutine ends with the process, which ctx bounds; whoever waits for done waits for it. Its thread is locked because
	// PR_SET_PDEATHSIG means the death of the thread that started the process.
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(q.done)
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		if err := cmd.Wait(); err != nil {
			q.err = fmt.Errorf("QEMU: %w: %s", err, tail(messages.String(), 10))
			if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() && status.Signal() != syscall.SIGKILL {
				q.err = errors.Join(errCrashed, q.err)
			}
		}
	}()
	if err := <-started; err != nil {
		ours.Close()
		return nil, fmt.Errorf("starting QEMU: %w", err)
	}
	return q, nil
}

// errCrashed means that the emulator died of a signal that nobody here sent.
var errCrashed = errors.New("the emulator crashed")

// makeDisk creates a sparse file of size bytes holding an empty ext4 file system, under its final name only when it is whole.
func makeDisk(ctx context.Context, path string, size int64) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".new-")
	if err != nil {
		return fmt.Errorf("making the disk: %w", err)
	}
	defer os.Remove(tmp.Name())
	err = errors.Join(tmp.Truncate(size), tmp.Close())
	if err != nil {
		return fmt.Errorf("making the disk: %w", err)
	}
	out, err := exec.CommandContext(ctx, "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", tmp.Name()).CombinedOutput()
	if err != nil {
		return fmt.Errorf("making the disk: mkfs.ext4: %w\n%s", err, tail(string(out), 5))
	}
	return os.Rename(tmp.Name(), path)
}
