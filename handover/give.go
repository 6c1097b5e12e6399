package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"holdfast/state/crash"
)

// A Giver is the daemon that hands over. Give calls its methods one after the other, from one goroutine.
type Giver interface {
	// Prepare returns all but what is in flight. The daemon serves on.
	Prepare() ([]Record, error)
	// Update returns what has changed since Prepare. The daemon still serves: it leaves less to be told while nobody reads.
	Update() ([]Record, error)
	// Commit stops reading the engine, and returns what has changed since Update and what is in flight. After an error it has
	// rolled itself back and serves on. It bounds its own time: readers wait from here on.
	Commit() ([]Record, error)
	// Resume reads again: after Commit, and only if the successor is dead and has read nothing.
	Resume()
	// Done is called once, when the successor has been told to read, and does not block. From then on the supervisor can be told too
	// (Store.MainPID), by a goroutine of the Giver's. What comes from the channel is told to the successor: each request as it is
	// answered. It is closed when none is left. Give receives from it until then, or until Timeouts.Drain is over.
	Done() <-chan Record
}

// A Given says how an upgrade went.
type Given struct {
	Peer  Hello         // the successor's; zero if it said none
	Taken bool          // the successor reads
	Pause time.Duration // if Taken: from the call of Giver.Commit until the successor was told to read
}

// Give hands over to the process at the other end of conn, by PROTOCOL.md. It closes the connection.
//
// If Taken is false the error says why, the successor is dead, and this process serves on. If Taken is true this process never reads
// the engine again, and must end: with an error, the successor did not live to take everything (it is dead, and the supervisor has to
// start the daemon anew), or has to finish what this process did not, which it does once this process is dead.
func Give(ctx context.Context, conn *Conn, local Hello, g Giver, t Timeouts) (Given, error) {
	v := &giving{side: newSide(conn, local, t), giver: g}
	defer v.receiver.close(conn)
	v.state = giveGreeting
	v.within(v.t.Hello)
	crash.Point("handover.give.before-hello")
	if err := v.hello(); err != nil {
		v.step(giveFailed, frame{}, err)
	}
	for v.state != giveEnded {
		v.step(v.wait(ctx))
	}
	v.given.Peer = v.peer.Hello
	return v.given, v.err
}

// The states of the predecessor: PROTOCOL.md has the table.
type giveState uint8

const (
	giveGreeting giveState = iota
	givePreparing
	giveFreezing
	giveFrozen
	giveGranting
	giveDraining
	giveOrphaned
	giveEnded
	giveStates
)

func (s giveState) String() string {
	return [giveStates]string{"waiting for its hello", "waiting for it to be ready", "stopping to read", "waiting for it to take over",
		"telling it to read", "finishing what is in flight", "finishing what is in flight without a successor", "at the end"}[s]
}

type giveEvent uint8

const (
	giveHello    giveEvent = iota // the peer's, and both agree
	giveReady                     // the peer's
	giveStopped                   // Giver.Commit has returned
	giveTaken                     // the peer's
	giveGranted                   // go is queued
	giveDone                      // a record from Giver.Done
	giveAllDone                   // Giver.Done is closed
	giveFailed                    // the peer died, gave up or broke the protocol, or something failed here
	giveTimeOver                  // the state's time is over, or the caller's context ended
	giveEvents
)

type giveAction uint8

const (
	giveSnapshot giveAction = iota // Giver.Prepare, and send it
	giveFreeze                     // Giver.Update, and send it; Giver.Commit
	giveCommit                     // send what it returned
	giveGo                         // tell the successor to read
	giveReport                     // send a record from Giver.Done
	giveDrained                    // say that there are no more
	giveAbort                      // say that this side gives up
	giveKill                       // kill the successor, and reap it
	giveResume                     // Giver.Resume
)

