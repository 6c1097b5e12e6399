package handover

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A rawPeer speaks frames by hand, well or badly.
type rawPeer struct {
	t     *testing.T
	c     *Conn
	hello Hello
}

// packet sends bytes as they are, with that many copies of a descriptor.
func (p *rawPeer) packet(b []byte, fds int) {
	p.t.Helper()
	var oob []byte
	if fds > 0 {
		list := make([]int, fds)
		for i := range list {
			list[i] = int(os.Stderr.Fd())
		}
		oob = unix.UnixRights(list...)
	}
	_, _, _ = p.c.sock.WriteMsgUnix(b, oob, nil) // the other side may have had enough
}

func (p *rawPeer) frame(t frameType, body []byte, fds int) {
	p.t.Helper()
	version := uint16(1)
	p.packet(appendFrame(nil, version, t, body), fds)
}

func (p *rawPeer) sayHello() {
	p.t.Helper()
	body, err := spoken{p.hello, minVersion, maxVersion}.body()
	if err != nil {
		p.t.Fatal(err)
	}
	p.frame(frameHello, body, 0)
}

// expect receives frames until one of that type.
func (p *rawPeer) expect(want frameType) {
	p.t.Helper()
	p.c.version = 1
	_ = p.c.sock.SetReadDeadline(time.Now().Add(patience))
	for {
		f, err := p.c.receive(make([]byte, frameHeader+maxBody+1), make([]byte, unix.CmsgSpace(maxPassed*4)))
		if err != nil {
			p.t.Errorf("waiting for %v: %v", want, err)
			return
		}
		closeFiles(f.files)
		if f.kind == want {
			return
		}
	}
}

// faults are what a peer may do wrong at any time. The text is part of the error.
var faults = []struct {
	name string
	do   func(*rawPeer)
	want string
}{
	{"dies", func(p *rawPeer) { _ = p.c.sock.Close() }, "ended, or closed the connection"},
	{"gives up", func(p *rawPeer) { p.frame(frameAbort, []byte("no \x1b[2Jroom"), 0) }, `gave up: "no \x1b[2Jroom"`},
	{"says nothing", func(*rawPeer) {}, "nothing came for"},
	{"noise", func(p *rawPeer) { p.packet([]byte("0123456789abcdefghijk"), 0) }, errFrameMagic.Error()},
	{"too short", func(p *rawPeer) { p.packet([]byte("HFHO"), 0) }, errFrameShort.Error()},
	{"empty packet", func(p *rawPeer) { p.packet(nil, 0) }, "ended, or closed the connection"},
	{"flipped bit", func(p *rawPeer) {
		b := appendFrame(nil, 1, frameAbort, []byte("x"))
		b[len(b)-1] ^= 1
		p.packet(b, 0)
	}, errFrameChecksum.Error()},
	{"longer than it says", func(p *rawPeer) { p.packet(append(appendFrame(nil, 1, frameAbort, nil), 0), 0) }, errFrameLength.Error()},
	{"longer than allowed", func(p *rawPeer) { p.frame(frameAbort, make([]byte, maxBody+1), 0) }, errFrameLength.Error()},
	{"longer than what is read", func(p *rawPeer) { p.frame(frameAbort, make([]byte, maxBody+2), 0) }, "truncated"},
	{"version never agreed on", func(p *rawPeer) { p.packet(appendFrame(nil, 9, frameAbort, nil), 0) }, errFrameVersion.Error()},
	{"type unknown", func(p *rawPeer) { p.packet(appendFrame(nil, 1, frameTypes, nil), 0) }, errFrameType.Error()},
	{"descriptor where none belongs", func(p *rawPeer) { p.frame(frameAbort, nil, 1) }, "abort with 1 descriptors"},
	{"as many descriptors as the kernel lets through", func(p *rawPeer) { p.frame(frameRecord, piece{kind: "objects"}.append(nil), maxPassed) }, "record with 253 descriptors"},
	{"hello again", func(p *rawPeer) { p.sayHello(); p.sayHello() }, errOutOfTurn.Error()},
	{"abort that is too long", func(p *rawPeer) { p.frame(frameAbort, make([]byte, maxAbort+1), 0) }, errFrameBody.Error()},
	{"unreadable hello", func(p *rawPeer) { p.frame(frameHello, []byte{1}, 0) }, errFrameBody.Error()},
	{"descriptors as a record out of turn", func(p *rawPeer) {
		p.frame(frameRecord, piece{index: 1 << 30, kind: "objects", names: []string{"a"}}.append(nil), 1)
	}, errOutOfTurn.Error()},
	{"body where none belongs", func(p *rawPeer) {
		p.frame(frameTaken, []byte{1}, 0)
		p.frame(frameGo, []byte{1}, 0)
	}, ""},
}

