package handover

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestDescriptorsSurviveTheDaemonsKillUnderTheirNames(t *testing.T) {
	k := startKeeper(t)
	d := k.next()
	if d.names != "" {
		t.Fatalf("the first daemon inherited %q", d.names)
	}
	d.ask("push fanotify", "ok")
	d.ask("push object-7", "ok")
	for range 3 {
		d.kill(syscall.SIGKILL)
		d = k.next()
		if d.names != "fanotify,object-7" {
			t.Fatalf("inherited %q", d.names)
		}
		for _, name := range strings.Split(d.names, ",") {
			d.ask("read "+name, name)
			d.ask("cloexec "+name, "true")
			d.ask("moved "+name, "true")
		}
	}
	for _, v := range []string{"NOTIFY_SOCKET", "FDSTORE", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "SYSTEMD_EXEC_PID"} {
		d.ask("env "+v, `""`)
	}
}

func TestPushReturnsOnlyWhenTheKeeperHoldsTheDescriptor(t *testing.T) {
	k := startKeeper(t)
	d := k.next()
	d.ask("push a", "ok")
	if n := k.holds("a"); n != 1 {
		t.Fatalf("after Push the keeper has it open %d times", n)
	}
	d.ask("remove a", "ok")
	if n := k.holds("a"); n != 0 {
		t.Fatalf("after Remove the keeper has it open %d times", n)
	}
}

func TestWhatADyingDaemonSentLastIsKept(t *testing.T) {
	k := startKeeper(t)
	d := k.next()
	d.ask("ready", "ok")
	for range 2 {
		d.say("push-and-die last")
		d = k.next()
		if d.names != "last" {
			t.Fatalf("inherited %q", d.names)
		}
		d.ask("remove last", "ok")
		// Dies with nothing held, and is started again because it was ready once.
		d.kill(syscall.SIGKILL)
		d = k.next()
	}
}

func TestWhatIsStillQueuedWhenTheDaemonEndsIsWorkedOffFirst(t *testing.T) {
	h, send := testHolder(t) // nobody receives
	h.pid = os.Getpid()
	k := &keeper{KeepOptions: KeepOptions{Log: h.log}, holder: h, child: h.pid, stop: true}
	send("FDSTORE=1\nFDNAME=last", 1)
	if code, ended := k.ended(0); ended {
		t.Fatalf("the keeper ended with %d, and lost the descriptor", code)
	}
	if len(h.held) != 1 || h.pid != 0 {
		t.Fatalf("held %d, process %d", len(h.held), h.pid)
	}
}

func TestPushFromAnotherProcessIsRefused(t *testing.T) {
	k := startKeeper(t)
	d := k.next()
	before := len(openFDs(itoa(k.cmd.Process.Pid)))
	foreign, err := dialStore(socketIn(k.dir))
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	f, err := memFile("evil")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, text := range []string{"FDSTORE=1\nFDNAME=evil", "BARRIER=1", "READY=1", "FDSTOREREMOVE=1\nFDNAME=good"} {
		if err := foreign.send(text, unix.UnixRights(int(f.Fd()))); err != nil {
			t.Fatal(err)
		}
		k.logged("not from the process that this keeper started")
	}
	d.ask("push good", "ok") // works off what came before
	if n := k.holds("evil"); n != 0 {
		t.Fatalf("the keeper took it: open %d times", n)
	}
	if after := len(openFDs(itoa(k.cmd.Process.Pid))); after != before+1 {
		t.Fatalf("%d descriptors before, %d after one push", before, after)
	}
}

func TestAnotherProcessCannotClaimTheDaemonsCredentials(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Log("root may claim any id in SCM_CREDENTIALS (unix(7)): not a boundary, and not tested as root")
	}
	h, send := testHolder(t)
	h.pid = os.Getpid() + 1
	send("FDSTORE=1\nFDNAME=x", 1)
	if h.drain() != 0 {
		t.Fatal("taken from the wrong process")
	}
	h.pid = os.Getpid()
	send("FDSTORE=1\nFDNAME=x", 1)
	if h.drain() != 1 {
		t.Fatal("not taken from the right process")
	}
}

