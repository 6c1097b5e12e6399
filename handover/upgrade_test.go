package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// A fakeProcess stands for the other side where both sides are goroutines of one process: to kill it is to close its socket.
type fakeProcess struct {
	sock *net.UnixConn
	once sync.Once
	done chan struct{}
}

func (p *fakeProcess) id() int { return 0 }

func (p *fakeProcess) gone() <-chan struct{} { return p.done }

func (p *fakeProcess) kill() error {
	p.once.Do(func() {
		_ = p.sock.Close()
		close(p.done)
	})
	return nil
}

// connected returns both ends of an upgrade's connection; each is the other's process.
func connected(t *testing.T) (old, new *Conn) {
	t.Helper()
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	b, err := net.DialUnix("unixpacket", nil, l.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	a, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	old = &Conn{sock: a, peer: &fakeProcess{sock: b, done: make(chan struct{})}}
	new = &Conn{sock: b, peer: &fakeProcess{sock: a, done: make(chan struct{})}}
	t.Cleanup(func() {
		if err := errors.Join(old.Close(), new.Close()); err != nil {
			t.Error(err)
		}
	})
	return old, new
}

var (
	oldHello = Hello{Release: "1.0", Understands: []string{"objects", "pending", "done"}, Needs: []string{"objects", "pending", "done"}}
	newHello = Hello{Release: "1.1", Understands: []string{"objects", "pending", "done", "later"}, Needs: []string{"done"}}
	long     = Timeouts{Start: patience, Hello: patience, Prepare: patience, Commit: patience, Drain: patience}
)

// A script is a Giver and a Taker that writes down what happens to it, and fails where it is told to.
type script struct {
	mu     sync.Mutex
	events []string
	fail   map[string]error
	give   map[string][]Record
	done   chan Record
	got    map[string][]Record
	check  func(records []Record) error
}

func newScript() *script {
	s := &script{fail: map[string]error{}, give: map[string][]Record{}, got: map[string][]Record{}, done: make(chan Record, 10)}
	s.give["prepare"] = []Record{{Kind: "objects", Body: []byte("three of them")}}
	s.give["update"] = []Record{{Kind: "objects", Body: []byte("a fourth")}}
	s.give["commit"] = []Record{{Kind: "pending", Body: []byte("7")}}
	s.done <- Record{Kind: "done", Body: []byte("7")}
	close(s.done)
	return s
}

func (s *script) note(event string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, event)
	return s.fail[event]
}

func (s *script) story() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.events, " ")
}

// A scriptGiver is the script's side of the predecessor.
type scriptGiver struct{ *script }

func (s scriptGiver) Prepare() ([]Record, error) { return s.give["prepare"], s.note("prepare") }
func (s scriptGiver) Update() ([]Record, error)  { return s.give["update"], s.fail["update"] }
func (s scriptGiver) Commit() ([]Record, error)  { return s.give["commit"], s.note("commit") }
func (s scriptGiver) Resume()                    { _ = s.note("resume") }
func (s scriptGiver) Done() <-chan Record        { return s.done }

// A scriptTaker is the script's side of the successor.
type scriptTaker struct{ *script }

func (s scriptTaker) receive(event string, records []Record) error {
	if err := s.keep(event, records...); err != nil {
		return err
	}
	return s.note(event)
}

func (s scriptTaker) keep(event string, records ...Record) error {
	s.mu.Lock()
	s.got[event] = append(s.got[event], records...)
	s.mu.Unlock()
	if s.check == nil {
		return nil
	}
	return s.check(records)
}

func (s scriptTaker) Prepare(r []Record) error { return s.receive("prepare", r) }
func (s scriptTaker) Update(r Record) error {
	return errors.Join(s.keep("commit", r), s.fail["update"])
}
func (s scriptTaker) Commit() error { return s.note("commit") }
func (s scriptTaker) Start()        { _ = s.note("start") }
func (s scriptTaker) Done(r Record) { _ = s.receive("done", []Record{r}) }
func (s scriptTaker) Drained(err error) {
	if err != nil {
		_ = s.note("inherited")
		return
	}
	_ = s.note("drained")
}

