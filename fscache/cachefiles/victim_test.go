package cachefiles

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/enginetest"
	"holdfast/tests/vm/wire"
)

// A victim is a process of its own, with an engine that serves the images of a test until it dies by SIGKILL, at a step or when the
// test kills it. The test is its supervisor: it has the device, and copies of what the victim's Holder was given, and it reads the
// victim's inbox when the victim is dead.

// victimEnv makes the test binary a victim: it holds a life, as JSON.
const victimEnv = "CACHEFILES_TEST_LIFE"

// The victim's descriptors.
const (
	victimDevice = 3 + iota
	victimSocket // of the supervisor
	victimInbox
	victimObjects // the first of them
)

// A life says what a victim serves, what it inherits, and where it dies.
type life struct {
	Dir      string
	Objects  []fscache.Object // to add
	Held     []fscache.Held   // inherited, in the order of their descriptors
	Messages [][]byte
	Mount    *fscache.Mount // to make meanwhile
	Step     string         // where to die, such as "read blob written"; "": nowhere
	Times    int            // how often to come by there, the last time dying
}

func TestMain(m *testing.M) {
	if text := os.Getenv(victimEnv); text != "" {
		var l life
		err := json.Unmarshal([]byte(text), &l)
		if err == nil {
			err = l.live()
		}
		fmt.Fprintln(os.Stderr, "victim:", err)
		os.Exit(1)
	}
	// In the virtual machine only the disk can hold a cache.
	if os.Getenv("HOLDFAST_ENGINE") == Name && os.Getenv("TMPDIR") == "" {
		if err := os.Setenv("TMPDIR", wire.DiskDir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// live is the victim's main function. A victim that is told to die when the n-th request comes holds those before it unanswered.
func (l *life) live() error {
	box, err := mapInbox(os.NewFile(victimInbox, "inbox"))
	if err != nil {
		return err
	}
	box.life = l
	c := Config{
		Dir: l.Dir, Inbox: box, Holder: &remoteHolder{life: l, conn: os.NewFile(victimSocket, "supervisor")},
		Inherited: fscache.Inherited{Lifeline: os.NewFile(victimDevice, devicePath), Messages: l.Messages},
	}
	for i, h := range l.Held {
		h.File = os.NewFile(uintptr(victimObjects+i), anonName)
		c.Inherited.Objects = append(c.Inherited.Objects, h)
	}
	e, err := Open(c)
	if err != nil {
		return err
	}
	for _, o := range l.Objects {
		if err := e.Add(context.Background(), o); err != nil {
			return err
		}
	}
	fmt.Println("ready")
	if l.Mount != nil {
		go func() { // ends with the victim
			fmt.Fprintln(os.Stderr, "victim: mount:", e.Mount(context.Background(), *l.Mount))
		}()
	}
	for {
		r, err := e.Next()
		if err != nil {
			return err
		}
		step := fmt.Sprintf("%s %s", r.Op, r.Object.ID)
		l.step(step)
		if l.Step == step {
			continue
		}
		if r.Op == fscache.OpRead {
			p, off, err := answerTo(r)
			if err == nil {
				err = e.WriteAt(r.Object, p, off)
			}
			if err != nil {
				return err
			}
			l.step(step + " written")
		}
		box.answering = step
		if err := e.Answer(r, fscache.OK); err != nil && !errors.Is(err, fscache.ErrGone) {
			return err
		}
	}
}

// step is where the victim may die.
func (l *life) step(name string) {
	if name != l.Step {
		return
	}
	if l.Times--; l.Times <= 0 {
		die()
	}
}

func die() {
	_ = syscall.Kill(syscall.Getpid(), syscall.SIGKILL)
	select {}
}

// answerTo makes the bytes a victim writes: objects named boot are bootstraps of images with one blob, named blob.
func answerTo(r fscache.Request) ([]byte, int64, error) {
	if r.Object.ID != "boot" {
		return content(r.Object, r.Off, r.Len), r.Off, nil
	}
	t := new(noTest)
	im := newImage(t, r.Object.Domain, "boot", "blob")
	return im.bytes, 0, t.err
}

// noTest takes the place of a test in the victim.
type noTest struct {
	testing.TB
	err error
}

func (*noTest) Helper()             {}
func (t *noTest) Fatal(args ...any) { t.err = fmt.Errorf("%v", args) }

// inboxSlots is how many requests a victim can have.
const inboxSlots = 256

// A mappedInbox is an fscache.Inbox in a shared mapping of a file. A slot is in use if it is not zero.
type mappedInbox struct {
	life      *life  // of the victim; nil in the supervisor
	answering string // the step the victim is at

	mu   sync.Mutex
	mem  []byte
	lent [inboxSlots]bool
}

func mapInbox(f *os.File) (*mappedInbox, error) {
	mem, err := unix.Mmap(int(f.Fd()), 0, inboxSlots*CACHEFILES_MSG_MAX_SIZE, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return &mappedInbox{mem: mem}, err
}

func (b *mappedInbox) slot(i int) []byte {
	return b.mem[i*CACHEFILES_MSG_MAX_SIZE:][:CACHEFILES_MSG_MAX_SIZE]
}

func (b *mappedInbox) Take() (int, []byte, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.lent {
		if !b.lent[i] {
			b.lent[i] = true
			return i, b.slot(i), true
		}
	}
	return 0, nil, false
}

func (b *mappedInbox) Free(i int) {
	if b.life != nil {
		b.life.step(b.answering + " answered")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.slot(i)[:msgLen])
	b.lent[i] = false
}

func (b *mappedInbox) Slots() int { return inboxSlots }

// messages returns what the dead victim had read and not answered.
func (b *mappedInbox) messages() [][]byte {
	var all [][]byte
	for i := range inboxSlots {
		p := b.slot(i)
		if n := messageLength(p); n != 0 {
			all = append(all, append([]byte(nil), p[:n]...))
		}
	}
	return all
}

// A note is what the victim's Holder tells the supervisor.
type note struct {
	Drop   bool
	Object fscache.Object
	Handle uint32
}

// remoteHolder is the victim's Holder.
type remoteHolder struct {
	life *life
	mu   sync.Mutex
	conn *os.File
}

func (r *remoteHolder) Hold(h fscache.Held) error {
	r.life.step("hold " + h.Object.Key.ID)
	if err := r.send(note{Object: h.Object, Handle: h.Handle}, h.File); err != nil {
		return err
	}
	r.life.step("held " + h.Object.Key.ID)
	return nil
}

func (r *remoteHolder) Drop(h fscache.Held) {
	r.life.step("drop " + h.Object.Key.ID)
	if err := r.send(note{Drop: true, Object: h.Object, Handle: h.Handle}, nil); err != nil {
		fmt.Fprintln(os.Stderr, "victim: drop:", err)
	}
}

// send returns when the supervisor has the note.
func (r *remoteHolder) send(n note, f *os.File) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	text, err := json.Marshal(n)
	if err != nil {
		return err
	}
	var rights []byte
	if f != nil {
		raw, err := f.SyscallConn()
		if err != nil {
			return err
		}
		if err := raw.Control(func(fd uintptr) { rights = unix.UnixRights(int(fd)) }); err != nil {
			return err
		}
	}
	if err := unix.Sendmsg(int(r.conn.Fd()), text, rights, nil, 0); err != nil {
		return err
	}
	_, err = unix.Read(int(r.conn.Fd()), make([]byte, 1))
	return err
}

// A supervisor starts victims, one after the other, and keeps what they leave.
type supervisor struct {
	t      testing.TB
	device *os.File
	cache  string
	images []image
	holds  bool           // what it is given; if not, it only says so
	mount  *fscache.Mount // for victims to make

	mu   sync.Mutex // guards held, which the successor in this process and its test use at once
	held map[uint32]fscache.Held

	cmd      *exec.Cmd
	inbox    *mappedInbox
	messages [][]byte // of dead victims
	watching sync.WaitGroup
}

// newSupervisor opens the device. What it holds is closed at the end, the device last.
func newSupervisor(t testing.TB, images ...image) *supervisor {
	t.Helper()
	needDevice(t)
	device, err := openDevice()
	if err != nil {
		t.Fatal(err)
	}
	s := &supervisor{t: t, device: device, cache: t.TempDir(), images: images, holds: true, held: make(map[uint32]fscache.Held)}
	t.Cleanup(func() {
		if s.cmd != nil {
			_ = s.cmd.Process.Kill()
			_ = s.cmd.Wait()
		}
		s.watching.Wait()
		for _, h := range s.held {
			_ = h.File.Close()
		}
		_ = device.Close()
	})
	return s
}

// start starts a victim that takes over from those before it, and returns when it is ready.
func (s *supervisor) start(step string, times int) {
	s.t.Helper()
	l := life{Dir: s.cache, Step: step, Times: times, Messages: s.messages, Mount: s.mount}
	for _, im := range s.images {
		l.Objects = append(l.Objects, im.boot, im.blob)
	}
	files := []*os.File{s.device, nil, nil}
	for _, h := range s.held {
		files = append(files, h.File)
		h.File = nil
		l.Held = append(l.Held, h)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	files[1] = os.NewFile(uintptr(fds[1]), "supervisor's socket")
	memory, err := unix.MemfdCreate("inbox", unix.MFD_CLOEXEC)
	if err != nil {
		s.t.Fatal(err)
	}
	files[2] = os.NewFile(uintptr(memory), "inbox")
	if err := files[2].Truncate(inboxSlots * CACHEFILES_MSG_MAX_SIZE); err != nil {
		s.t.Fatal(err)
	}
	if s.inbox, err = mapInbox(files[2]); err != nil {
		s.t.Fatal(err)
	}
	text, err := json.Marshal(l)
	if err != nil {
		s.t.Fatal(err)
	}
	s.cmd = exec.Command("/proc/self/exe")
	s.cmd.Env = append(os.Environ(), victimEnv+"="+string(text))
	s.cmd.ExtraFiles, s.cmd.Stderr = files, os.Stderr
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		s.cmd = nil
		s.t.Fatal(err)
	}
	_, _ = files[1].Close(), files[2].Close()
	s.watching.Go(func() { s.watch(fds[0]) }) // ends with the victim
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		s.t.Fatalf("the victim says %q, %v", line, err)
	}
}

// watch takes what the victim gives away, until the victim is dead.
func (s *supervisor) watch(fd int) {
	defer unix.Close(fd)
	text, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	for {
		n, rights, _, _, err := unix.Recvmsg(fd, text, oob, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return
		}
		var got note
		if err := json.Unmarshal(text[:n], &got); err != nil {
			s.t.Errorf("the supervisor was told %q: %v", text[:n], err)
			return
		}
		if got.Drop {
			s.Drop(fscache.Held{Handle: got.Handle})
		}
		if f := received(oob[:rights]); f != nil && s.holds {
			s.keep(fscache.Held{Object: got.Object, Handle: got.Handle, File: f})
		} else if f != nil {
			_ = f.Close()
		}
		if _, err := unix.Write(fd, []byte{0}); err != nil {
			return
		}
	}
}

// received returns the descriptor that came with a note.
func received(oob []byte) *os.File {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) != 1 {
		return nil
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil
	}
	return os.NewFile(uintptr(fds[0]), anonName)
}

// dead waits until the victim has died by SIGKILL, and takes its inbox.
func (s *supervisor) dead() {
	s.t.Helper()
	err := s.cmd.Wait()
	s.cmd = nil
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		s.t.Fatalf("the victim ended: %v, want that it was killed", err)
	}
	s.watching.Wait()
	s.messages = append(s.messages, s.inbox.messages()...)
}

