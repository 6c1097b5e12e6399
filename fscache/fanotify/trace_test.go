package fanotify_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/fanotify"
	"holdfast/fscache/internal/erofs"
	"holdfast/fscache/internal/trace"
	"holdfast/fscache/simkernel"
)

// TestTheModelDoesWhatTheKernelDoes does a script on this kernel and on the simulated one.
func TestTheModelDoesWhatTheKernelDoes(t *testing.T) {
	dir := t.TempDir()
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_PRE_CONTENT|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK|unix.FAN_UNLIMITED_QUEUE, unix.O_RDWR|unix.O_LARGEFILE|unix.O_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, dir: dir, group: fd, events: make(map[string]fanotify.Event)}
	m.Host = trace.NewHost(t, m.mount)
	t.Cleanup(func() { _ = unix.Close(m.group) })
	trace.Compare(t, "fanotify", m, simkernel.NewModel(simkernel.Fanotify))
}

// A machine is this kernel's fanotify, without an engine.
type machine struct {
	*trace.Host
	t      *testing.T
	dir    string
	group  int
	events map[string]fanotify.Event
}

func (m *machine) path(blob string) string { return filepath.Join(m.dir, blob) }

func (m *machine) mount(bootstrap []byte, _ fscache.Object, blobs []fscache.Object) (int, error) {
	path := m.path("bootstrap")
	if err := os.WriteFile(path, bootstrap, 0o600); err != nil {
		return -1, err
	}
	options := []erofs.Option{{Name: "source", Value: path}}
	for _, b := range blobs {
		options = append(options, erofs.Option{Name: "device", Value: m.path(b.Key.ID)})
	}
	return erofs.New(options)
}

// Do implements trace.Machine.
func (m *machine) Do(s trace.Step) string {
	if result, ok := m.Host.Do(s); ok {
		return result
	}
	name := s.Args
	switch s.Verb {
	case "mark":
		return trace.ErrnoName(m.mark(name[0]))
	case "event":
		return m.read(name[0])
	case "starved":
		return m.starved(name[0])
	case "write":
		off, n := trace.Range(name[1])
		_, err := unix.Pwrite(int(m.events[name[0]].FD), trace.Data(n), off)
		return trace.ErrnoName(err)
	case "answer":
		return trace.ErrnoName(m.answer(m.events[name[0]].FD, name[1] == "allow"))
	case "close":
		return trace.ErrnoName(unix.Close(int(m.events[name[0]].FD)))
	case "occupy":
		return trace.ErrnoName(unix.Dup3(0, int(m.events[name[0]].FD), unix.O_CLOEXEC))
	case "last":
		return trace.ErrnoName(unix.Close(m.group))
	}
	return "no such step"
}

func (m *machine) mark(blob string) error {
	f, err := os.OpenFile(m.path(blob), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	m.t.Cleanup(func() { f.Close() })
	if err := f.Truncate(trace.BlobSize); err != nil {
		return err
	}
	return unix.FanotifyMark(m.group, unix.FAN_MARK_ADD, unix.FAN_PRE_ACCESS, unix.AT_FDCWD, f.Name())
}

// read waits for an event and reads it. No descriptor may be opened or closed elsewhere meanwhile.
func (m *machine) read(name string) string {
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(m.group), Events: unix.POLLIN}}, 10_000); n != 1 {
		return fmt.Sprint("nothing ", err)
	}
	lowest, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return trace.ErrnoName(err)
	}
	_ = unix.Close(lowest)
	b := make([]byte, 256)
	n, err := unix.Read(m.group, b)
	if err != nil {
		return trace.ErrnoName(err)
	}
	ev, _, err := fanotify.DecodeEvent(b[:n])
	if err != nil {
		return err.Error()
	}
	m.events[name] = ev
	link, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(int(ev.FD)))
	if err != nil {
		return err.Error()
	}
	what := fmt.Sprintf("read %s %d+%d", filepath.Base(link), ev.Off, ev.Len)
	if int(ev.FD) != lowest {
		return fmt.Sprintf("%s as %d, and not %d", what, ev.FD, lowest)
	}
	return what + " lowest"
}

// starved reads an event while the process may have no descriptor more.
func (m *machine) starved(name string) string {
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		return err.Error()
	}
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(m.group), Events: unix.POLLIN}}, 10_000); n != 1 {
		return fmt.Sprint("nothing ", err)
	}
	none := unix.Rlimit{Cur: 0, Max: old.Max}
	if err := syscall.Setrlimit(unix.RLIMIT_NOFILE, (*syscall.Rlimit)(&none)); err != nil {
		return err.Error()
	}
	_, err := unix.Read(m.group, make([]byte, 256))
	if err := syscall.Setrlimit(unix.RLIMIT_NOFILE, (*syscall.Rlimit)(&old)); err != nil {
		return err.Error()
	}
	return trace.ErrnoName(err)
}

func (m *machine) answer(number int32, allow bool) error {
	response := uint32(unix.FAN_ALLOW)
	if !allow {
		response = unix.FAN_DENY | uint32(unix.EIO)<<24
	}
	b := binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, uint32(number)), response)
	_, err := unix.Write(m.group, b)
	return err
}
