package handover

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// ended waits until the daemon's process is no more, not even a zombie.
func (d *talk) ended() {
	d.t.Helper()
	_ = d.conn.SetReadDeadline(time.Now().Add(patience))
	if s, err := d.in.ReadString('\n'); err == nil || os.IsTimeout(err) {
		d.t.Fatalf("the daemon still runs: %q, %v", s, err)
	}
	for deadline := time.Now().Add(patience); syscall.Kill(d.pid, 0) == nil; time.Sleep(time.Millisecond) { // its children are the keeper's by then
		if time.Now().After(deadline) {
			d.t.Fatalf("process %d has not ended", d.pid)
		}
	}
}

func TestMainPIDMakesADescendantTheOneThatCounts(t *testing.T) {
	k := startKeeper(t)
	d := k.next()
	d.ask("ready", "ok")
	d.ask("spawn", "ok")
	d2 := k.next()
	d2.ask("push early", "ok") // worked off by dropping
	k.logged("not from the process that this keeper started")
	d.ask("mainpid "+itoa(d2.pid), "ok")
	d2.ask("push a", "ok")
	d.ask("push b", "ok") // the old one still has requests in flight
	if k.holds("early") != 0 || k.holds("a") != 1 || k.holds("b") != 1 {
		t.Fatalf("held %d, %d, %d times", k.holds("early"), k.holds("a"), k.holds("b"))
	}
	d.say("exit 0") // is not the command's end
	d.ended()
	d2.ask("env HOME", strconv.Quote(os.Getenv("HOME")))

	// And so on: the next one is started by the second.
	d2.ask("spawn", "ok")
	d3 := k.next()
	d2.ask("mainpid "+itoa(d3.pid), "ok")
	d2.say("exit 0")
	d2.ended()
	d3.kill(syscall.SIGKILL) // is
	d4 := k.next()
	if d4.names != "a,b" {
		t.Fatalf("inherited %q", d4.names)
	}
	// Signals go to the main one.
	d4.ask("spawn", "ok")
	d5 := k.next()
	d4.ask("mainpid "+itoa(d5.pid), "ok")
	d4.say("exit 0")
	d4.ended()
	d5.ask("remove a", "ok")
	d5.ask("remove b", "ok")
	k.signal(syscall.SIGTERM)
	k.wantExit(0)
}

func TestMainPIDOfWhatIsNoDescendantIsRefused(t *testing.T) {
	k := startKeeper(t)
	d := k.next()
	d.ask("spawn", "ok")
	d2 := k.next()
	for _, pid := range []int{os.Getpid(), k.cmd.Process.Pid, 1 << 22} {
		d.ask("mainpid "+itoa(pid), "ok")
		k.logged(fmt.Sprintf("MAINPID=%d", pid))
	}
	d.say("say MAINPID=1")
	k.logged("not a process id")
	d2.ask("mainpid "+itoa(d2.pid), "ok") // not the main one's to say
	k.logged("not from the process that this keeper started")
	d2.ask("push x", "ok")
	if n := k.holds("x"); n != 0 {
		t.Fatalf("held %d times", n)
	}
}

func TestWhatIsLeftOfTheCommandIsKilledBeforeItIsStartedAgain(t *testing.T) {
	tests := []struct {
		name     string
		mainDies func(d, d2 *talk)
		left     func(d, d2 *talk) *talk
	}{
		{"a successor, when the predecessor dies", func(d, _ *talk) { d.kill(syscall.SIGKILL) }, func(_, d2 *talk) *talk { return d2 }},
		{"a predecessor, when the successor dies", func(d, d2 *talk) {
			d.ask("mainpid "+itoa(d2.pid), "ok")
			d2.kill(syscall.SIGKILL)
		}, func(d, _ *talk) *talk { return d }},
		{"a stopped predecessor", func(d, d2 *talk) {
			d.ask("mainpid "+itoa(d2.pid), "ok")
			d.kill(syscall.SIGSTOP)
			d2.kill(syscall.SIGKILL)
		}, func(d, _ *talk) *talk { return d }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			k := startKeeper(t)
			d := k.next()
			d.ask("push fanotify", "ok")
			d.ask("spawn", "ok")
			d2 := k.next()
			tt.mainDies(d, d2)
			k.next().ask("read fanotify", "fanotify")
			if pid := tt.left(d, d2).pid; processRuns(pid) {
				t.Fatalf("process %d still runs beside the new one", pid)
			}
		})
	}
}

