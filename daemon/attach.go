package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/state"
	"holdfast/state/crash"
)

// What of a process's life is found in the run directory, and under which names the supervisor holds what is not an object's.
const (
	sessionFile = "session.db"
	inboxDir    = "inbox"
	socketName  = "api"
)

// Slots and slot sizes of an inbox. The slots bound how many requests are in flight; more of them wait in the kernel. A slot has room
// for the longest message of any engine, and for what the engine adds to it.
const (
	inboxSlots = 8192
	inboxSlot  = 1024 + 128
)

// An Origin is what a process finds that is about to be the daemon.
type Origin struct {
	Run        string              // directory for what lives with this boot, absolute, exists
	Inherited  map[string]*os.File // what the supervisor gave back, by name
	Supervisor Supervisor
	// Open opens an engine by name.
	Open func(name string, in fscache.Inherited, inbox fscache.Inbox, h fscache.Holder) (fscache.Engine, error)
	// Engine is the name of the engine to open. A successor has it from its predecessor.
	Engine string
}

// Attach makes of what a dead daemon left, if one did, the engine and the records that a Daemon needs, and puts them into o. After
// it the lifeline is held by the supervisor, whoever made it (I4). It runs before anything else of the process does: the
// numbers of descriptors matter to an engine. After an error nothing is left open but what is inherited.
//
// ORDER: the lifeline is with the supervisor before anything can be mounted, and on record as another one before it is there.
func Attach(a Origin, o *Options) (err error) {
	var undo undo
	defer func() {
		if err != nil {
			err = errors.Join(err, undo.run())
		}
	}()
	boot, err := state.BootID()
	if err != nil {
		return err
	}
	session, damaged, err := state.OpenSession(filepath.Join(a.Run, sessionFile), boot, o.Release)
	if err != nil {
		return err
	}
	undo.add(session.Close)
	holder := NewHolder(a.Supervisor, o.Log)
	holder.Start(session)
	in, boxes, more, err := inherit(a, boot, session, holder)
	if err != nil {
		return err
	}
	damaged = append(damaged, more...)
	inbox, err := newInbox(a, boot, o.Release)
	if err != nil {
		return err
	}
	undo.add(inbox.Close)
	crash.Point("daemon.attach.before-open")
	engine, err := a.Open(a.Engine, in, inbox, holder)
	if err != nil {
		return err
	}
	undo.add(engine.Close)
	crash.Point("daemon.attach.after-open")
	bereft, err := session.Bereft()
	if err != nil {
		return err
	}
	if in.Lifeline == nil {
		if err := session.SetBereft(true); err != nil {
			return err
		}
		if err := pushLifeline(engine, a.Supervisor, &undo); err != nil {
			return err
		}
	}
	for _, what := range damaged {
		o.Log.Error("what a dead daemon left was damaged", zap.String("what", what))
	}
	o.Engine, o.Session, o.Inbox, o.Holder, o.Supervisor = engine, session, inbox, holder, a.Supervisor
	o.Fresh, o.Bereft = in.Lifeline == nil, in.Lifeline == nil || bereft
	o.Damaged, o.Boxes = damaged, boxes
	return nil
}

// inherit collects what the engine's predecessor left.
func inherit(a Origin, boot string, session *state.Session, h *Holder) (in fscache.Inherited, boxes []state.ReadBox, damaged []string, err error) {
	in.Lifeline = a.Inherited[a.Engine]
	if in.Objects, err = h.Inherit(a.Inherited, in.Lifeline != nil); err != nil {
		return in, nil, nil, err
	}
	pending, err := session.Pending()
	if err != nil {
		return in, nil, nil, err
	}
	boxes, damaged, err = state.ReadInboxes(filepath.Join(a.Run, inboxDir), boot, a.Engine)
	if in.Lifeline == nil { // who asked was answered by the kernel when the last who had it let go
		return in, boxes, damaged, err
	}
	for _, r := range pending {
		in.Pending = append(in.Pending, recorded(r))
	}
	for _, b := range boxes {
		in.Messages = append(in.Messages, b.Messages...)
	}
	return in, boxes, damaged, err
}

