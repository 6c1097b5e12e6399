package power

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"holdfast/tests/registry"
	"holdfast/tests/vm"
)

// What makes this program the part of TestMachineIsKilled that is in the machine: what was known when the machine before it was killed, or
// machineFirst.
const (
	machinePart  = "HOLDFAST_POWER_MACHINE"
	machineFirst = "first"
	machineStore = "HOLDFAST_POWER_STORE" // the directory of the registry
)

// Where the registry and the proxies of the images are in the machine: in each boot the same.
const (
	registryAddr = "127.0.0.1:5000"
	readAddr     = "127.0.0.1:5001"
	keptAddr     = "127.0.0.1:5002"
)

func TestMachineIsKilled(t *testing.T) {
	if inVM() {
		t.Skip("this is the test machine, which cannot kill itself and boot again")
	}
	bin, err := holdfast()
	if err != nil {
		t.Fatal(err)
	}
	store := filepath.Join(scratch, "machine")
	push(t, store)
	self := filepath.Join(scratch, "power.test")
	build := exec.Command("go", "test", "-c", "-o", self, "holdfast/tests/power")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build this test: %v: %s", err, out)
	}
	disk := filepath.Join(scratch, "machine.disk")
	machine := func(part string, stdout io.Writer) vm.Config {
		return vm.Config{
			Command: self, Stdout: stdout, Stderr: t.Output(), Timeout: 15 * time.Minute, Disk: disk, DiskSize: 1 << 30, DiskCache: "none",
			Env: append(os.Environ(), "HOLDFAST_VM=1", machineStore+"="+store, "HOLDFAST_BIN="+bin, fmt.Sprintf("HOLDFAST_SEED=%d", seed), machinePart+"="+part),
		}
	}
	k, err := killed(machine, 1+random("machine").IntN(ticks-1))
	if err != nil {
		t.Fatalf("HOLDFAST_SEED=%d: %v", seed, err)
	}
	what, err := json.Marshal(k)
	if err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	decoded := make(chan error, 1)
	var l loss
	go func() { // ends with the machine, which has w
		decoded <- json.NewDecoder(r).Decode(&l)
		_, _ = io.Copy(io.Discard, r)
	}()
	code, err := vm.Run(t.Context(), machine(string(what), w))
	_ = w.Close()
	if err := errors.Join(err, <-decoded); err != nil || code != 0 {
		t.Fatalf("the second boot: exit code %d, %v", code, err)
	}
	var sum figure
	read := &source{Image: readImage}
	sum.add(read, k, l)
	sum.print(t, read)
}

// killed runs the first machine, and kills it when the image that is to be kept is known to be, so many ticks later.
func killed(machine func(string, io.Writer) vm.Config, later int) (k known, err error) {
	ctx, kill := context.WithCancel(context.Background())
	defer kill()
	r, w := io.Pipe()
	ended := make(chan error, 1)
	go func() { // ends with the machine; waited for below
		_, err := vm.Run(ctx, machine(machineFirst, w))
		_ = w.Close()
		ended <- err
	}()
	for lines := bufio.NewScanner(r); later > 0 && lines.Scan(); {
		if err := k.add(lines.Text()); err != nil {
			return k, errors.Join(err, r.Close())
		}
		if k.has(markSynced) {
			later--
		}
	}
	kill()
	_ = r.Close()
	err = <-ended
	if later > 0 || !errors.Is(err, context.Canceled) {
		return k, fmt.Errorf("the machine ended by itself, after %q: %w", k.Events, err)
	}
	return k, nil
}

// inMachine is one of the two boots: marks on its standard output, or what the boot before lost.
func inMachine() int {
	if err := bootInMachine(os.Getenv(machinePart)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func bootInMachine(part string) error {
	reg, err := registry.StartAt(os.Getenv(machineStore), registryAddr)
	if err != nil {
		return err
	}
	defer reg.Close()
	read, err := newSource(readImage, reg.Addr(), readAddr)
	if err != nil {
		return err
	}
	defer read.close()
	kept, err := newSource(keptImage, reg.Addr(), keptAddr)
	if err != nil {
		return err
	}
	defer kept.close()
	s := &site{dir: filepath.Join(vm.DiskDir, "site"), engine: "cachefiles", read: read, kept: kept, boots: true}
	if err := s.prepare(); err != nil {
		return err
	}
	if part == machineFirst {
		return s.live(context.Background(), 10*span, func(what string) error {
			_, err := fmt.Println(s.marked(what))
			return err
		})
	}
	var k known
	if err := json.Unmarshal([]byte(part), &k); err != nil {
		return err
	}
	l, err := s.recover(k)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(l)
}
