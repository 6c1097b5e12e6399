package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"holdfast/state/crash"
)

// A Taker is the daemon that takes over. Take calls its methods one after the other, from one goroutine. Received records are the
// Taker's, with their files, whatever it returns.
type Taker interface {
	// Prepare opens everything, and checks that this process could serve. The predecessor serves; nothing is read or changed.
	Prepare([]Record) error
	// Update takes a record of what changed since, and of what the predecessor has in flight. That serves, or is about to stop.
	Update(Record) error
	// Commit says that this was all. After it this process can read, but does not yet.
	Commit() error
	// Start reads the engine from here on. The predecessor never does again.
	Start()
	// Done takes a record of what the predecessor has finished since.
	Done(Record)
	// Drained says that the predecessor answers no more: it has finished all (nil), or it is dead, and what it did not report as done is
	// this process's to answer.
	Drained(err error)
}

// Take takes over from the process at the other end of conn, by PROTOCOL.md. It closes the connection. If taken is false this process has
// not read the engine and must end, and the predecessor serves on or the supervisor takes care. If it is true this process is
// the daemon; the error then says why Drained was called with one, or that ctx ended before it was called.
func Take(ctx context.Context, conn *Conn, local Hello, t Taker, times Timeouts) (taken bool, err error) {
	v := &taking{side: newSide(conn, local, times), taker: t}
	defer v.receiver.close(conn)
	defer v.discard()
	v.records.understood = local.Understands
	v.within(2 * v.t.Hello)
	crash.Point("handover.take.before-hello")
	if err := v.hello(); err != nil {
		v.step(takeFailed, frame{}, err)
	}
	for v.state != takeEnded {
		v.step(v.wait(ctx))
	}
	return v.taken, v.err
}

// The states of the successor: PROTOCOL.md has the table.
type takeState uint8

const (
	takeGreeting takeState = iota
	takeReceiving
	takeOpening
	takeReady
	takeTaking
	takeWaiting
	takeDraining
	takeBurying
	takeEnded
	takeStates
)

func (s takeState) String() string {
	return [takeStates]string{"waiting for its hello", "receiving", "opening", "waiting for it to stop reading", "taking over", "waiting to be told to read",
		"waiting for what is in flight", "waiting for its end", "at the end"}[s]
}

type takeEvent uint8

const (
	takeHello    takeEvent = iota // the peer's, and both agree
	takeRecord                    // the peer's
	takePrepared                  // the peer's
	takeOpened                    // Taker.Prepare has returned
	takeCommit                    // the peer's
	takeTook                      // Taker.Commit has returned
	takeGo                        // the peer's
	takeDrained                   // the peer's
	takeDead                      // the predecessor is dead for certain
	takeFailed                    // the peer died, gave up or broke the protocol, or something failed here
	takeTimeOver                  // the state's time is over
	takeStopped                   // the caller's context ended
	takeEvents
)

type takeAction uint8

const (
	takeOpen    takeAction = iota // Taker.Prepare
	takeReport                    // ready
	takeHear                      // Taker.Update
	takeAccept                    // Taker.Commit
	takeTaken                     // taken
	takeRead                      // Taker.Start
	takePass                      // Taker.Done
	takeKill                      // kill the predecessor, and wait until it is dead
	takeFinish                    // Taker.Drained(nil)
	takeInherit                   // Taker.Drained(why)
	takeAbort                     // say that this side gives up
)

// takeNext is the successor's state machine. What has no entry of its own is a failure.
func takeNext(s takeState, e takeEvent) (takeState, []takeAction) {
	switch {
	case s == takeGreeting && e == takeHello:
		return takeReceiving, nil
	case s == takeReceiving && e == takeRecord:
		return takeReceiving, nil
	case s == takeReceiving && e == takePrepared:
		return takeOpening, []takeAction{takeOpen}
	case s == takeOpening && e == takeOpened:
		return takeReady, []takeAction{takeReport}
	case s == takeReady && e == takeRecord:
		return takeReady, []takeAction{takeHear}
	case s == takeReady && e == takeCommit:
		return takeTaking, []takeAction{takeAccept}
	case s == takeTaking && e == takeTook:
		return takeWaiting, []takeAction{takeTaken}
	case s == takeWaiting && e == takeGo:
		return takeDraining, []takeAction{takeRead}
	case s == takeDraining && e == takeRecord:
		return takeDraining, []takeAction{takePass}
	case s == takeDraining && e == takeDrained:
		return takeEnded, []takeAction{takeFinish}
	case s == takeBurying && e == takeDead:
		return takeEnded, []takeAction{takeInherit}
	case (s == takeDraining || s == takeBurying) && e == takeStopped, s == takeEnded:
		return takeEnded, nil
	case s == takeBurying && e == takeTimeOver:
		return takeBurying, []takeAction{takeKill}
	case s == takeDraining, s == takeBurying:
		return takeBurying, nil
	}
	return takeEnded, []takeAction{takeAbort}
}

// A taking is Take at work.
type taking struct {
	side
	taker   Taker
	state   takeState
	taken   bool
	err     error // the first failure
	records collector
	phase   []Record // complete
}