func newInbox(a Origin, boot, release string) (*state.Inbox, error) {
	return state.NewInbox(filepath.Join(a.Run, inboxDir), state.InboxHeader{Engine: a.Engine, Boot: boot, Release: release, PID: os.Getpid()}, inboxSlots, inboxSlot)
}

// keepRecord puts what is in flight on record in place of the inboxes that had it. All objects must be known to the engine: a message
// alone does not always say which it is about.
//
// ORDER: on record before the inboxes are removed.
func keepRecord(r *recorder, session *state.Session, boxes []state.ReadBox) error {
	if err := r.keep(session); err != nil {
		return err
	}
	crash.Point("daemon.attach.before-remove-inbox")
	for _, b := range boxes {
		if err := b.Remove(); err != nil {
			return fmt.Errorf("remove the inbox of a dead daemon: %w", err)
		}
	}
	return nil
}

// pushLifeline gives a fresh engine's lifeline to the supervisor.
func pushLifeline(e fscache.Engine, s Supervisor, undo *undo) error {
	name, f := e.Lifeline()
	crash.Point("daemon.attach.before-push-lifeline")
	undo.add(func() error { return s.Remove(name) })
	if err := s.Push(name, f); err != nil {
		return err
	}
	crash.Point("daemon.attach.after-push-lifeline")
	return nil
}

// AttachSocket makes the API's listening socket, or takes the one that was inherited, and sees to it that the supervisor holds it:
// whoever asks while no daemon runs waits for the next one instead of being refused.
func AttachSocket(ctx context.Context, path string, inherited map[string]*os.File, s Supervisor) (net.Listener, error) {
	if f := inherited[socketName]; f != nil {
		defer f.Close()
		l, err := net.FileListener(f)
		if err != nil {
			return nil, fmt.Errorf("daemon: use the inherited socket %q: %w", socketName, err)
		}
		return l, nil
	}
	l, err := Listen(ctx, path)
	if err != nil {
		return nil, err
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		return l, nil
	}
	u.SetUnlinkOnClose(false)
	f, err := u.File()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("daemon: hold the API's socket: %w", err), l.Close())
	}
	defer f.Close()
	if err := s.Push(socketName, f); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// Abort takes back what Attach did, where no daemon was made of it.
func (o *Options) Abort() error {
	err := errors.Join(o.Engine.Close(), o.Session.Close(), o.Inbox.Close())
	if o.Listener != nil {
		err = errors.Join(err, o.Listener.Close())
	}
	if o.Fresh {
		err = errors.Join(err, release(o.Engine, o.Supervisor))
	}
	return err
}

// Leave tells the supervisor, after Run or Succeed, that this process is about to end, and takes back what it held, unless something that needs it
// is mounted: for certain after a good end, or where the lifeline is this process's own. (A keeper that held one for nothing would not end.)
// What a successor has is the successor's.
func (d *Daemon) Leave(good bool) error {
	if d.succession.over.Load() {
		return nil
	}
	if err := d.opt.Supervisor.Notify("STOPPING=1"); err != nil {
		d.log.Warn("tell the supervisor of the end", zap.Error(err))
	}
	if !d.Unused() || !good && !d.opt.Fresh {
		d.log.Info("the supervisor keeps what mounts depend on")
		return nil
	}
	if d.wentIdle { // who comes to the socket brings the next daemon
		name, _ := d.engine.Lifeline()
		return d.opt.Supervisor.Remove(name)
	}
	return release(d.engine, d.opt.Supervisor)
}

// release takes back from the supervisor the engine's lifeline, whose last close breaks every mount, and the API's socket.
func release(e fscache.Engine, s Supervisor) error {
	name, _ := e.Lifeline()
	return errors.Join(s.Remove(name), s.Remove(socketName))
}