func TestKeeperStaysWhileADescriptorIsHeld(t *testing.T) {
	k := startKeeper(t)
	d := k.next()
	d.ask("push fanotify", "ok")
	k.signal(syscall.SIGTERM)
	k.logged("not ending")
	k.signal(syscall.SIGINT)
	k.logged("not ending")
	if n := k.holds("fanotify"); n != 1 {
		t.Fatalf("held %d times", n)
	}
	k.signal(syscall.SIGHUP)
	d = k.next()
	d.ask("read fanotify", "fanotify")
	d.ask("remove fanotify", "ok")
	d.ask("push-socket api", "ok") // no mount depends on it
	k.signal(syscall.SIGTERM)
	k.wantExit(0)
	if _, err := os.Stat(socketIn(k.dir)); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("the socket is left: %v", err)
	}
}

func TestDaemonThatStopsByItselfIsStartedAgainWhileADescriptorIsHeld(t *testing.T) {
	k := startKeeper(t)
	d := k.next()
	d.ask("push fanotify", "ok")
	for _, line := range []string{"exit 0", "exit 5"} {
		d.say(line)
		d = k.next()
		d.ask("read fanotify", "fanotify")
	}
}

func TestKilledKeeperLeavesTheDaemonRunning(t *testing.T) {
	k := startKeeper(t)
	d := k.next()
	d.ask("push fanotify", "ok")
	k.signal(syscall.SIGKILL)
	d.ask("env HOME", `"`+os.Getenv("HOME")+`"`)
	d.kill(syscall.Signal(0))
}

func TestSecondKeeperIsRefusedAndNamesTheFirst(t *testing.T) {
	k := startKeeper(t)
	k.next()
	_, err := Keep(KeepOptions{Command: []string{"true"}, Trampoline: []string{"x"}, Dir: k.dir})
	var locked *LockedError
	if !errors.As(err, &locked) || locked.PID != k.cmd.Process.Pid {
		t.Fatalf("got %v, want a lock held by %d", err, k.cmd.Process.Pid)
	}
}

func TestLockEndsWithItsHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	for range 2 {
		l, err := TakeLock(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := TakeLock(path); err == nil {
			t.Fatal("locked twice")
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestExitCodeIsTheCommands(t *testing.T) {
	tests := []struct {
		name    string
		command []string
		want    int
	}{
		{"ends well", []string{"true"}, 0},
		{"ends with a code", []string{"sh", "-c", "exit 3"}, 3},
		{"killed", []string{"sh", "-c", "kill -9 $$"}, 128 + 9},
		{"not found", []string{"no-such-command-here"}, 127},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { startKeeper(t, tt.command...).wantExit(tt.want) })
	}
}

func TestSignalThatStopsTheCommandIsNoFailure(t *testing.T) {
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		k := startKeeper(t)
		k.next()
		k.signal(s)
		k.wantExit(0)
	}
}

// Whoever has just asked the keeper to end, or wants the command started again, does not know how far it is.
func TestSignalsThatComeWhileTheKeeperEndsDoNotChangeItsCode(t *testing.T) {
	gate := filepath.Join(t.TempDir(), "gate")
	if err := unix.Mkfifo(gate, 0o600); err != nil {
		t.Fatal(err)
	}
	k := startKeeper(t, "sh", "-c", `trap "" HUP; read line <"$0"; exit 0`, gate)
	open, err := os.OpenFile(gate, os.O_WRONLY, 0) // when the command reads
	if err != nil {
		t.Fatal(err)
	}
	if err := open.Close(); err != nil {
		t.Fatal(err)
	}
	for {
		select {
		case code := <-k.exited:
			if code != 0 {
				t.Fatalf("the keeper ended with code %d", code)
			}
			return
		default:
			_ = k.cmd.Process.Signal(syscall.SIGHUP) // fails when it has ended
		}
	}
}

func TestExitCodeAfterReadyEndsTheKeeperOnlyIfItIsZero(t *testing.T) {
	k := startKeeper(t)
	d := k.next()
	d.ask("ready", "ok")
	d.say("exit 1")
	d = k.next()
	d.say("exit 0")
	k.wantExit(0)
}

func TestBackoffDoublesToItsLimitAndEndsWithAHealthyRun(t *testing.T) {
	var b backoff
	want := []time.Duration{0, 100, 200, 400, 800, 1600, 3200, 5000, 5000}
	for i, w := range want {
		b.ran(healthy-1, false)
		if got := b.next(); got != w*time.Millisecond {
			t.Fatalf("delay %d: %v, want %v", i, got, w*time.Millisecond)
		}
	}
	b.ran(healthy, false)
	if got := b.next(); got != 0 {
		t.Fatalf("after a healthy run: %v", got)
	}
}

func TestTruncatedMessagesAreDroppedWithTheirDescriptors(t *testing.T) {
	h, send := testHolder(t)
	h.pid = os.Getpid()
	before := len(openFDs("self"))

	send("FDSTORE=1\nFDNAME=x\nSTATUS="+strings.Repeat("x", maxDatagram), 2)
	if h.drain() != 0 || len(openFDs("self")) != before {
		t.Fatalf("text truncated: %d descriptors open, %d before", len(openFDs("self")), before)
	}

	// Room for the credentials and one of the three descriptors.
	send("FDSTORE=1\nFDNAME=x", 3)
	h.mu.Lock()
	h.in.oob = h.in.oob[:unix.CmsgSpace(unix.SizeofUcred)+unix.CmsgSpace(4)]
	more := h.next()
	h.mu.Unlock()
	if !more || h.drain() != 0 || len(openFDs("self")) != before {
		t.Fatalf("control message truncated: %d descriptors open, %d before", len(openFDs("self")), before)
	}
}

func TestMalformedMessagesAreDroppedWithTheirDescriptors(t *testing.T) {
	h, send := testHolder(t)
	h.pid = os.Getpid()
	before := len(openFDs("self"))
	for _, tt := range []struct {
		text string
		fds  int
	}{
		{"FDSTORE=1", 1}, {"FDSTORE=1\nFDNAME=", 1}, {"FDSTORE=1\nFDNAME=a:b", 1}, {"FDSTORE=1\nFDNAME=" + strings.Repeat("n", 256), 1},
		{"FDSTORE=1\nFDNAME=x", 0}, {"FDNAME=x", 1}, {"READY=1", 1}, {"BARRIER=1", 2}, {"BARRIER=1", 0},
		{"BARRIER=1\nFDSTORE=1\nFDNAME=x", 1}, {"FDSTORE=1\nFDSTOREREMOVE=1\nFDNAME=x", 1}, {"x\x00", 1}, {"\xff=1", 1}, {"noise", 1},
	} {
		send(tt.text, tt.fds)
		if n := h.drain(); n != 0 {
			t.Errorf("%q with %d descriptors: taken", tt.text, tt.fds)
		}
		if after := len(openFDs("self")); after != before {
			t.Errorf("%q with %d descriptors: %d open, %d before", tt.text, tt.fds, after, before)
		}
	}
	if h.ready {
		t.Error("READY=1 with a descriptor was taken")
	}
}

func TestNumberOfHeldDescriptorsIsBounded(t *testing.T) {
	h, send := testHolder(t)
	h.pid = os.Getpid()
	for range maxHeld - 1 {
		if err := h.store([]byte("o"), []int{-1}); err != nil {
			t.Fatal(err)
		}
	}
	send("FDSTORE=1\nFDNAME=x", 2)
	if n := h.drain(); n != maxHeld-1 {
		t.Fatalf("%d held", n)
	}
	send("FDSTORE=1\nFDNAME=x", 1)
	if n := h.drain(); n != maxHeld {
		t.Fatalf("%d held", n)
	}
	send("FDSTORE=1\nFDNAME=x", 1)
	if n := h.drain(); n != maxHeld {
		t.Fatalf("%d held", n)
	}
}

func TestKeeperLeaksNothingOverManyLives(t *testing.T) {
	k := startKeeper(t)
	d := k.next()
	d.ask("ready", "ok")
	d.ask("push lifeline", "ok")
	before := openFDs(itoa(k.cmd.Process.Pid))
	for range 5 {
		d.ask("push object", "ok")
		d.ask("remove object", "ok")
		d.kill(syscall.SIGKILL)
		d = k.next()
	}
	if after := openFDs(itoa(k.cmd.Process.Pid)); len(after) != len(before) {
		t.Fatalf("open before: %q, after: %q", before, after)
	}
}