// kill kills the victim wherever it is.
func (s *supervisor) kill() {
	s.t.Helper()
	if err := s.cmd.Process.Kill(); err != nil {
		s.t.Fatal(err)
	}
	s.dead()
}

// left is what a successor in this process inherits.
func (s *supervisor) left() fscache.Inherited {
	s.t.Helper()
	left := fscache.Inherited{Lifeline: dup(s.t, s.device), Messages: s.messages}
	for _, h := range s.held {
		h.File = dup(s.t, h.File)
		left.Objects = append(left.Objects, h)
	}
	return left
}

// Hold and Drop make the supervisor the Holder of a successor in this process.
func (s *supervisor) Hold(h fscache.Held) (err error) {
	if h.File, err = enginetest.Dup(h.File); err == nil {
		s.keep(h)
	}
	return err
}

func (s *supervisor) keep(h fscache.Held) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held[h.Handle] = h
}

func (s *supervisor) Drop(h fscache.Held) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old, ok := s.held[h.Handle]; ok {
		_ = old.File.Close()
		delete(s.held, h.Handle)
	}
}

// holding is how many descriptors it has.
func (s *supervisor) holding() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.held)
}

// succeed opens the last successor in this process, and has it serve the images.
func (s *supervisor) succeed() *Engine {
	s.t.Helper()
	e := openWith(s.t, Config{Dir: s.cache, Inherited: s.left(), Holder: s})
	add(s.t, e, s.images...)
	serve(s.t, e, nil, s.images...)
	return e
}
