package daemon

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
	"holdfast/handover"
	"holdfast/rafs/source"
	"holdfast/state"
)

// A simHost is a host of which only the kernel and the supervisor are simulated: daemons come and go on it, with all their records, and
// may die at any step that others see.
type simHost struct {
	fail   func(format string, args ...any) // does not return
	log    *zap.Logger
	mode   simkernel.Mode
	kernel *simkernel.Kernel
	root   string
	run    string
	change func(*Options)                                 // nil: nothing
	tap    func(state.Mount, source.Source) source.Source // what a mount's source is used through; nil: nothing
	others []simImage                                     // besides the one that a test is about

	began  time.Time
	noting sync.Mutex
	noted  []string

	mu     sync.Mutex
	down   chan struct{} // not nil: the sources do not answer until it is closed
	broken bool          // every other range fails
	ranges int           // that were asked for
	files  []*os.File    // to be closed at the end

	successorDies int                    // the step at which a successor dies; 0: at none
	unfit         bool                   // a successor dies when the supervisor is told of it
	stall         chan struct{}          // not nil: a successor does nothing until it is closed
	freezeError   error                  // what Freeze fails with, instead
	mountError    error                  // what Mount fails with, instead
	busy          func(fscache.Key) bool // says what other mount namespaces use; nil: nothing
	lives         []*life
	pids          int

	// The supervisor's.
	main   *life // whose messages are taken; nil: none runs
	bereft bool  // the test has taken the lifeline away
	store  map[string]stored
}

// A stored is what the supervisor has under a name.
type stored struct {
	held     fscache.Held
	lifeline bool
	socket   bool
}

func newSimHost(mode simkernel.Mode, dir string, fail func(string, ...any)) *simHost {
	h := &simHost{
		fail: fail, log: zap.NewNop(), mode: mode, kernel: simkernel.New(mode), root: filepath.Join(dir, "root"), run: filepath.Join(dir, "run"),
		store: map[string]stored{}, began: time.Now(),
	}
	h.log = zap.New(zapcore.NewCore(zapcore.NewConsoleEncoder(zapcore.EncoderConfig{MessageKey: "m", LevelKey: "l", EncodeLevel: zapcore.LowercaseLevelEncoder}), zapcore.AddSync(h), zap.InfoLevel))
	for _, d := range []string{h.root, h.run} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			h.fail("%v", err)
		}
	}
	return h
}

// note writes down what happens, for who looks at a failure.
func (h *simHost) note(format string, args ...any) {
	h.noting.Lock()
	defer h.noting.Unlock()
	h.noted = append(h.noted, fmt.Sprintf("%10v ", time.Since(h.began))+fmt.Sprintf(format, args...))
}

func (h *simHost) notes() string {
	h.noting.Lock()
	defer h.noting.Unlock()
	return strings.Join(h.noted, "\n")
}

// Write takes a line of the log.
func (h *simHost) Write(p []byte) (int, error) {
	h.note("%s", bytes.TrimSpace(p))
	return len(p), nil
}

// close ends everything. All processes are dead.
func (h *simHost) close() {
	for _, l := range h.lives {
		<-l.done
	}
	for _, f := range h.files {
		f.Close() // the daemon has closed some
	}
}

// died is what a supervisor does about a death: nothing of the service outlives its main process.
func (h *simHost) died(l *life) {
	h.mu.Lock()
	if h.main != l {
		h.mu.Unlock()
		return
	}
	h.main = nil
	_, held := h.store[simkernel.Name]
	lives := slices.Clone(h.lives)
	h.mu.Unlock()
	if !held && !h.bereft && len(h.kernel.Mounts()) > 0 {
		h.fail("nobody holds the lifeline, and %q are mounted (I4)", h.kernel.Mounts())
	}
	for _, other := range lives {
		other.kill()
	}
}

func (h *simHost) running() *life {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.main
}

// boot starts the daemon as a supervisor does, and returns it when it serves or has died.
func (h *simHost) boot(die int) *life {
	for _, l := range h.lives {
		<-l.done
	}
	h.checkJournal()
	l := h.newLife()
	h.note("%d boots, to die at %d", l.pid, die)
	l.die = die
	h.mu.Lock()
	h.main = l
	inherited := map[string]*os.File{}
	store := maps.Clone(h.store)
	h.mu.Unlock()
	for name, s := range store {
		inherited[name] = l.file(s)
		l.supposed[name] = true
	}
	var err error
	if l.lock, err = handover.TakeLock(filepath.Join(h.run, "serve.lock")); err != nil {
		h.fail("%v", err)
	}
	o, a := l.options(), l.origin()
	o.Upgrade.Lock, a.Inherited = l.lock.File(), inherited
	if err := l.attach(a, &o); err != nil {
		if !l.isDead() {
			h.fail("attach: %v", err)
		}
		close(l.done)
		return l
	}
	go func() {
		defer close(l.done)
		l.err = l.d.Run(l.ctx)
		h.note("%d ran: %v", l.pid, l.err)
		l.leave()
	}()
	select {
	case <-l.ready:
	case <-l.done:
	}
	return l
}

// checkJournal is I2's: what a dead process has read and nobody answered is written down where the next one looks. Cachefiles delivers it
// again.
func (h *simHost) checkJournal() {
	if h.mode != simkernel.Fanotify {
		return
	}
	known := map[uint64]bool{}
	s, err := state.ReadSession(filepath.Join(h.run, sessionFile))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		h.fail("%v", err)
	}
	for _, r := range s.Pending {
		known[r.Number] = true
	}
	boot, err := state.BootID()
	if err != nil {
		h.fail("%v", err)
	}
	boxes, _, err := state.ReadInboxes(filepath.Join(h.run, inboxDir), boot, simkernel.Name)
	if err != nil {
		h.fail("%v", err)
	}
	for _, b := range boxes {
		for _, m := range b.Messages {
			known[uint64(binary.NativeEndian.Uint32(m[16:]))] = true // struct fanotify_event_metadata, fd
		}
	}
	for _, o := range h.kernel.Obligations() {
		if !known[o.ID] {
			h.fail("%s of %s under number %d is nowhere written down (I2)", o.Op, o.Object, o.ID)
		}
	}
}
