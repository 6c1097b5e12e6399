package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"strings"
	"sync"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/state"
	"holdfast/state/crash"
)

// A Supervisor holds descriptors beyond this process: handover.Store.
type Supervisor interface {
	// Push returns when the supervisor holds a copy of f under name.
	Push(name string, f *os.File) error
	// Remove returns when it holds nothing under name.
	Remove(name string) error
	// Notify tells it a state.
	Notify(state string) error
	// Wakes says whether it starts the daemon again when what it holds under a name is readable.
	Wakes(name string) bool
	// Holds says that it holds these names, put there by the process before.
	Holds(names ...string)
	// Verify compares what the supervisor says it holds with what it was given, where it says so.
	Verify(ctx context.Context) error
}

// objectName begins the names of objects' descriptors in the fd store. What follows is short: all names together are one string of
// a successor's environment, for which the kernel has 128 KiB (MAX_ARG_STRLEN in include/uapi/linux/binfmts.h).
const objectName = "o"

// A Holder puts objects' descriptors where they outlive the process, and knows which are there. It is the engine's [fscache.Holder].
type Holder struct {
	log   *zap.Logger
	store Supervisor

	ready   chan struct{} // closed when session is set
	session *state.Session

	changing sync.RWMutex // held for reading by Hold and Drop while they work; leave waits for them. Taken before mu.

	mu    sync.Mutex // guards what follows; held over no call of the supervisor's or the session's
	names map[heldKey]string
	left  bool // a successor has the records and the supervisor's ear
}

// A heldKey is one opening of an object.
type heldKey struct {
	key    fscache.Key
	handle uint32
}

// NewHolder makes a holder. Hold and Drop wait until Start has given it its records.
func NewHolder(store Supervisor, log *zap.Logger) *Holder {
	return &Holder{log: log, store: store, ready: make(chan struct{}), names: map[heldKey]string{}}
}

// Start gives the holder its records. It comes once.
func (h *Holder) Start(s *state.Session) {
	h.session = s
	close(h.ready)
}

// errLeft means that a successor holds descriptors now.
var errLeft = errors.New("another process has taken this one's place")

// abandon makes Hold and Drop return at once that would wait for records which will never come.
func (h *Holder) abandon() {
	h.leave()
	close(h.ready)
}

// leave changes nothing any more: a supervisor drops what a process sends that is not its main one, and the records are the successor's.
// What the engine drops from here on the successor finds out for itself. It returns when nothing is being held or dropped.
func (h *Holder) leave() {
	h.changing.Lock()
	defer h.changing.Unlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.left = true
}

func (h *Holder) hasLeft() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.left
}

// Known says that an object's descriptor is held under a name, by the account of the process that put it there.
func (h *Holder) Known(key fscache.Key, handle uint32, name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.names[heldKey{key, handle}] = name
}

// Hold implements [fscache.Holder].
// ORDER: record before supervisor: a descriptor that a successor inherits without a record is one it cannot name.
func (h *Holder) Hold(x fscache.Held) error {
	<-h.ready
	h.changing.RLock()
	defer h.changing.RUnlock()
	if h.hasLeft() {
		return fmt.Errorf("hold the descriptor of object %s: %w", x.Object.Key, errLeft)
	}
	crash.Point("daemon.hold.before-record")
	o := state.HeldObject{
		Name: h.session.FreeName(), Domain: x.Object.Key.Domain, ID: x.Object.Key.ID, Size: x.Object.Size, Handle: x.Handle,
	}
	if err := h.session.RecordObject(o); err != nil {
		return fmt.Errorf("hold the descriptor of object %s: %w", x.Object.Key, err)
	}
	crash.Point("daemon.hold.before-push")
	if err := h.store.Push(o.Name, x.File); err != nil {
		// It may be there all the same.
		err = errors.Join(err, h.store.Remove(o.Name), h.session.ForgetObject(o.Name))
		return fmt.Errorf("hold the descriptor of object %s: %w", x.Object.Key, err)
	}
	crash.Point("daemon.hold.after-push")
	h.Known(x.Object.Key, x.Handle, o.Name)
	return nil
}

// Drop implements [fscache.Holder].
// ORDER: supervisor before record, for the same reason.
func (h *Holder) Drop(x fscache.Held) {
	<-h.ready
	h.changing.RLock()
	defer h.changing.RUnlock()
	k := heldKey{x.Object.Key, x.Handle}
	h.mu.Lock()
	name, ok := h.names[k]
	delete(h.names, k)
	left := h.left
	h.mu.Unlock()
	if !ok || left {
		return
	}
	crash.Point("daemon.drop.before-remove")
	if err := h.store.Remove(name); err != nil {
		h.log.Error("let go of an object's descriptor: the supervisor may go on holding it", zap.Stringer("object", k.key), zap.Error(err))
		return // the record stays with it
	}
	crash.Point("daemon.drop.after-remove")
	if err := h.session.ForgetObject(name); err != nil {
		h.log.Error("forget an object's descriptor", zap.Stringer("object", k.key), zap.Error(err))
	}
}

// nameOf is the name of what is held, "" if it is not.
func (h *Holder) nameOf(k heldKey) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.names[k]
}

// byKey lists the names of what is held.
func (h *Holder) byKey() map[heldKey]string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return maps.Clone(h.names)
}

// Held lists what is held, for the status: names by object.
func (h *Holder) Held() map[string]fscache.Key {
	h.mu.Lock()
	defer h.mu.Unlock()
	list := make(map[string]fscache.Key, len(h.names))
	for k, name := range h.names {
		list[name] = k.key
	}
	return list
}

// Inherit matches what the supervisor gave back with the records of it: files is what it gave, by name. A record without a
// descriptor is of one that never reached the supervisor, or has left it; a descriptor without a record has lost it. Neither is an object
// that can be named, and both are let go: the kernel asks for such objects anew where it can. So is everything if the lifeline that objects
// belong to did not come with them.
func (h *Holder) Inherit(files map[string]*os.File, lifeline bool) ([]fscache.Held, error) {
	<-h.ready
	records, err := h.session.Objects()
	if err != nil {
		return nil, err
	}
	var held []fscache.Held
	known := map[string]bool{}
	for _, r := range records {
		f := files[r.Name]
		if f == nil {
			h.log.Info("an object's descriptor did not outlive its process", zap.String("name", r.Name), zap.String("object", r.Domain+"/"+r.ID))
			if err := h.session.ForgetObject(r.Name); err != nil {
				return nil, err
			}
			continue
		}
		if !lifeline {
			continue
		}
		known[r.Name] = true
		key := fscache.Key{Domain: r.Domain, ID: r.ID}
		h.Known(key, r.Handle, r.Name)
		held = append(held, fscache.Held{Object: fscache.Object{Key: key, Size: r.Size}, Handle: r.Handle, File: f})
	}
	for name, f := range files {
		if !isObjectName(name) || known[name] {
			continue
		}
		h.log.Warn("the supervisor holds an object's descriptor that is of no use: it is let go", zap.String("name", name), zap.Bool("lifeline", lifeline))
		if err := errors.Join(f.Close(), h.store.Remove(name), h.session.ForgetObject(name)); err != nil {
			return nil, err
		}
	}
	return held, nil
}

// isObjectName says whether a name in the fd store is one of an object's descriptor.
func isObjectName(name string) bool {
	rest, ok := strings.CutPrefix(name, objectName)
	return ok && rest != "" && strings.Trim(rest, "0123456789abcdefghijklmnopqrstuvwxyz") == ""
}
