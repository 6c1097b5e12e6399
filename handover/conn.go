package handover

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// A Conn is the connection between the two sides of an upgrade, and each side's hold on the other's process. [Start] makes that of the
// predecessor, [Dial] that of the successor.
type Conn struct {
	sock    *net.UnixConn // seqpacket
	peer    process       // nil once it is closed
	version uint16        // of what is sent and received, once agreed on
	sending []byte        // the frame being sent, kept for its capacity
	release func() error  // what else Close gives back
}

// PID is the id of the other side's process: what the predecessor tells the supervisor with [Store.MainPID].
func (c *Conn) PID() int { return c.peer.id() }

// A process is the other side's.
type process interface {
	id() int
	// kill ends it, and returns when it has ended.
	kill() error
	// gone is closed when it has ended: no thread of it runs any more.
	gone() <-chan struct{}
	close() error
}

// A frame is one that was received. Its files are its holder's.
type frame struct {
	version uint16
	kind    frameType
	body    []byte
	files   []*os.File
}

// Close ends the connection. The predecessor's socket is gone then, and another upgrade may begin.
func (c *Conn) Close() error {
	err := c.sock.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil // Give and Take close it too
	}
	if c.peer != nil {
		err = errors.Join(err, c.peer.close())
		c.peer = nil
	}
	if c.release != nil {
		err = errors.Join(err, c.release())
		c.release = nil
	}
	return err
}

// send sends one frame. After an error nothing of it was queued: a packet is sent whole or not at all.
func (c *Conn) send(t frameType, body []byte, files []NamedFile) error {
	c.sending = appendFrame(c.sending[:0], c.versionOf(t), t, body)
	err := withNumbers(files, make([]int, 0, len(files)), func(numbers []int) error {
		var oob []byte
		if len(numbers) > 0 {
			oob = unix.UnixRights(numbers...)
		}
		_, _, err := c.sock.WriteMsgUnix(c.sending, oob, nil)
		return err
	})
	if err != nil {
		return fmt.Errorf("send %v: %w", t, err)
	}
	return nil
}

// versionOf is the version in the header of frames of that type; 0: none is agreed on yet.
func (c *Conn) versionOf(t frameType) uint16 {
	if t == frameHello || t == frameAbort {
		return eternalVersion
	}
	return c.version
}

// withNumbers calls f with the numbers of files' descriptors, which nobody can close meanwhile. (File.Fd may make a descriptor blocking
// that other processes share.)
func withNumbers(files []NamedFile, numbers []int, f func([]int) error) (err error) {
	if len(files) == 0 {
		return f(numbers)
	}
	raw, err := files[0].File.SyscallConn()
	if err != nil {
		return fmt.Errorf("descriptor %q: %w", files[0].Name, err)
	}
	ctlErr := raw.Control(func(fd uintptr) { err = withNumbers(files[1:], append(numbers, int(fd)), f) })
	if ctlErr != nil {
		return fmt.Errorf("descriptor %q: %w", files[0].Name, ctlErr)
	}
	return err
}

// receive waits for one frame. buf and oob are the caller's to lend; the frame keeps nothing of them. The error is io.EOF if the other
// side has closed the connection, which its death does.
func (c *Conn) receive(buf, oob []byte) (frame, error) {
	n, oobn, flags, _, err := c.sock.ReadMsgUnix(buf, oob) // asks for close-on-exec: MSG_CMSG_CLOEXEC
	if errors.Is(err, unix.ECONNRESET) {
		// The peer closed with packets unread (unix_release_sock). It is said once, and before what the peer had sent.
		n, oobn, flags, _, err = c.sock.ReadMsgUnix(buf, oob)
	}
	if err != nil {
		return frame{}, err
	}
	numbers, _, err := parseControl(oob[:oobn], nil)
	files := make([]*os.File, len(numbers))
	for i, fd := range numbers {
		files[i] = os.NewFile(uintptr(fd), "received")
	}
	f := frame{files: files}
	if err == nil {
		err = decodePacket(&f, buf[:n], flags)
	}
	if err != nil {
		closeFiles(files)
		return frame{}, fmt.Errorf("receive: packet of %d bytes with %d descriptors: %w", n, len(files), err)
	}
	return f, nil
}

// decodePacket makes a packet a frame; f has its files.
func decodePacket(f *frame, b []byte, flags int) error {
	if flags&unix.MSG_CTRUNC != 0 {
		return errors.New("descriptors were lost (this process may have reached RLIMIT_NOFILE: raise LimitNOFILE=)")
	}
	if flags&unix.MSG_TRUNC != 0 {
		return errors.New("it was truncated")
	}
	version, t, body, err := decodeFrame(b)
	if err != nil {
		return err
	}
	if t != frameRecord && len(f.files) > 0 || len(f.files) > maxFrameFiles {
		return fmt.Errorf("%v with %d descriptors", t, len(f.files))
	}
	f.version, f.kind, f.body = version, t, append([]byte(nil), body...)
	return nil
}