// giveNext is the predecessor's state machine. What has no entry of its own is a failure.
func giveNext(s giveState, e giveEvent) (giveState, []giveAction) {
	switch {
	case s == giveGreeting && e == giveHello:
		return givePreparing, []giveAction{giveSnapshot}
	case s == givePreparing && e == giveReady:
		return giveFreezing, []giveAction{giveFreeze}
	case s == giveFreezing && e == giveStopped:
		return giveFrozen, []giveAction{giveCommit}
	case s == giveFrozen && e == giveTaken:
		return giveGranting, []giveAction{giveGo}
	case s == giveGranting && e == giveGranted:
		return giveDraining, nil
	case s == giveDraining && e == giveDone:
		return giveDraining, []giveAction{giveReport}
	case s == giveDraining && e == giveAllDone:
		return giveEnded, []giveAction{giveDrained}
	case s == giveOrphaned && e == giveAllDone, (s == giveDraining || s == giveOrphaned) && e == giveTimeOver, s == giveEnded:
		return giveEnded, nil
	}
	switch s {
	case giveGreeting, givePreparing, giveFreezing:
		return giveEnded, []giveAction{giveAbort, giveKill}
	case giveFrozen, giveGranting:
		return giveEnded, []giveAction{giveAbort, giveKill, giveResume} // ORDER: it is certain that nobody reads, then this process does
	}
	return giveOrphaned, nil
}

// A giving is Give at work.
type giving struct {
	side
	giver  Giver
	state  giveState
	given  Given
	err    error // the first failure
	frozen []Record
	asked  time.Time // when Giver.Commit was called
	sent   uint32    // records sent in this phase
	done   <-chan Record
	record Record // from Giver.Done, to be sent
}

// wait returns the next thing that happens. The error is why, if it turns out to be a failure.
func (v *giving) wait(ctx context.Context) (giveEvent, frame, error) {
	frames, failed := v.receiver.frames, v.receiver.failed
	if v.state == giveOrphaned { // nothing of what it says counts any more
		frames, failed = nil, nil
	}
	select {
	case f := <-frames:
		e, err := v.understand(f)
		return e, f, err
	case err := <-failed:
		if errors.Is(err, io.EOF) {
			err = errPeerGone
		}
		return giveFailed, frame{}, err
	case r, ok := <-v.done:
		if !ok {
			return giveAllDone, frame{}, nil
		}
		v.record = r
		return giveDone, frame{}, nil
	case <-v.timer.C:
		return giveTimeOver, frame{}, v.timeOver()
	case <-ctx.Done():
		return giveTimeOver, frame{}, contextError(ctx)
	}
}

func (v *giving) timeOver() error {
	if v.state == giveDraining || v.state == giveOrphaned {
		return fmt.Errorf("requests are still in flight after %v: the new process finishes them when this one has ended", v.t.Drain)
	}
	return errState(v.state, v.limit(v.state))
}

// understand makes a frame an event.
func (v *giving) understand(f frame) (e giveEvent, err error) {
	closeFiles(f.files) // of a record: a successor sends none, and it is out of turn
	if err := v.checkVersion(f); err != nil {
		return giveFailed, err
	}
	switch f.kind {
	case frameHello:
		e, err = giveHello, v.agree(f.body)
	case frameReady:
		e, err = giveReady, noBody(f)
	case frameTaken:
		e, err = giveTaken, noBody(f)
	case frameAbort:
		e, err = giveFailed, abortedBy(f.body)
	default:
		e = giveFailed
	}
	if err != nil {
		return giveFailed, err
	}
	return e, fmt.Errorf("the new process sent %v while this one was %v: %w", f.kind, v.state, errOutOfTurn)
}

