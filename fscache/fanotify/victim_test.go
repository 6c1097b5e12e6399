package fanotify

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/enginetest"
)

// The environment that makes the test binary a daemon which is to die, or a crowd of readers.
const (
	victimRoot  = "FANOTIFY_VICTIM_ROOT"  // see life
	victimHolds = "FANOTIFY_VICTIM_HOLDS" // how many requests it takes and does not answer; then it waits to be killed
	crowdFile   = "FANOTIFY_CROWD_FILE"
	crowdPages  = "FANOTIFY_CROWD_PAGES" // each read by a reader of its own, all at once
)

const (
	victimSlots = 6000
	slotSize    = 128
	moved       = 10000 // where a victim keeps what it inherits
)

var (
	victimObject = blobOf("a", 1<<14)
	sideObject   = blobOf("side", 1)
)

// init turns a copy of the test binary into one of the two.
func init() {
	var err error
	switch {
	case os.Getenv(victimRoot) != "":
		err = liveAsVictim(os.Getenv(victimRoot))
	case os.Getenv(crowdFile) != "":
		err = readAsCrowd(os.Getenv(crowdFile))
	default:
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// A life is what a supervisor has of a chain of daemons that die: descriptors, and the directories cache, inbox and records below root.
type life struct {
	t     *testing.T
	root  string
	group *os.File
	held  []fscache.Held
}

// newLife makes the group and marks the objects.
func newLife(t *testing.T) *life {
	t.Helper()
	l := &life{t: t, root: t.TempDir()}
	for _, dir := range []string{"cache", "inbox", "records"} {
		if err := os.Mkdir(filepath.Join(l.root, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	store := enginetest.NewStore()
	t.Cleanup(store.Close)
	e := open(t, Config{Dir: filepath.Join(l.root, "cache"), Holder: store})
	add(t, e, victimObject)
	add(t, e, sideObject)
	l.group = copyOf(t, e)
	t.Cleanup(func() { l.group.Close() })
	var err error
	if l.held, err = store.Held(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeHeld(l.held) })
	e.Close()
	return l
}

func (l *life) path() string { return filepath.Join(l.root, "cache", "d", victimObject.Key.ID) }

// quiet is the descriptor of the object whose reads and writes nobody is asked about.
func (l *life) quiet() *os.File {
	for _, h := range l.held {
		if h.Object.Key == victimObject.Key {
			return h.File
		}
	}
	return nil
}

// A daemon is a process that serves a life.
type daemon struct {
	t    *testing.T
	cmd  *exec.Cmd
	says *bufio.Reader
}

func (l *life) start(holds int, env ...string) *daemon {
	l.t.Helper()
	d := &daemon{t: l.t, cmd: exec.Command("/proc/self/exe")}
	d.cmd.Env = append(os.Environ(), victimRoot+"="+l.root, victimHolds+"="+strconv.Itoa(holds))
	d.cmd.Env = append(d.cmd.Env, env...)
	d.cmd.ExtraFiles = []*os.File{l.group}
	for _, h := range l.held {
		d.cmd.ExtraFiles = append(d.cmd.ExtraFiles, h.File)
		d.cmd.Env = append(d.cmd.Env, fmt.Sprintf("FANOTIFY_VICTIM_HELD_%d=%s", len(d.cmd.ExtraFiles)+2, h.Object.Key.ID))
	}
	d.cmd.Stderr = os.Stderr
	out, err := d.cmd.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	d.says = bufio.NewReader(out)
	l.t.Cleanup(d.kill)
	return d
}

// expect waits for a line that begins so, and returns the rest.
func (d *daemon) expect(what string) string {
	d.t.Helper()
	line, err := d.says.ReadString('\n')
	rest, ok := strings.CutPrefix(strings.TrimSpace(line), what)
	if err != nil || !ok {
		d.t.Fatalf("the daemon says %q, %v, want %q", line, err, what)
	}
	return rest
}

func (d *daemon) kill() { _, _ = d.cmd.Process.Kill(), d.cmd.Wait() }

// moveUp takes an inherited descriptor away from low numbers, as package handover does.
func moveUp(fd int, name string) (*os.File, error) {
	up, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, moved)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(up), name), unix.Close(fd)
}

// inheritedByVictim collects what a victim was started with and what those before it left.
func inheritedByVictim(root string) (left fscache.Inherited, boxes []string, err error) {
	for fd := 4; ; fd++ {
		id := os.Getenv(fmt.Sprintf("FANOTIFY_VICTIM_HELD_%d", fd))
		if id == "" {
			break
		}
		f, err := moveUp(fd, id)
		if err != nil {
			return left, nil, err
		}
		o := victimObject
		if id == sideObject.Key.ID {
			o = sideObject
		}
		left.Objects = append(left.Objects, fscache.Held{Object: o, File: f})
	}
	if left.Lifeline, err = moveUp(3, "group"); err != nil {
		return left, nil, err
	}
	if boxes, err = filepath.Glob(filepath.Join(root, "inbox", "*")); err != nil {
		return left, nil, err
	}
	for _, box := range boxes {
		mem, err := os.ReadFile(box)
		if err != nil {
			return left, nil, err
		}
		left.Messages = append(left.Messages, enginetest.MessagesIn(mem, slotSize)...)
	}
	b, err := os.ReadFile(filepath.Join(root, "records", "pending"))
	if err == nil {
		err = json.Unmarshal(b, &left.Pending)
	} else if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return left, boxes, err
}

// mappedInbox makes an inbox that outlives the process.
func mappedInbox(root string) (*enginetest.Inbox, error) {
	f, err := os.CreateTemp(filepath.Join(root, "inbox"), "")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(victimSlots * slotSize); err != nil {
		return nil, err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, victimSlots*slotSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	return enginetest.NewInboxIn(mem, slotSize), err
}

// record makes the records what the engine says is pending, and removes the inboxes they came from: what daemons do before they read.
func record(root string, e *Engine, boxes []string) error {
	b, err := json.Marshal(e.Pending())
	if err != nil {
		return err
	}
	path := filepath.Join(root, "records", "pending")
	if err := errors.Join(os.WriteFile(path+"~", b, 0o600), os.Rename(path+"~", path)); err != nil {
		return err
	}
	for _, box := range boxes {
		if err := os.Remove(box); err != nil {
			return err
		}
	}
	return nil
}

func liveAsVictim(root string) error {
	start := time.Now()
	left, boxes, err := inheritedByVictim(root)
	if err != nil {
		return err
	}
	inbox, err := mappedInbox(root)
	if err != nil {
		return err
	}
	e, err := Open(Config{Dir: filepath.Join(root, "cache"), Inherited: left, Inbox: inbox})
	if err != nil {
		return err
	}
	for _, o := range []fscache.Object{victimObject, sideObject} {
		if err := e.Add(context.Background(), o); err != nil {
			return err
		}
	}
	if err := record(root, e, boxes); err != nil {
		return err
	}
	fmt.Println("ready")
	holds, err := strconv.Atoi(os.Getenv(victimHolds))
	if err != nil {
		return err
	}
	for range holds {
		if _, err := e.Next(); err != nil {
			return err
		}
	}
	if holds > 0 {
		fmt.Println("holding")
		select {}
	}
	var wg sync.WaitGroup
	var first sync.Once
	errs := make(chan error, 2)
	for range 2 {
		wg.Go(func() {
			errs <- serveAsVictim(e, func() { first.Do(func() { fmt.Println("answered after", time.Since(start)) }) })
		})
	}
	err = <-errs
	return err
}

// serveAsVictim answers everything; after each hundred it has the side object come and go.
func serveAsVictim(e *Engine, answered func()) error {
	for n := 1; ; n++ {
		r, err := e.Next()
		if err != nil {
			return err
		}
		for off := r.Off; off < min(r.Off+r.Len, victimObject.Size); off += page {
			if r.Object == victimObject.Key {
				if err := e.WriteAt(r.Object, pageOf(r.Object, off), off); err != nil {
					return err
				}
			}
		}
		if err := e.Answer(r, fscache.OK); err != nil && !errors.Is(err, fscache.ErrGone) {
			return err
		}
		answered()
		if n%100 == 0 {
			err := errors.Join(e.Complete(sideObject.Key), e.Remove(sideObject.Key), e.Add(context.Background(), sideObject))
			if err != nil && !errors.Is(err, fscache.ErrUnknown) && !errors.Is(err, fscache.ErrBusy) {
				return err
			}
		}
	}
}

func readAsCrowd(path string) error {
	n, err := strconv.ParseInt(os.Getenv(crowdPages), 10, 32)
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	errs := make(chan error, n)
	for i := range n {
		go func() { errs <- readPage(f, i*page) }() // ends when the kernel lets it go
	}
	for range n {
		if err := <-errs; err != nil {
			return err
		}
	}
	return nil
}

// readPage reads a page of the victims' object and checks it.
func readPage(f *os.File, off int64) error {
	b := make([]byte, page)
	if _, err := f.ReadAt(b, off); err != nil {
		return err
	}
	if !bytes.Equal(b, pageOf(victimObject.Key, off)) {
		return fmt.Errorf("wrong bytes at %d: %.40q", off, b)
	}
	return nil
}

// crowd starts k readers in a process of their own; the error comes when all were let go.
func (l *life) crowd(k int) <-chan error {
	l.t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), crowdFile+"="+l.path(), crowdPages+"="+strconv.Itoa(k))
	var out strings.Builder
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { _ = cmd.Process.Kill() })
	done := make(chan error, 1)
	go func() { // ends with the process
		if err := cmd.Wait(); err != nil {
			done <- fmt.Errorf("%w: %s", err, out.String())
		}
		close(done)
	}()
	return done
}
