package state

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// A victim is this test binary run again, to be killed. It finds a socket at descriptor 3 and its argument in victimArg.
const (
	victimEnv = "HOLDFAST_STATE_VICTIM"
	victimArg = "HOLDFAST_STATE_VICTIM_ARG"
)

var victims = map[string]func(arg string) error{"load": victimUnderLoad, "script": victimOfScript, "calls": victimOfCalls}

func TestMain(m *testing.M) {
	if f := victims[os.Getenv(victimEnv)]; f != nil {
		if err := f(os.Getenv(victimArg)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

type victim struct {
	cmd    *exec.Cmd
	socket int // ours
	its    int // a copy of its own, to see what it left unread
}

// startVictim starts one; its socket keeps messages apart.
func startVictim(t testing.TB, what, arg string, env ...string) *victim {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	v := &victim{cmd: exec.Command("/proc/self/exe"), socket: fds[0], its: fds[1]}
	dup, err := unix.FcntlInt(uintptr(fds[1]), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(dup), "socket")
	defer theirs.Close()
	v.cmd.ExtraFiles = []*os.File{theirs}
	v.cmd.Stderr = os.Stderr
	v.cmd.Env = append(append(os.Environ(), victimEnv+"="+what, victimArg+"="+arg), env...)
	if err := v.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return v
}

// kill kills it and waits until it is gone, with its locks.
func (v *victim) kill(t testing.TB) {
	t.Helper()
	if err := v.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
	_ = v.cmd.Wait()
}

func (v *victim) close() {
	_ = unix.Close(v.socket)
	_ = unix.Close(v.its)
}

// drain returns the messages that wait at a socket.
func drain(t testing.TB, fd int) (all [][]byte) {
	t.Helper()
	for {
		p := make([]byte, 1024)
		n, _, err := unix.Recvfrom(fd, p, unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EAGAIN) || err == nil && n == 0 {
			return all
		}
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p[:n])
	}
}

// loadMessage is a message as the kernel could send it: its number, and bytes that follow from it.
func loadMessage(number uint64) []byte {
	p := binary.NativeEndian.AppendUint64(nil, number)
	for i := range int(number % 200) {
		p = append(p, byte(number)+byte(i))
	}
	return p
}

// victimUnderLoad reads messages straight into slots, answers them and frees the slots, from some threads.
func victimUnderLoad(dir string) error {
	b, err := NewInbox(dir, testHeader, 16, 256)
	if err != nil {
		return err
	}
	failed := make(chan error)
	for range 4 {
		go func() {
			for {
				slot, p, ok := b.Take()
				if !ok {
					failed <- errors.New("no slot")
					return
				}
				n, err := unix.Read(3, p)
				if n <= 0 {
					failed <- fmt.Errorf("read: %d, %w", n, err)
					return
				}
				if _, err := unix.Write(3, p[:8]); err != nil {
					failed <- err
					return
				}
				b.Free(slot)
			}
		}()
	}
	return <-failed
}

// TestNoMessageIsLostWhereverTheProcessIsKilled is I2's part that the inbox has: what was read and not answered is in it.
func TestNoMessageIsLostWhereverTheProcessIsKilled(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 1))
	inFlight := 0
	for round := range 40 {
		dir := tmpfs(t)
		v := startVictim(t, "load", dir)
		answers := rng.IntN(400)
		sent, answered := loadUntil(t, v, answers)
		v.kill(t)
		numbers := map[uint64]string{}
		for _, p := range drain(t, v.socket) {
			answered = append(answered, binary.NativeEndian.Uint64(p))
		}
		for _, n := range answered {
			numbers[n] = "answered"
		}
		for _, p := range drain(t, v.its) {
			numbers[binary.NativeEndian.Uint64(p)] = "not read"
		}
		boxes, damaged, err := ReadInboxes(dir, "boot-a", "cachefiles")
		if err != nil || len(damaged) != 0 || len(boxes) > 1 {
			t.Fatalf("seed %d: read inboxes: %d, damaged %v, %v", seed, len(boxes), damaged, err)
		}
		for _, b := range boxes {
			for _, m := range b.Messages {
				n := binary.NativeEndian.Uint64(m)
				if want := loadMessage(n); !bytes.HasPrefix(m, want) || n >= sent || numbers[n] == "not read" {
					t.Errorf("seed %d, round %d: inbox has message %d of %d, %q", seed, round, n, sent, m)
				}
				if numbers[n] == "" {
					inFlight++
				}
				numbers[n] = "in the inbox"
			}
		}
		for n := uint64(1); n < sent; n++ {
			if numbers[n] == "" {
				t.Errorf("seed %d, round %d: message %d was read and is lost", seed, round, n)
			}
		}
		v.close()
	}
	if inFlight == 0 {
		t.Error("no process was killed with a message in flight: the test shows nothing")
	}
}