// wait returns the next thing that happens. The error is why, if it turns out to be a failure.
func (v *taking) wait(ctx context.Context) (takeEvent, frame, error) {
	frames, failed, dead := v.receiver.frames, v.receiver.failed, v.conn.peer.gone()
	if v.state == takeBurying { // nothing of what it says counts any more
		frames, failed = nil, nil
	} else { // what it said before it died is still to be read
		dead = nil
	}
	select {
	case f := <-frames:
		e, err := v.understand(f)
		return e, f, err
	case err := <-failed:
		if errors.Is(err, io.EOF) {
			err = errPeerGone
		}
		return takeFailed, frame{}, err
	case <-dead:
		return takeDead, frame{}, nil
	case <-v.timer.C:
		return takeTimeOver, frame{}, errState(v.state, v.limit(v.state))
	case <-ctx.Done():
		return takeStopped, frame{}, contextError(ctx)
	}
}

// understand makes a frame an event.
func (v *taking) understand(f frame) (e takeEvent, err error) {
	if err := v.checkVersion(f); err != nil {
		closeFiles(f.files)
		return takeFailed, err
	}
	switch f.kind {
	case frameHello:
		e, err = takeHello, v.agree(f.body)
	case frameRecord:
		e, err = takeRecord, v.keep(f)
	case framePrepared:
		e, err = takePrepared, v.phaseEnds(f.body)
	case frameCommit:
		e, err = takeCommit, v.phaseEnds(f.body)
	case frameDrained:
		e, err = takeDrained, v.phaseEnds(f.body)
	case frameGo:
		e, err = takeGo, noBody(f)
	case frameAbort:
		e, err = takeFailed, abortedBy(f.body)
	default:
		e = takeFailed
	}
	if err != nil {
		return takeFailed, err
	}
	return e, fmt.Errorf("the old process sent %v while this one was %v: %w", f.kind, v.state, errOutOfTurn)
}

// keep puts a record's piece to the others.
func (v *taking) keep(f frame) error {
	p, err := decodePiece(f.body)
	if err != nil {
		closeFiles(f.files)
		return err
	}
	return v.records.add(p, f.files)
}

func (v *taking) phaseEnds(body []byte) error {
	n, err := decodeCount(body)
	if err == nil {
		v.phase, err = v.records.take(n)
	}
	return err
}

// step makes the transition for an event; why is the error if it turns out to be a failure.
func (v *taking) step(e takeEvent, f frame, why error) {
	was := v.state
	next, actions := takeNext(was, e)
	v.state = next
	if next == takeEnded && was < takeDraining || next == takeBurying && was != next || e == takeStopped {
		v.err = errors.Join(v.err, why)
	}
	if d := v.limit(next); d > 0 && next != was {
		v.within(d)
	}
	for _, a := range actions {
		if e, err, more := v.act(a); more {
			v.step(e, f, err)
		}
	}
}

// limit is what a state may take: twice what the predecessor gives it, which can put things right and loses patience first.
func (v *taking) limit(s takeState) time.Duration {
	switch s {
	case takeGreeting:
		return 2 * v.t.Hello
	case takeReceiving, takeReady:
		return 2 * v.t.Prepare
	case takeWaiting:
		return 2 * v.t.Commit
	case takeDraining:
		return 2 * v.t.Drain
	case takeBurying:
		return v.t.Drain
	}
	return 0
}

// act does one action. more says that it brought about an event; only the last action of a transition may.
func (v *taking) act(a takeAction) (e takeEvent, err error, more bool) {
	switch a {
	case takeOpen:
		crash.Point("handover.take.before-prepare")
		if err := v.taker.Prepare(v.take()); err != nil {
			return takeFailed, err, true
		}
		return takeOpened, nil, true
	case takeReport:
		crash.Point("handover.take.before-ready")
		err := v.send(frameReady, nil, nil)
		return takeFailed, err, err != nil
	case takeHear:
		if r, ok := v.records.pop(); ok {
			if err := v.taker.Update(r); err != nil {
				return takeFailed, err, true
			}
		}
	case takeAccept:
		crash.Point("handover.take.before-commit")
		if err := v.taker.Commit(); err != nil {
			return takeFailed, err, true
		}
		return takeTook, nil, true
	case takeTaken:
		crash.Point("handover.take.before-taken")
		err := v.send(frameTaken, nil, nil)
		crash.Point("handover.take.after-taken")
		return takeFailed, err, err != nil
	case takeRead:
		crash.Point("handover.take.before-start")
		v.taken = true
		v.taker.Start()
		crash.Point("handover.take.after-start")
	case takePass:
		if r, ok := v.records.pop(); ok {
			crash.Point("handover.take.before-done")
			v.taker.Done(r)
		}
	case takeKill:
		v.err = errors.Join(v.err, v.conn.peer.kill())
	case takeFinish:
		crash.Point("handover.take.before-drained")
		v.taker.Drained(nil)
	case takeInherit:
		crash.Point("handover.take.before-inherit")
		v.taker.Drained(v.err)
	case takeAbort:
		v.sendAbort(v.err)
	}
	return 0, nil, false
}

// discard closes what no Taker got.
func (v *taking) discard() {
	v.records.close()
	for _, r := range v.take() {
		r.Close()
	}
}

// take returns the records of the phase that has ended, which are the Taker's then.
func (v *taking) take() []Record {
	phase := v.phase
	v.phase = nil
	return phase
}