func (s *script) closeReceived() {
	for _, records := range s.got {
		for _, r := range records {
			r.Close()
		}
	}
}

type gave struct {
	Given
	err error
}

type took struct {
	taken bool
	err   error
}

func giveInBackground(ctx context.Context, c *Conn, h Hello, g Giver, t Timeouts) <-chan gave {
	ch := make(chan gave, 1)
	go func() {
		given, err := Give(ctx, c, h, g, t)
		ch <- gave{given, err}
	}()
	return ch
}

func takeInBackground(ctx context.Context, c *Conn, h Hello, tk Taker, t Timeouts) <-chan took {
	ch := make(chan took, 1)
	go func() {
		taken, err := Take(ctx, c, h, tk, t)
		ch <- took{taken, err}
	}()
	return ch
}

func TestUpgradeMovesRecordsAndTheRightToRead(t *testing.T) {
	old, new := connected(t)
	g, s := newScript(), newScript()
	g.give["prepare"] = append(g.give["prepare"], Record{Kind: "hint", Body: []byte("not needed, not understood")})
	gc := giveInBackground(t.Context(), old, oldHello, scriptGiver{g}, long)
	tc := takeInBackground(t.Context(), new, newHello, scriptTaker{s}, long)
	given, taken := <-gc, <-tc
	if given.err != nil || taken.err != nil || !given.Taken || !taken.taken {
		t.Fatalf("gave %+v, took %+v", given, taken)
	}
	if given.Peer.Release != "1.1" || given.Pause <= 0 {
		t.Errorf("gave %+v", given)
	}
	if g.story() != "prepare commit" || s.story() != "prepare commit start done drained" {
		t.Errorf("predecessor: %s; successor: %s", g.story(), s.story())
	}
	for phase, want := range map[string]string{"prepare": "three of them", "commit": "a fourth, 7", "done": "7"} {
		var bodies []string
		for _, r := range s.got[phase] {
			bodies = append(bodies, string(r.Body))
		}
		if got := strings.Join(bodies, ", "); got != want {
			t.Errorf("%s received %q, want %q", phase, got, want)
		}
	}
}

func TestRecordsLargerThanAFrameComeWhole(t *testing.T) {
	old, new := connected(t)
	g, s := newScript(), newScript()
	defer s.closeReceived()
	body := []byte(strings.Repeat("0123456789abcde\n", 20000)) // five frames
	var files []NamedFile
	for i := range 600 { // three frames
		f, err := memFile(fmt.Sprint("file ", i))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, NamedFile{fmt.Sprint("o", i), f})
	}
	g.give["prepare"] = []Record{{Kind: "objects", Body: body, Files: files}, {Kind: "objects"}, {Kind: "objects", Files: files[:1]}}
	gc := giveInBackground(t.Context(), old, oldHello, scriptGiver{g}, long)
	tc := takeInBackground(t.Context(), new, newHello, scriptTaker{s}, long)
	if given, taken := <-gc, <-tc; given.err != nil || taken.err != nil {
		t.Fatal(given.err, taken.err)
	}
	got := s.got["prepare"]
	if len(got) != 3 || !slices.Equal(got[0].Body, body) || len(got[0].Files) != 600 || len(got[1].Files)+len(got[1].Body) != 0 || len(got[2].Files) != 1 {
		t.Fatalf("%d records", len(got))
	}
	for i, f := range got[0].Files {
		content, err := io.ReadAll(io.NewSectionReader(f.File, 0, 100))
		if f.Name != fmt.Sprint("o", i) || string(content) != fmt.Sprint("file ", i) || err != nil {
			t.Fatalf("descriptor %d is %q with %q, %v", i, f.Name, content, err)
		}
	}
}

func (p *fakeProcess) close() error { return nil }