// loadUntil sends messages, numbered from 1, until so many are answered; some are then on their way. It returns the next number.
func loadUntil(t *testing.T, v *victim, answers int) (next uint64, answered []uint64) {
	t.Helper()
	p := make([]byte, 8)
	for next = 1; ; next++ {
		if err := unix.Send(v.socket, loadMessage(next), 0); err != nil {
			t.Fatal(err)
		}
		if next < 6 {
			continue
		}
		if len(answered) >= answers {
			return next + 1, answered
		}
		if _, err := unix.Read(v.socket, p); err != nil {
			t.Fatal(err)
		}
		answered = append(answered, binary.NativeEndian.Uint64(p))
	}
}

// A step of a script: take a slot and write a message into it, or free the slot that the n-th step took.
type step struct {
	Message string
	Free    int // -1: take
}

func victimOfScript(arg string) error {
	var s struct {
		Dir   string
		Steps []step
	}
	if err := json.Unmarshal([]byte(arg), &s); err != nil {
		return err
	}
	b, err := NewInbox(s.Dir, testHeader, 4, 80)
	if err != nil {
		return err
	}
	took := map[int]int{}
	for i, st := range s.Steps {
		if st.Free >= 0 {
			b.Free(took[st.Free])
			continue
		}
		slot, p, ok := b.Take()
		if ok {
			took[i] = slot
			copy(p, st.Message)
		}
	}
	if _, err := unix.Write(3, []byte("done")); err != nil {
		return err
	}
	_, err = unix.Read(3, make([]byte, 1)) // until it is killed
	return err
}

// TestInboxOfAKilledProcessIsWhatItHadLent compares the inbox with a map.
func TestInboxOfAKilledProcessIsWhatItHadLent(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		steps, lent := drawSteps(rt)
		dir := tmpfs(t)
		arg, err := json.Marshal(map[string]any{"Dir": dir, "Steps": steps})
		if err != nil {
			rt.Fatal(err)
		}
		v := startVictim(t, "script", string(arg))
		defer v.close()
		if n, err := unix.Read(v.socket, make([]byte, 4)); n != 4 || err != nil {
			rt.Fatalf("the victim ended: %d, %v", n, err)
		}
		if boxes, _, err := ReadInboxes(dir, "boot-a", "cachefiles"); len(boxes) != 0 || err != nil {
			rt.Errorf("while it lives: %v, %v", boxes, err)
		}
		v.kill(t)
		var want []string
		for _, m := range lent {
			if m != "" {
				want = append(want, m)
			}
		}
		slices.Sort(want)
		if got := read(t, dir); !slices.Equal(got, want) {
			rt.Errorf("messages %q, want %q", got, want)
		}
	})
}

func drawSteps(t *rapid.T) (steps []step, lent map[int]string) {
	lent = map[int]string{}
	for i := range rapid.IntRange(0, 40).Draw(t, "steps") {
		var held []int
		for n := range lent {
			held = append(held, n)
		}
		slices.Sort(held)
		if len(held) > 0 && rapid.Bool().Draw(t, "free") {
			n := rapid.SampledFrom(held).Draw(t, "which")
			delete(lent, n)
			steps = append(steps, step{Free: n})
			continue
		}
		m := rapid.StringMatching("([a-z]{1,80})?").Draw(t, "message")
		steps = append(steps, step{Message: m, Free: -1})
		if len(held) < 4 {
			lent[i] = m
		}
	}
	return steps, lent
}

// victimOfCalls makes each call that has named points, on files in dir.
func victimOfCalls(dir string) error {
	db, _, err := Open(filepath.Join(dir, "state.db"), "1.0")
	if err != nil {
		return err
	}
	s, _, err := OpenSession(filepath.Join(dir, "session.db"), "boot-a", "1.0")
	if err != nil {
		return err
	}
	b, err := NewInbox(filepath.Join(dir, "inbox"), testHeader, 4, 80)
	if err != nil {
		return err
	}
	o := testHeld
	o.Name = "o1"
	err = errors.Join(db.RecordMount(testMount, testImage), db.RecordObject(testObject), db.ForgetMount(testMount.ID),
		s.RecordObject(testHeld), s.RecordObject(o), s.ForgetObject("o0"), s.SetPending([]Request{testRequest}), s.SetPending(nil))
	for range 2 {
		slot, p, _ := b.Take()
		copy(p, "message")
		b.Free(slot)
	}
	// Closing and ending are not what is looked at: the parent sees that it came to the end.
	_, err2 := io.WriteString(os.NewFile(3, "socket"), "done")
	return errors.Join(err, err2)
}
