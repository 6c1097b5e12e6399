package simkernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/internal/trace"
)

// A Model does a trace's steps on a simulated kernel, below what an Engine makes of it.
type Model struct {
	k       *Kernel
	p       *Engine // has the descriptors
	mounts  map[string]*error
	dirs    map[string]string
	readers map[string]*Reader
	got     map[string]*request // by name
	anons   map[string]*anon
	closed  map[string]bool
}

// NewModel makes one with an empty cache.
func NewModel(mode Mode) *Model {
	k := New(mode)
	k.kept = false
	p, err := k.Open()
	if err != nil {
		panic(err) // there is no other process
	}
	return &Model{
		k: k, p: p,
		mounts: make(map[string]*error), dirs: make(map[string]string), readers: make(map[string]*Reader),
		got: make(map[string]*request), anons: make(map[string]*anon), closed: make(map[string]bool),
	}
}

// Do implements trace.Machine.
func (m *Model) Do(s trace.Step) string {
	m.k.mu.Lock()
	defer m.k.mu.Unlock()
	switch s.Verb {
	case "mount":
		return m.mount(s.Args)
	case "made":
		return m.made(s.Args[0])
	case "unmount":
		return trace.ErrnoName(m.k.unmount(s.Args[0]))
	case "reader", "victim":
		return m.reader(s.Args)
	case "asleep", "end", "kill":
		return m.readerStep(s.Verb, m.readers[s.Args[0]])
	case "write":
		return m.write(s.Args)
	case "last":
		m.k.mu.Unlock()
		m.p.Kill()
		m.k.mu.Lock()
		return "ok"
	}
	if m.k.device != nil {
		return m.doDevice(s)
	}
	return m.doGroup(s)
}

func (m *Model) file(k fscache.Key, size int64) {
	if m.k.files[k] == nil {
		m.k.files[k] = &file{size: size, pages: make(map[int64][]byte)}
	}
}

func (m *Model) mount(args []string) string {
	img := fscache.Mount{Dir: args[0], Bootstrap: fscache.Object{Key: trace.Key(args[1]), Size: page}}
	m.file(img.Bootstrap.Key, page)
	n := &mount{Mount: img, cache: make(map[fscache.Key]map[int64][]byte)}
	for _, b := range args[2:] {
		m.file(trace.Key(b), trace.BlobSize)
		n.Blobs = append(n.Blobs, trace.Blob(b))
		n.cache[trace.Key(b)] = make(map[int64][]byte)
	}
	m.k.low.mount(new(waiter), n, func(err error) {
		m.mounts[args[0]] = &err
		if err == nil {
			m.k.mounts[args[0]] = n
		}
	})
	return "ok"
}

func (m *Model) made(name string) string {
	switch err := m.mounts[name]; {
	case err == nil:
		return "waits"
	case *err != nil:
		return "failed" // EROFS has a few errnos for it, by timing
	}
	return "ok"
}

func (m *Model) reader(args []string) string {
	off, n := trace.Range(args[3])
	r, err := m.k.startRead(args[1], trace.Key(args[2]), make([]byte, n), off, nil)
	m.readers[args[0]] = r
	return trace.ErrnoName(err)
}

func (m *Model) readerStep(verb string, r *Reader) string {
	switch {
	case verb == "asleep":
		return strconv.FormatBool(!r.ended)
	case verb == "kill":
		m.k.low.cancel(&r.wait)
		r.finish(context.Canceled)
		return "ok"
	case !r.ended:
		return "asleep"
	case errors.Is(r.err, context.Canceled):
		return "killed"
	}
	return trace.Outcome(r.p, r.err)
}

func (m *Model) write(args []string) string {
	off, n := trace.Range(args[1])
	key := fscache.Key{}
	if a := m.anons[args[0]]; a != nil {
		if key = a.object.key; !a.object.attached {
			return "ENOBUFS"
		}
	} else {
		key = m.got[args[0]].key
	}
	m.k.files[key].write(bytes.Repeat([]byte{1}, int(n)), off)
	return "ok"
}

func (m *Model) doDevice(s trace.Step) string {
	d := m.k.device
	switch s.Verb {
	case "request":
		return m.request(s.Args[0])
	case "closes":
		var names []string
		for _, name := range s.Args {
			names = append(names, m.request(name))
		}
		slices.Sort(names)
		return strings.Join(names, ", ")
	case "copen":
		e := fscache.OK
		if _, err := strconv.ParseInt(s.Args[1], 10, 64); err != nil {
			e = fscache.EIO
		}
		return gone(d.copen(m.got[s.Args[0]].number, e))
	case "complete":
		return gone(d.complete(m.anons[s.Args[1]], m.got[s.Args[0]].number))
	case "attached":
		return trace.ErrnoName(nil)
	case "dup":
		a := m.anons[s.Args[0]]
		a.holders++
		m.anons[s.Args[1]] = a
	case "close":
		d.close(m.anons[s.Args[0]])
	case "restore":
		if d.restore() != nil {
			return unix.ErrnoName(unix.EOPNOTSUPP)
		}
	default:
		return "no such step"
	}
	return "ok"
}

// gone is the errno of an answer that nobody waits for.
func gone(err error) string {
	if errors.Is(err, fscache.ErrGone) {
		return "EINVAL"
	}
	return trace.ErrnoName(err)
}

// request reads until something comes, as who polls does.
func (m *Model) request(name string) string {
	for range 3 {
		r, a, err := m.k.device.read(m.p, true)
		if err != nil {
			return trace.ErrnoName(err)
		}
		if r == nil {
			continue
		}
		m.got[name] = r
		switch r.op {
		case fscache.OpOpen:
			m.anons[name] = a
			return fmt.Sprintf("open %s #%d", r.key.ID, r.number)
		case fscache.OpClose:
			return "close " + r.key.ID
		}
		return fmt.Sprintf("read %s %d+%d #%d", r.key.ID, r.off, r.n, r.number)
	}
	return "nothing"
}

func (m *Model) doGroup(s trace.Step) string {
	g := m.k.group
	name := s.Args[0]
	switch s.Verb {
	case "mark":
		m.file(trace.Key(name), trace.BlobSize)
		g.marks[trace.Key(name)] = true
		m.p.fan.open()
	case "event", "starved":
		number := m.p.fan.lowest(0)
		if s.Verb == "starved" {
			number = -1
		}
		r, err := g.read(m.p, number)
		if err != nil {
			return trace.ErrnoName(err)
		}
		if r == nil {
			return "nothing"
		}
		m.p.fan.occupy(number)
		m.got[name] = r
		return fmt.Sprintf("read %s %d+%d lowest", r.key.ID, r.off, r.n)
	case "answer":
		e := fscache.OK
		if s.Args[1] == "deny" {
			e = fscache.EIO
		}
		if g.answer(m.got[name].number, e, nil) != nil {
			return unix.ErrnoName(unix.ENOENT)
		}
	case "close":
		m.p.fan.close(int(m.got[name].number))
	case "occupy":
		m.p.fan.occupy(int(m.got[name].number))
	default:
		return "no such step"
	}
	return "ok"
}