// silence is how long a peer that says nothing is waited for, in the one state that it does that in: no other limit can be what ends a test.
const silence = 250 * time.Millisecond

func limited(fault string, limit func(*Timeouts) *time.Duration) Timeouts {
	t := long
	if fault == "says nothing" {
		*limit(&t) = silence
	}
	return t
}

// Whatever a successor does before it may read, the predecessor serves on within 100 ms; what it does after costs no request.
func TestPredecessorSurvivesEveryFaultOfTheSuccessor(t *testing.T) {
	stages := []struct {
		name  string
		do    func(*rawPeer)
		want  string // the predecessor's story
		limit func(*Timeouts) *time.Duration
	}{
		{"before hello", func(*rawPeer) {}, "", func(t *Timeouts) *time.Duration { return &t.Hello }},
		{"before ready", func(p *rawPeer) { p.sayHello(); p.expect(framePrepared) }, "prepare", func(t *Timeouts) *time.Duration { return &t.Prepare }},
		{"before taken", func(p *rawPeer) { p.sayHello(); p.frame(frameReady, nil, 0); p.expect(frameCommit) }, "prepare commit resume",
			func(t *Timeouts) *time.Duration { return &t.Commit }},
		{"after go", func(p *rawPeer) {
			p.sayHello()
			p.frame(frameReady, nil, 0)
			p.frame(frameTaken, nil, 0)
			p.expect(frameGo)
		}, "prepare commit", func(t *Timeouts) *time.Duration { return &t.Drain }},
	}
	var gaps []time.Duration // from the fault until the predecessor serves
	defer func() {
		slices.Sort(gaps)
		if half, longest := gaps[len(gaps)/2], gaps[len(gaps)-1]; half > 100*time.Millisecond || longest > time.Second {
			t.Errorf("serving again after %v, at most %v", half, longest)
		}
	}()
	for _, stage := range stages {
		for _, fault := range faults {
			if stage.name == "before hello" && fault.name == "hello again" {
				continue // the first is in its place there
			}
			t.Run(stage.name+"/"+fault.name, func(t *testing.T) {
				before := len(openFDs("self"))
				old, new := connected(t)
				g := newScript()
				if stage.name == "after go" { // requests stay in flight
					g.done = make(chan Record)
				}
				gc := giveInBackground(t.Context(), old, oldHello, scriptGiver{g}, limited(fault.name, stage.limit))
				p := &rawPeer{t, new, newHello}
				stage.do(p)
				at := time.Now()
				fault.do(p)
				if stage.name == "after go" {
					if fault.name != "says nothing" {
						close(g.done)
					}
				}
				given := <-gc
				took := time.Since(at)
				if fault.name == "says nothing" {
					took -= silence
				}
				if stage.name != "after go" && (given.err == nil || !strings.Contains(given.err.Error(), fault.want)) {
					t.Errorf("got %v, want an error with %q", given.err, fault.want)
				}
				if given.Taken != (stage.name == "after go") || g.story() != stage.want {
					t.Errorf("taken %v, story %q, want %q", given.Taken, g.story(), stage.want)
				}
				gaps = append(gaps, took)
				if stage.name != "after go" {
					select {
					case <-old.peer.gone():
					default:
						t.Error("the successor was not killed")
					}
				}
				if err := errors.Join(old.Close(), new.Close()); err != nil {
					t.Error(err)
				}
				if after := len(openFDs("self")); after != before {
					t.Errorf("%d descriptors open, %d before", after, before)
				}
			})
		}
	}
}

