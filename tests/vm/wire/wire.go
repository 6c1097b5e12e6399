// Package wire is what the host and PID 1 of the guest say to each other over the virtio-serial port.
//
// The conversation: guest Hello; host Job; guest any number of Stdout and Stderr; guest Exit or Failure; host Bye, after which the
// guest powers off. The guest waits for Bye because a byte is safe only when the host has read it: powering off drops what is queued.
//
// With Task.Systemd the guest's end changes hands after the Job: PID 1 closes the port and becomes systemd, and a service of it opens
// the port again. The host says nothing between Job and Bye, so that there is nothing to lose meanwhile.
//
// A frame is one byte of kind, four bytes of payload length (little endian) and the payload.
package wire

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Kind says what a frame is.
type Kind byte

// The kinds of frames, in the order of a conversation.
const (
	Hello   Kind = iota + 1 // guest: PID 1 runs; no payload
	Job                     // host: what to run; JSON of Task
	Stdout                  // guest: bytes the command wrote
	Stderr                  // guest: bytes the command wrote
	Exit                    // guest: the command ended; int32 exit code, little endian
	Failure                 // guest: the command could not be run; text
	Bye                     // host: everything has been read; no payload
)

// MaxPayload bounds a frame's payload in bytes: a Job with a large environment fits.
const MaxPayload = 4 << 20

const headerLen = 5

// Task is what the guest is asked to run.
type Task struct {
	Command string
	Args    []string // without the command's name
	Env     []string
	Dir     string
	Disk    bool    // a disk is attached: mount it at DiskDir
	Shares  []Share // mounted read-write
	Systemd bool    // the host's systemd is PID 1, and runs the command in a service
}

// Share is a host directory that the guest writes through to.
type Share struct {
	Tag string // 9p mount tag
	Dir string // where it is, outside and inside
}

// DiskDir is where the guest mounts its disk.
const DiskDir = "/cache"

// JournalTTY is the serial line that systemd's journal goes to, apart from the kernel's.
const JournalTTY = "/dev/ttyS1"

// RootTag is the 9p mount tag of the host's root directory.
const RootTag = "root"

// PortName is the name of the virtio-serial port, as the guest finds it in /sys/class/virtio-ports.
const PortName = "holdfast.vm"

// Write sends one frame in one call of w.Write, so that frames from several goroutines that share a lock around Write stay whole.
func Write(w io.Writer, k Kind, payload []byte) error {
	if len(payload) > MaxPayload {
		return fmt.Errorf("writing frame of kind %d: %d bytes of payload, at most %d allowed", k, len(payload), MaxPayload)
	}
	b := make([]byte, headerLen, headerLen+len(payload))
	b[0] = byte(k)
	binary.LittleEndian.PutUint32(b[1:], uint32(len(payload)))
	if _, err := w.Write(append(b, payload...)); err != nil {
		return fmt.Errorf("writing frame of kind %d: %w", k, err)
	}
	return nil
}

// Read receives one frame. It returns io.EOF, unwrapped, when r ends between two frames.
func Read(r io.Reader) (Kind, []byte, error) {
	var h [headerLen]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		if err == io.EOF {
			return 0, nil, io.EOF
		}
		return 0, nil, fmt.Errorf("reading frame header: %w", err)
	}
	n := binary.LittleEndian.Uint32(h[1:])
	if n > MaxPayload {
		return 0, nil, fmt.Errorf("reading frame of kind %d: claims %d bytes of payload, at most %d allowed", h[0], n, MaxPayload)
	}
	p := make([]byte, n)
	if _, err := io.ReadFull(r, p); err != nil {
		return 0, nil, fmt.Errorf("reading %d bytes of payload of frame kind %d: %w", n, h[0], err)
	}
	return Kind(h[0]), p, nil
}
