package enginetest

import (
	"errors"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// Dup returns another descriptor of the same open file.
func Dup(f *os.File) (*os.File, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var dupErr error
	err = raw.Control(func(n uintptr) { fd, dupErr = unix.FcntlInt(n, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(err, dupErr); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// An Inbox is an fscache.Inbox in memory that a test provides.
type Inbox struct {
	mu    sync.Mutex
	slots [][]byte
	lent  []bool
	free  []int
}

// NewInbox makes one in plain memory, which outlives engines but not the process.
func NewInbox(slots, size int) *Inbox { return NewInboxIn(make([]byte, slots*size), size) }

// NewInboxIn makes one of the given memory, which holds no messages.
func NewInboxIn(mem []byte, size int) *Inbox {
	b := &Inbox{slots: slices.Collect(slices.Chunk(mem, size))}
	b.lent = make([]bool, len(b.slots))
	for i := range b.slots {
		b.free = append(b.free, len(b.slots)-1-i)
	}
	return b
}

// Take implements fscache.Inbox.
func (b *Inbox) Take() (int, []byte, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.free) == 0 {
		return 0, nil, false
	}
	slot := b.free[len(b.free)-1]
	b.free = b.free[:len(b.free)-1]
	b.lent[slot] = true
	return slot, b.slots[slot], true
}

// Free implements fscache.Inbox. Only the beginning is cleared.
func (b *Inbox) Free(slot int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.lent[slot] {
		panic("a slot that is not lent is freed")
	}
	clear(b.slots[slot][:8])
	b.lent[slot] = false
	b.free = append(b.free, slot)
}

// Slots implements fscache.Inbox.
func (b *Inbox) Slots() int { return len(b.slots) }

// Lent says how many slots are.
func (b *Inbox) Lent() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.slots) - len(b.free)
}

// Messages returns copies of the slots that have a message.
func (b *Inbox) Messages() [][]byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	var messages [][]byte
	for _, p := range b.slots {
		messages = append(messages, MessagesIn(p, len(p))...)
	}
	return messages
}

// MessagesIn returns copies of the messages in the memory of an inbox.
func MessagesIn(mem []byte, size int) [][]byte {
	var messages [][]byte
	for p := range slices.Chunk(mem, size) {
		if !slices.Equal(p[:8], make([]byte, 8)) {
			messages = append(messages, slices.Clone(p))
		}
	}
	return messages
}

// A Store is an fscache.Holder that keeps what it is given itself.
type Store struct {
	mu   sync.Mutex
	held map[opening]fscache.Held
}

// An opening is what one descriptor is for: an object that is closed and opened again may be held twice for a moment.
type opening struct {
	object fscache.Key
	handle uint32
}

func openingOf(h fscache.Held) opening { return opening{h.Object.Key, h.Handle} }

// NewStore makes one that holds nothing.
func NewStore() *Store { return &Store{held: make(map[opening]fscache.Held)} }

// Hold implements fscache.Holder.
func (s *Store) Hold(h fscache.Held) error {
	f, err := Dup(h.File)
	if err != nil {
		return err
	}
	s.Drop(h)
	s.mu.Lock()
	defer s.mu.Unlock()
	h.File = f
	s.held[openingOf(h)] = h
	return nil
}

// Drop implements fscache.Holder.
func (s *Store) Drop(h fscache.Held) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old, ok := s.held[openingOf(h)]; ok {
		_ = old.File.Close()
		delete(s.held, openingOf(h))
	}
}

// Held returns what is held, with descriptors for a successor.
func (s *Store) Held() ([]fscache.Held, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []fscache.Held
	for _, h := range s.held {
		f, err := Dup(h.File)
		if err != nil {
			return nil, err
		}
		h.File = f
		all = append(all, h)
	}
	return all, nil
}

// Close lets go of everything.
func (s *Store) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, h := range s.held {
		_ = h.File.Close()
		delete(s.held, k)
	}
}