// recordFaults are what a predecessor may do wrong with records.
var recordFaults = []struct {
	name string
	do   func(*rawPeer)
	want string
}{
	{"kind unknown", func(p *rawPeer) { p.frame(frameRecord, piece{kind: "mystery", names: []string{"a"}}.append(nil), 1) }, `kind "mystery"`},
	{"descriptor missing", func(p *rawPeer) {
		p.frame(frameRecord, piece{kind: "objects", names: []string{"a", "b"}}.append(nil), 1)
	}, "came with 1 descriptors, and names 2"},
	{"no descriptor at all", func(p *rawPeer) { p.frame(frameRecord, piece{kind: "objects", names: []string{"a"}}.append(nil), 0) }, "came with 0 descriptors, and names 1"},
	{"descriptor too many", func(p *rawPeer) { p.frame(frameRecord, piece{kind: "objects", names: []string{"a"}}.append(nil), 2) }, "came with 2 descriptors, and names 1"},
	{"one name twice", func(p *rawPeer) {
		p.frame(frameRecord, piece{kind: "objects", names: []string{"a", "a"}}.append(nil), 2)
	}, `two descriptors are named "a"`},
	{"one name twice in two frames", func(p *rawPeer) {
		p.frame(frameRecord, piece{kind: "objects", more: true, names: []string{"a"}}.append(nil), 1)
		p.frame(frameRecord, piece{kind: "objects", names: []string{"a"}}.append(nil), 1)
	}, `two descriptors are named "a"`},
	{"name that is none", func(p *rawPeer) { p.frame(frameRecord, piece{kind: "objects", names: []string{"a:b"}}.append(nil), 1) }, errFrameBody.Error()},
	{"record left out", func(p *rawPeer) { p.frame(frameRecord, piece{index: 1, kind: "objects"}.append(nil), 0) }, errOutOfTurn.Error()},
	{"record begun inside another", func(p *rawPeer) {
		p.frame(frameRecord, piece{kind: "objects", more: true, names: []string{"a"}}.append(nil), 1)
		p.frame(frameRecord, piece{index: 1, kind: "objects"}.append(nil), 0)
	}, errOutOfTurn.Error()},
	{"record of two kinds", func(p *rawPeer) {
		p.frame(frameRecord, piece{kind: "objects", more: true, names: []string{"a"}}.append(nil), 1)
		p.frame(frameRecord, piece{kind: "pending"}.append(nil), 0)
	}, errOutOfTurn.Error()},
	{"unknown flag", func(p *rawPeer) {
		b := piece{kind: "objects"}.append(nil)
		b[4] = 2
		p.frame(frameRecord, b, 0)
	}, errFrameBody.Error()},
}