// polls counts the epoll instances of the keeper: the runtime's, and one while it waits for a held descriptor.
func (k *keeperUnderTest) polls() int {
	n := 0
	links, err := filepath.Glob("/proc/" + itoa(k.cmd.Process.Pid) + "/fd/*")
	if err != nil {
		k.t.Fatal(err)
	}
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil && strings.Contains(to, "eventpoll") {
			n++
		}
	}
	return n
}

func TestIdleCommandIsStartedWhenAHeldDescriptorIsReadable(t *testing.T) {
	k := startKeeper(t)
	d := k.next()
	d.ask("ready", "ok")
	d.ask("push regular", "ok") // cannot be polled
	d.ask("push-fifo device", "ok")
	f, err := os.OpenFile(filepath.Join(k.dir, "device"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 2 {
		if n := k.polls(); n != 1 {
			t.Fatalf("the keeper polls with %d instances while the command runs", n)
		}
		d.ask("say STOPPING=1", "ok")
		d.say("exit 7")
		k.logged("is idle")
		if n := k.polls(); n != 2 {
			t.Fatalf("the keeper polls with %d instances while the command is idle", n)
		}
		if _, err := f.WriteString("x"); err != nil {
			t.Fatal(err)
		}
		d = k.next()
		if d.names != "device,regular" {
			t.Fatalf("inherited %q", d.names)
		}
		if _, err := f.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	// What is readable already wakes too.
	if _, err := f.WriteString("x"); err != nil {
		t.Fatal(err)
	}
	d.ask("say STOPPING=1", "ok")
	d.say("exit 7")
	k.logged("is idle")
	d = k.next()
	if _, err := f.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	// And SIGHUP does; SIGTERM does not, and ends the waiting.
	d.ask("say STOPPING=1", "ok")
	d.say("exit 7")
	k.logged("is idle")
	k.signal(syscall.SIGHUP)
	d = k.next()
	d.ask("say STOPPING=1", "ok")
	d.say("exit 7")
	k.logged("is idle")
	k.signal(syscall.SIGTERM)
	k.logged("not ending")
	if n := k.polls(); n != 1 {
		t.Fatalf("the keeper polls with %d instances after it was told to stop", n)
	}
}

func TestWhoDoesNotSayThatItStopsIsNotIdle(t *testing.T) {
	k := startKeeper(t)
	d := k.next()
	d.ask("push-fifo device", "ok")
	d.say("exit 0")
	d = k.next()
	d.ask("say STOPPING=1", "ok")
	d.say("exit 1")
	d = k.next()
	d.ask("remove device", "ok")
	d.ask("push regular", "ok") // nothing to wait for
	d.ask("say STOPPING=1", "ok")
	d.say("exit 7")
	k.next()
}

func TestHungUpDescriptorDoesNotKeepWaking(t *testing.T) {
	h, _ := testHolder(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	fd, err := unix.Dup(int(r.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	hungup := [2]int{}
	if err := unix.Pipe2(hungup[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	closeAll(hungup[1:])
	if err := h.store([]byte("hungup"), hungup[:1]); err != nil {
		t.Fatal(err)
	}
	if err := h.store([]byte("live"), []int{fd}); err != nil {
		t.Fatal(err)
	}
	r.Close()
	k, err := h.watch()
	if err != nil || k == nil {
		t.Fatal(k, err)
	}
	defer k.close()
	select {
	case <-k.woken:
		t.Fatal("woken by a descriptor that is only hung up")
	case <-time.After(50 * time.Millisecond): // nothing says that nothing happens
	}
	if _, err := w.WriteString("x"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-k.woken:
	case <-time.After(patience):
		t.Fatal("not woken")
	}
}

func TestCommandThatIsSilentForTooLongIsKilled(t *testing.T) {
	t.Setenv("KEEP_WATCHDOG", "300ms")
	k := startKeeper(t)
	d := k.next()
	d.ask("watchdog", "150ms")
	d.ask("env WATCHDOG_USEC", `""`)
	d.ask("push fanotify", "ok")
	d.ask("ready", "ok")
	k.logged("has not said WATCHDOG=1 in time")
	d = k.next()
	d.ask("ready", "ok")
	d.kill(syscall.SIGSTOP) // dies of SIGKILL only
	k.logged(`"signal": "aborted"`)
	k.logged(`"signal": "killed"`)
	k.next().ask("read fanotify", "fanotify")
}

func TestCommandThatSaysItIsWellIsLeftAlone(t *testing.T) {
	h, send := testHolder(t)
	h.pid = os.Getpid()
	k := &keeper{KeepOptions: KeepOptions{Log: h.log, Watchdog: time.Hour}, holder: h, child: h.pid, watchdog: time.NewTimer(time.Hour)}
	k.late() // not ready: it may take its time
	send("READY=1", 0)
	h.drain()
	h.alive = time.Now().Add(-2 * time.Hour)
	send("WATCHDOG=1", 0) // still in the socket: this process was late itself
	k.late()
	if k.aborted {
		t.Fatal("killed")
	}
}

func TestNamesThatDoNotFitTheEnvironmentAreRefused(t *testing.T) {
	h, send := testHolder(t)
	h.pid = os.Getpid()
	long := strings.Repeat("n", maxName)
	for len(h.names)+len(long)+1 <= maxNames {
		if err := h.store([]byte(long), []int{-1}); err != nil {
			t.Fatal(err)
		}
	}
	held := len(h.held)
	send("FDSTORE=1\nFDNAME="+long, 1)
	if n := h.drain(); n != held {
		t.Fatalf("%d held, then %d", held, n)
	}
	// What is held can be passed: the kernel takes an environment with it.
	cmd := exec.Command("/bin/true")
	cmd.Env = []string{"LISTEN_FDNAMES=" + string(h.names) + strings.Repeat("x", maxNames-len(h.names))}
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	cmd = exec.Command("/bin/true")
	cmd.Env = []string{"LISTEN_FDNAMES=" + strings.Repeat("x", maxNames+1)}
	if err := cmd.Run(); err == nil {
		t.Fatal("the kernel takes more")
	}
}

func TestRemovedNamesLeaveTheOthersInOrder(t *testing.T) {
	h, _ := testHolder(t)
	for _, name := range []string{"a", "bb", "a", "ccc", "a"} {
		if err := h.store([]byte(name), []int{-1}); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct{ remove, want string }{{"b", "a:bb:a:ccc:a"}, {"a", "bb:ccc"}, {"bb", "ccc"}, {"ccc", ""}} {
		h.remove([]byte(step.remove))
		if string(h.names) != step.want || len(h.held) != len(strings.FieldsFunc(step.want, func(r rune) bool { return r == ':' })) {
			t.Fatalf("%q removed: %d held, %q", step.remove, len(h.held), h.names)
		}
	}
}

func TestDatagramsAreWorkedOffWithoutAllocating(t *testing.T) {
	h, send := testHolder(t)
	h.pid, h.log = os.Getpid(), zap.Must(zap.NewProduction())
	const runs = 4 // what fits the socket's queue, AllocsPerRun's first run with it
	for _, tt := range []struct {
		text string
		fds  int
	}{
		{"WATCHDOG=1", 0}, {"STATUS=3 mounts, 12 requests in flight", 0}, {"FDSTORE=1\nFDNAME=o1a\nFDPOLL=0", 1}, {"BARRIER=1", 1},
		{"FDSTOREREMOVE=1\nFDNAME=o1a", 0},
	} {
		for range runs + 1 {
			send(tt.text, tt.fds)
		}
		h.mu.Lock()
		allocs := testing.AllocsPerRun(runs, func() {
			if !h.next() {
				t.Error("no datagram")
			}
		})
		h.mu.Unlock()
		if allocs != 0 {
			t.Errorf("%q: %v allocations", tt.text, allocs)
		}
	}
}

// maxResident is what a keeper may take, in KiB.
const maxResident = 16 << 10

func TestRealKeeperThatHoldsTwoThousandDescriptorsIsSmall(t *testing.T) {
	bin := os.Getenv("HOLDFAST_BIN")
	if bin == "" {
		bin = filepath.Join(t.TempDir(), "holdfast")
		build := exec.Command("go", "build", "-o", bin, "holdfast/cmd/holdfast")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build: %v\n%s", err, out)
		}
	}
	k := startKeeperWith(t, func(dir string, command []string) []string {
		return append([]string{bin, "--run", dir, "keep", "--"}, command...)
	})
	d := k.next()
	d.ask("ready", "ok")
	d.ask("push-many 2000", "ok")
	time.Sleep(time.Second) // idle
	status := "/proc/" + itoa(k.cmd.Process.Pid) + "/status"
	b, err := os.ReadFile(status)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "VmRSS:")
	kib, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, "Rss") || strings.HasPrefix(line, "VmRSS") {
			t.Log(strings.TrimSpace(line))
		}
	}
	if kib >= maxResident {
		t.Fatalf("%d KiB resident", kib)
	}
	// And all of them come back.
	d.kill(syscall.SIGKILL)
	d = k.next()
	if n := len(strings.Split(d.names, ",")); n != 2000 {
		t.Fatalf("%d inherited", n)
	}
}
