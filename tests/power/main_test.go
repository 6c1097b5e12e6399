package power

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/tests/host"
)

// seed is that of everything random here.
var seed = uint64(time.Now().UnixNano()) % 1_000_000

// scratch holds what all tests share, with a tmpfs in it for disks. It goes with the process.
var scratch string

// apart is the environment that tells the process in a mount namespace of its own from the one that started it.
const apart = "HOLDFAST_POWER_APART"

func TestMain(m *testing.M) {
	if os.Getenv(machinePart) != "" {
		os.Exit(inMachine())
	}
	if os.Geteuid() == 0 && os.Getenv(apart) == "" {
		os.Exit(runApart())
	}
	os.Exit(func() int {
		end, err := setUp()
		defer end()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

// runApart runs this program again in a mount namespace of its own, with which everything goes that it mounts.
func runApart() int {
	runtime.LockOSThread() // whose end the program does not outlive
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), apart+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return cmd.ProcessState.ExitCode()
}

func setUp() (end func(), err error) {
	end = func() {}
	if s := os.Getenv("HOLDFAST_SEED"); s != "" {
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			return end, fmt.Errorf("HOLDFAST_SEED: %w", err)
		}
	}
	if scratch, err = host.WorkDir(); err != nil {
		return end, err
	}
	end = func() {
		_ = unix.Unmount(ram(""), unix.MNT_DETACH)
		if err := os.RemoveAll(scratch); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	if os.Geteuid() != 0 {
		return end, nil
	}
	if err := os.Mkdir(ram(""), 0o700); err != nil {
		return end, err
	}
	return end, unix.Mount("tmpfs", ram(""), "tmpfs", 0, "size=1500m")
}

// ram is a file in memory.
func ram(name string) string { return filepath.Join(scratch, "ram", name) }

// holdfast is the program under test.
var holdfast = sync.OnceValues(func() (string, error) {
	if bin := os.Getenv("HOLDFAST_BIN"); bin != "" {
		return bin, nil
	}
	bin := filepath.Join(scratch, "holdfast")
	cmd := exec.Command("go", "build", "-o", bin, "holdfast/cmd/holdfast")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build holdfast: %w: %s", err, out)
	}
	return bin, nil
})

// engine is what serve is told; it skips where none works, which `holdfast doctor` has to prove by trying.
func engine(t *testing.T) string {
	t.Helper()
	bin, err := holdfast()
	if err != nil {
		t.Fatal(err)
	}
	if e := os.Getenv("HOLDFAST_ENGINE"); e != "" {
		return e
	}
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root, and this is not root")
	}
	if err := host.Doctor(bin, scratch); err != nil {
		t.Skipf("this kernel offers no engine, as holdfast doctor found by trying: %v", err)
	}
	return "auto"
}

// rounds is how many times the power is cut on each file system.
func rounds(t *testing.T) int {
	t.Helper()
	s := os.Getenv("HOLDFAST_POWER")
	if s == "" && inVM() {
		return 1
	}
	if s == "" {
		return 2
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("HOLDFAST_POWER: %q is no number of rounds", s)
	}
	return n
}

// random gives the random numbers of one purpose.
func random(purpose string) *rand.Rand {
	var n uint64
	for _, c := range purpose {
		n = n*31 + uint64(c)
	}
	return rand.New(rand.NewPCG(seed, n))
}

func inVM() bool { return os.Getenv("HOLDFAST_VM") != "" }

// patience bounds every wait. A loaded host takes long, the test machine longer.
const patience = 2 * time.Minute

// until waits for something that nothing announces.
func until(what string, is func() error) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		err := is()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: not within %v: %w", what, patience, err)
		}
	}
}

// run runs a command.
func run(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out)), nil
}