func TestSuccessorHasNoEffectAfterAnyFaultOfThePredecessor(t *testing.T) {
	prepared := func(p *rawPeer) {
		p.sayHello()
		p.frame(frameRecord, piece{kind: "objects", names: []string{"x"}}.append(nil), 1)
		p.frame(framePrepared, appendCount(nil, 1), 0)
		p.expect(frameReady)
	}
	stages := []struct {
		name    string
		do      func(*rawPeer)
		want    string
		records bool // records may come
		limit   func(*Timeouts) *time.Duration
	}{
		{"before hello", func(*rawPeer) {}, "", false, func(t *Timeouts) *time.Duration { return &t.Hello }},
		{"before prepared", func(p *rawPeer) { p.sayHello() }, "", true, func(t *Timeouts) *time.Duration { return &t.Prepare }},
		{"before commit", prepared, "prepare", true, func(t *Timeouts) *time.Duration { return &t.Prepare }},
		{"before go", func(p *rawPeer) { prepared(p); p.frame(frameCommit, appendCount(nil, 0), 0); p.expect(frameTaken) }, "prepare commit", false,
			func(t *Timeouts) *time.Duration { return &t.Commit }},
	}
	for _, stage := range stages {
		all := faults
		if stage.records {
			all = slices.Concat(faults, recordFaults)
			for _, end := range []frameType{framePrepared, frameCommit} {
				for _, count := range [][]byte{appendCount(nil, 7), {1}, nil} {
					all = append(all, struct {
						name string
						do   func(*rawPeer)
						want string
					}{fmt.Sprint(end, count), func(p *rawPeer) { p.frame(end, count, 0) }, ""})
				}
			}
		}
		for _, fault := range all {
			if stage.name == "before hello" && fault.name == "hello again" {
				continue
			}
			t.Run(stage.name+"/"+fault.name, func(t *testing.T) {
				before := len(openFDs("self"))
				old, new := connected(t)
				s := newScript()
				tc := takeInBackground(t.Context(), new, newHello, scriptTaker{s}, limited(fault.name, stage.limit))
				p := &rawPeer{t, old, oldHello}
				stage.do(p)
				fault.do(p)
				taken := <-tc
				s.closeReceived()
				if taken.taken || taken.err == nil || !strings.Contains(taken.err.Error(), fault.want) {
					t.Errorf("taken %v, %v, want an error with %q", taken.taken, taken.err, fault.want)
				}
				if s.story() != stage.want {
					t.Errorf("story %q, want %q", s.story(), stage.want)
				}
				if err := errors.Join(old.Close(), new.Close()); err != nil {
					t.Error(err)
				}
				if after := len(openFDs("self")); after != before {
					t.Errorf("%d descriptors open, %d before", after, before)
				}
			})
		}
	}
}

// After go the successor serves whatever the predecessor does, and answers for it only when it is dead.
func TestSuccessorAnswersForThePredecessorOnlyOnceItIsDead(t *testing.T) {
	for _, fault := range slices.Concat(faults, recordFaults) {
		t.Run(fault.name, func(t *testing.T) {
			before := len(openFDs("self"))
			old, new := connected(t)
			s := newScript()
			parent := new.peer.(*fakeProcess)
			times := limited(fault.name, func(t *Timeouts) *time.Duration { return &t.Drain }) // it kills the silent one itself
			tc := takeInBackground(t.Context(), new, newHello, deathChecker{scriptTaker{s}, t, parent}, times)
			p := &rawPeer{t, old, oldHello}
			p.sayHello()
			p.frame(framePrepared, appendCount(nil, 0), 0)
			p.frame(frameCommit, appendCount(nil, 0), 0)
			p.frame(frameGo, nil, 0)
			p.expect(frameTaken)
			fault.do(p)
			if fault.name != "says nothing" {
				// It lives for a while, in which nobody may answer for it.
				time.AfterFunc(20*time.Millisecond, func() { _ = parent.kill() })
			}
			taken := <-tc
			s.closeReceived()
			if !taken.taken || taken.err == nil || !strings.Contains(taken.err.Error(), fault.want) {
				t.Errorf("taken %v, %v, want an error with %q", taken.taken, taken.err, fault.want)
			}
			if s.story() != "prepare commit start inherited" {
				t.Errorf("story %q", s.story())
			}
			if err := errors.Join(old.Close(), new.Close()); err != nil {
				t.Error(err)
			}
			if after := len(openFDs("self")); after != before {
				t.Errorf("%d descriptors open, %d before", after, before)
			}
		})
	}
}

