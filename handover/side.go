package handover

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// A receiver reads frames in a goroutine of its own, so that its owner can wait for other things too.
type receiver struct {
	frames chan frame
	failed chan error // one, the last thing that comes
	stop   chan struct{}
	done   chan struct{}
}

// receiver starts one. Its owner must call close.
func (c *Conn) receiver() *receiver {
	r := &receiver{frames: make(chan frame), failed: make(chan error, 1), stop: make(chan struct{}), done: make(chan struct{})}
	// The goroutine ends with the first error, which closing the connection gives it, and is waited for in close.
	go func() {
		defer close(r.done)
		buf := make([]byte, frameHeader+maxBody+1)
		oob := make([]byte, unix.CmsgSpace(maxPassed*4))
		for {
			f, err := c.receive(buf, oob)
			if err != nil {
				r.failed <- err
				return
			}
			select {
			case r.frames <- f:
			case <-r.stop:
				closeFiles(f.files)
			}
		}
	}()
	return r
}

// close ends it, with the connection's socket.
func (r *receiver) close(c *Conn) {
	close(r.stop)
	_ = c.sock.Close() // what was queued stays queued: nothing depends on what this returns
	<-r.done
}

// Timeouts are the times of PROTOCOL.md. Zero means the default.
type Timeouts struct {
	Start, Hello, Prepare, Commit, Drain time.Duration
}

func (t Timeouts) orDefault() Timeouts {
	for _, d := range []struct {
		have *time.Duration
		want time.Duration
	}{
		{&t.Start, 10 * time.Second}, {&t.Hello, 5 * time.Second}, {&t.Prepare, 60 * time.Second},
		{&t.Commit, 500 * time.Millisecond}, {&t.Drain, 60 * time.Second},
	} {
		if *d.have <= 0 {
			*d.have = d.want
		}
	}
	return t
}

// A side is what both sides of an upgrade have in common. One goroutine has it.
type side struct {
	conn     *Conn
	local    spoken
	peer     spoken
	t        Timeouts
	receiver *receiver
	timer    *time.Timer
}

func newSide(conn *Conn, local Hello, t Timeouts) side {
	return side{
		conn: conn, local: spoken{local, minVersion, maxVersion}, t: t.orDefault(),
		receiver: conn.receiver(), timer: time.NewTimer(time.Hour),
	}
}

// hello sends this side's.
func (s *side) hello() error {
	body, err := s.local.body()
	if err != nil {
		return fmt.Errorf("this release's own hello: %w", err)
	}
	return s.send(frameHello, body, nil)
}

// agree works off the peer's hello.
func (s *side) agree(body []byte) (err error) {
	if s.peer, err = decodeHello(body); err != nil {
		return err
	}
	s.conn.version, err = agree(s.local, s.peer)
	return err
}

// within limits what the state may take, sending included.
func (s *side) within(d time.Duration) {
	s.timer.Reset(d)
	// It fails if the connection is closed, as does what follows then.
	_ = s.conn.sock.SetWriteDeadline(time.Now().Add(d))
}

var errPeerGone = errors.New("the other process ended, or closed the connection")

// errState is the cause of a failure by time.
func errState(state fmt.Stringer, d time.Duration) error {
	return fmt.Errorf("nothing came for %v while %v", d, state)
}

// abortedBy makes a received abort the error it reports.
func abortedBy(body []byte) error {
	text, err := decodeAbort(body)
	if err != nil {
		return err
	}
	return fmt.Errorf("the other process gave up: %q", text)
}

// checkVersion checks that of a frame. It is the owner's to do: what comes behind a hello may be received before that is worked off.
func (s *side) checkVersion(f frame) error {
	want := s.conn.versionOf(f.kind)
	if want == 0 {
		return fmt.Errorf("%v before a version of the protocol is agreed on: %w", f.kind, errOutOfTurn)
	}
	if f.version != want {
		return fmt.Errorf("%v of version %d: %w (%d)", f.kind, f.version, errFrameVersion, want)
	}
	return nil
}

// noBody checks a frame that says all by its type.
func noBody(f frame) error {
	if len(f.body) != 0 {
		return fmt.Errorf("%v: %w", f.kind, errFrameBody)
	}
	return nil
}

// whySendFailed finds the reason of a broken connection: what the peer said before it closed the connection is still to be read.
func (s *side) whySendFailed(err error) error {
	for errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		select {
		case f := <-s.receiver.frames:
			closeFiles(f.files)
			if f.kind == frameAbort {
				return abortedBy(f.body)
			}
		case <-s.receiver.failed:
			return errPeerGone
		}
	}
	return err
}

// send sends one frame.
func (s *side) send(t frameType, body []byte, files []NamedFile) error {
	return s.whySendFailed(s.conn.send(t, body, files))
}

// sendAbort tells why this side gives up, if the other can still be told.
func (s *side) sendAbort(why error) {
	_ = s.conn.sock.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	_ = s.conn.send(frameAbort, abortBody(why), nil)
}

// contextError is why ctx ended.
func contextError(ctx context.Context) error {
	return fmt.Errorf("the upgrade was called off: %w", context.Cause(ctx))
}