// step makes the transition for an event; why is the error if it turns out to be a failure.
func (v *giving) step(e giveEvent, f frame, why error) {
	was := v.state
	next, actions := giveNext(was, e)
	v.state = next
	if next == giveOrphaned && was != next || next == giveEnded && was < giveDraining || e == giveTimeOver {
		v.err = errors.Join(v.err, why)
	}
	if d := v.limit(next); d > 0 && next != was {
		v.within(d)
	}
	if next == giveDraining && next != was {
		v.given.Taken = true
		v.done = v.giver.Done()
	}
	for _, a := range actions {
		if e, err, more := v.act(a); more {
			v.step(e, f, err)
		}
	}
}

// limit is what a state may take; 0: nothing of its own.
func (v *giving) limit(s giveState) time.Duration {
	switch s {
	case giveGreeting:
		return v.t.Hello
	case givePreparing:
		return v.t.Prepare
	case giveFrozen:
		return v.t.Commit
	case giveDraining:
		return v.t.Drain
	}
	return 0
}

// act does one action. more says that it brought about an event; only the last action of a transition may.
func (v *giving) act(a giveAction) (e giveEvent, err error, more bool) {
	switch a {
	case giveSnapshot:
		records, err := v.giver.Prepare()
		if err == nil {
			err = v.sendPhase(records, framePrepared)
		}
		return giveFailed, err, err != nil
	case giveFreeze:
		records, err := v.giver.Update()
		if err == nil {
			err = v.sendRecords(records)
		}
		if err != nil {
			return giveFailed, err, true
		}
		crash.Point("handover.give.before-freeze")
		v.asked = time.Now()
		if v.frozen, err = v.giver.Commit(); err != nil {
			return giveFailed, err, true
		}
		crash.Point("handover.give.after-freeze")
		return giveStopped, nil, true
	case giveCommit:
		err := v.sendPhase(v.frozen, frameCommit)
		v.frozen = nil
		return giveFailed, err, err != nil
	case giveGo:
		crash.Point("handover.give.before-go")
		if err := v.send(frameGo, nil, nil); err != nil {
			return giveFailed, err, true
		}
		v.given.Pause = time.Since(v.asked)
		crash.Point("handover.give.after-go")
		return giveGranted, nil, true
	case giveReport:
		crash.Point("handover.give.before-report")
		err := v.sendRecord(v.record)
		return giveFailed, err, err != nil
	case giveDrained:
		crash.Point("handover.give.before-drained")
		v.err = v.send(frameDrained, appendCount(nil, v.sent), nil)
	case giveAbort:
		v.sendAbort(v.err)
	case giveKill:
		crash.Point("handover.give.before-kill")
		v.err = errors.Join(v.err, v.conn.peer.kill())
	case giveResume:
		crash.Point("handover.give.before-resume")
		v.giver.Resume()
	}
	return 0, nil, false
}

// sendPhase sends records, and the frame that ends the phase.
func (v *giving) sendPhase(records []Record, end frameType) error {
	if err := v.sendRecords(records); err != nil {
		return err
	}
	if end == framePrepared {
		crash.Point("handover.give.before-prepared")
	} else {
		crash.Point("handover.give.before-commit")
	}
	n := v.sent
	v.sent = 0
	return v.send(end, appendCount(nil, n), nil)
}

func (v *giving) sendRecords(records []Record) error {
	for _, r := range records {
		if err := v.sendRecord(r); err != nil {
			return err
		}
	}
	return nil
}

// sendRecord sends a record, unless the successor can do without and would not understand it.
func (v *giving) sendRecord(r Record) error {
	if !slices.Contains(v.peer.Understands, r.Kind) {
		if slices.Contains(v.local.Needs, r.Kind) {
			return fmt.Errorf("record of kind %q: needed, and not understood", r.Kind)
		}
		return nil
	}
	if err := r.check(); err != nil {
		return err
	}
	err := r.pieces(v.sent, func(p piece, files []NamedFile) error {
		crash.Point("handover.give.before-record")
		return v.send(frameRecord, p.append(nil), files)
	})
	if err != nil {
		return err
	}
	v.sent++
	return nil
}