type deathChecker struct {
	scriptTaker
	t      *testing.T
	parent *fakeProcess
}

func (d deathChecker) Drained(err error) {
	select {
	case <-d.parent.gone():
	default:
		d.t.Error("the predecessor lives, and is answered for")
	}
	d.scriptTaker.Drained(err)
}

func TestTruncatedControlMessageIsRefusedWithItsDescriptors(t *testing.T) {
	before := len(openFDs("self"))
	old, new := connected(t)
	(&rawPeer{t, old, oldHello}).frame(frameRecord, piece{kind: "objects", names: []string{"a", "b", "c"}}.append(nil), 3)
	new.version = 1
	_, err := new.receive(make([]byte, frameHeader+maxBody+1), make([]byte, unix.CmsgSpace(4)))
	if err == nil || !strings.Contains(err.Error(), "descriptors were lost") {
		t.Errorf("got %v", err)
	}
	if err := errors.Join(old.Close(), new.Close()); err != nil {
		t.Error(err)
	}
	if after := len(openFDs("self")); after != before {
		t.Errorf("%d descriptors open, %d before", after, before)
	}
}

func TestWhatAPeerSaidBeforeItDiedIsHeard(t *testing.T) {
	old, new := connected(t)
	raw := &rawPeer{t, new, newHello}
	raw.frame(frameAbort, []byte("the disk is full"), 0)
	(&rawPeer{t, old, oldHello}).sayHello() // never read
	_ = new.sock.Close()
	g := newScript()
	given, err := Give(t.Context(), old, oldHello, scriptGiver{g}, long)
	if given.Taken || err == nil || !strings.Contains(err.Error(), "the disk is full") {
		t.Fatalf("gave %+v, %v", given, err)
	}
}

func TestReceivedDescriptorsAreCloseOnExec(t *testing.T) {
	old, new := connected(t)
	(&rawPeer{t, old, oldHello}).frame(frameRecord, piece{kind: "objects", names: []string{"a"}}.append(nil), 1)
	new.version = 1
	f, err := new.receive(make([]byte, frameHeader+maxBody+1), make([]byte, unix.CmsgSpace(4)))
	if err != nil {
		t.Fatal(err)
	}
	defer closeFiles(f.files)
	flags, err := unix.FcntlInt(f.files[0].Fd(), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Fatalf("flags %#x, %v", flags, err)
	}
}

func TestRefusalOfTheTakerOrGiverLeavesThePredecessorServing(t *testing.T) {
	refusal := errors.New("it will not do")
	wrongType := func(records []Record) error {
		for _, r := range records {
			for _, f := range r.Files {
				if info, err := f.File.Stat(); err != nil || !info.Mode().IsRegular() {
					return errors.New("descriptor of the wrong type")
				}
			}
		}
		return nil
	}
	tests := []struct {
		name         string
		giver, taker string // whose method fails
		check        func([]Record) error
		want         string
	}{
		{"Giver.Prepare", "prepare", "", nil, "prepare"},
		{"Giver.Update", "update", "", nil, "prepare"},
		{"Giver.Commit", "commit", "", nil, "prepare commit"},
		{"Taker.Prepare", "", "prepare", nil, "prepare"},
		{"Taker.Update", "", "update", nil, "prepare commit resume"},
		{"Taker.Commit", "", "commit", nil, "prepare commit resume"},
		{"wrong type of descriptor", "", "", wrongType, "prepare"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			old, new := connected(t)
			g, s := newScript(), newScript()
			defer s.closeReceived()
			g.fail[tt.giver], s.fail[tt.taker], s.check = refusal, refusal, tt.check
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			defer w.Close()
			g.give["prepare"] = []Record{{Kind: "objects", Files: []NamedFile{{"pipe", r}}}}
			gc := giveInBackground(t.Context(), old, oldHello, scriptGiver{g}, long)
			tc := takeInBackground(t.Context(), new, newHello, scriptTaker{s}, long)
			given, taken := <-gc, <-tc
			if given.err == nil || given.Taken || taken.err == nil || taken.taken || g.story() != tt.want || strings.Contains(s.story(), "start") {
				t.Errorf("gave %+v, took %+v; predecessor %q, want %q; successor %q", given, taken, g.story(), tt.want, s.story())
			}
		})
	}
}

func TestVersionSkewIsAgreedOnOrRefusedByBoth(t *testing.T) {
	hello := func(low, high uint16, understands, needs string) spoken {
		return spoken{Hello{"r", strings.Fields(understands), strings.Fields(needs)}, low, high}
	}
	tests := []struct {
		name string
		a, b spoken
		want uint16 // 0: refused
	}{
		{"same", hello(1, 1, "a", "a"), hello(1, 1, "a", "a"), 1},
		{"next release speaks both", hello(1, 1, "", ""), hello(1, 2, "", ""), 1},
		{"both speak the newer", hello(1, 2, "", ""), hello(2, 3, "", ""), 2},
		{"next release has dropped ours", hello(1, 1, "", ""), hello(2, 2, "", ""), 0},
		{"release before this protocol", hello(1, 1, "", ""), hello(0, 0, "", ""), 0},
		{"a needs what b lacks", hello(1, 1, "a b", "a b"), hello(1, 1, "a", ""), 0},
		{"b understands more", hello(1, 1, "a", "a"), hello(1, 1, "a b", "a"), 1},
		{"b needs what a lacks", hello(1, 1, "a", ""), hello(1, 1, "a b", "b"), 0},
	}
	for _, tt := range tests {
		v1, err1 := agree(tt.a, tt.b)
		v2, err2 := agree(tt.b, tt.a)
		if (err1 == nil) != (tt.want != 0) || (err2 == nil) != (err1 == nil) || err1 == nil && (v1 != tt.want || v2 != tt.want) {
			t.Errorf("%s: %d, %v and %d, %v; want %d", tt.name, v1, err1, v2, err2, tt.want)
		}
	}
}

func TestSuccessorThatLacksANeededKindIsRefusedBeforeItGetsAnything(t *testing.T) {
	old, new := connected(t)
	g, s := newScript(), newScript()
	gc := giveInBackground(t.Context(), old, oldHello, scriptGiver{g}, long)
	tc := takeInBackground(t.Context(), new, Hello{Release: "0.9", Understands: []string{"objects", "done"}}, scriptTaker{s}, long)
	given, taken := <-gc, <-tc
	want := `release "0.9" does not understand records that release "1.0" needs understood (pending)`
	if given.err == nil || !strings.Contains(given.err.Error(), want) || taken.err == nil {
		t.Errorf("got %v and %v", given.err, taken.err)
	}
	if given.Taken || g.story() != "" || s.story() != "" {
		t.Errorf("gave %+v; predecessor %q, successor %q", given, g.story(), s.story())
	}
}

func TestPeerOfAnotherProcessIsRefused(t *testing.T) {
	old, _ := connected(t)
	if err := checkPeer(old.sock, os.Getpid()); err != nil {
		t.Error(err)
	}
	if err := checkPeer(old.sock, os.Getppid()); err == nil {
		t.Error("another process id was taken")
	}
	if os.Geteuid() != 0 {
		t.Skip("the check of the user needs root to become another")
	}
	if err := asUser(65534, func() error { return checkPeer(old.sock, os.Getpid()) }); err == nil {
		t.Error("another user was taken")
	}
}

// asUser runs f while this process's effective user is uid.
func asUser(uid int, f func() error) error {
	if err := syscall.Setresuid(-1, uid, -1); err != nil {
		return nil // the caller wants an error
	}
	defer func() { _ = syscall.Setresuid(-1, 0, -1) }()
	return f()
}
