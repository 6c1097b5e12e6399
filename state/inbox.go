package state

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"holdfast/state/crash"
)

// An Inbox lends memory of a file on tmpfs, for the kernel's read(2) to write requests into: there is no instruction at which a
// request exists only in memory that dies with the process (I2). The file has the header's page and then the slots, each a line for
// its state and the message's area; see inboxHeader. All methods may be called from any goroutine, Close after all others.
type Inbox struct {
	file  *os.File // holds a flock for life: by it a reader tells a dead process's file
	data  []byte
	shape inboxShape

	// The free slots are a stack: what was used last is lent first, so that only as many pages cost memory as were ever in use
	// at a time. head is a count of changes, which keeps a slow compare-and-swap from taking an old head for the new one, and the
	// number + 1 of the first free slot in the lower half; next is the number + 1 of the one below each.
	head atomic.Uint64
	next []atomic.Uint32
	// backed is whether a slot's pages exist. It is the slot's owner's: of the process while it is in the stack, then of who took it.
	backed []bool

	closing sync.Once
}

// States of a slot.
const (
	slotFree uint32 = 0
	slotLent uint32 = 1
)

// backedAtStart is how many slots an inbox always has, however full the file system gets.
const backedAtStart = 16

// NewInbox makes a new inbox file in dir, for messages of up to size bytes, and is the process's claim to be alive.
func NewInbox(dir string, h InboxHeader, slots, size int) (b *Inbox, err error) {
	header, shape, err := h.encode(slots, size)
	if err != nil {
		return nil, fmt.Errorf("state: make inbox: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state: make inbox: %w", err)
	}
	// It gets its name when it is whole and locked: a file with a name is a dead process's or can be read.
	f, err := os.CreateTemp(dir, fmt.Sprintf("%s%d-*", unfinishedPrefix, h.PID))
	if err != nil {
		return nil, fmt.Errorf("state: make inbox: %w", err)
	}
	b = &Inbox{file: f, shape: shape, next: make([]atomic.Uint32, slots), backed: make([]bool, slots)}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
			b.unmap()
			_ = f.Close()
		}
	}()
	if err := b.fill(header); err != nil {
		return nil, fmt.Errorf("state: make inbox %s: %w: is it on tmpfs, with room?", f.Name(), err)
	}
	if err := os.Rename(f.Name(), b.path()); err != nil {
		return nil, fmt.Errorf("state: make inbox: %w", err)
	}
	return b, nil
}

func (b *Inbox) path() string {
	dir, name := filepath.Split(b.file.Name())
	return filepath.Join(dir, strings.TrimPrefix(name, unfinishedPrefix))
}

// fill gives the file its lock, size, header and mapping, and lends nothing yet.
func (b *Inbox) fill(header []byte) (err error) {
	fd := int(b.file.Fd())
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	if err := b.file.Truncate(b.shape.fileSize()); err != nil {
		return err
	}
	if _, err := b.file.WriteAt(header, 0); err != nil {
		return err
	}
	if b.data, err = unix.Mmap(fd, 0, int(b.shape.fileSize()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("map: %w", err)
	}
	// Pages of tmpfs are swapped. Then read(2) into a slot waits for the swap device, and fails if that does: the kernel has no
	// other way to hand a request over and refuses it (copy_event_to_user, fs/notify/fanotify/fanotify_user.c, 6.18), an error for the
	// reader. So they are locked as they come. Without the right to lock memory it works too, less surely.
	_, _, _ = unix.Syscall(unix.SYS_MLOCK2, uintptr(unsafe.Pointer(&b.data[0])), uintptr(len(b.data)), unix.MLOCK_ONFAULT)
	for slot := len(b.next) - 1; slot >= 0; slot-- {
		if slot < backedAtStart {
			if err := b.back(slot); err != nil {
				return err
			}
		}
		b.push(slot)
	}
	return nil
}

// back makes a slot's pages exist, before anything is stored to them: a store to a page that tmpfs has no room for is a SIGBUS, and in
// read(2) it is a request that the kernel refuses. Storing zeros to all of it then puts the pages into this process's page table.
func (b *Inbox) back(slot int) error {
	if b.backed[slot] {
		return nil
	}
	start := b.shape.offset(slot)
	if err := unix.Fallocate(int(b.file.Fd()), 0, int64(start), int64(b.shape.stride)); err != nil {
		return fmt.Errorf("allocate slot %d: %w", slot, err)
	}
	clear(b.data[start : start+b.shape.stride])
	b.backed[slot] = true
	return nil
}

// Slots is how many there are.
func (b *Inbox) Slots() int { return len(b.next) }

// Take lends a slot, zero in its first 64 bytes. ok is false while all are lent, or the file system has no room for more.
func (b *Inbox) Take() (slot int, p []byte, ok bool) {
	slot, ok = b.pop()
	if !ok {
		return 0, nil, false
	}
	if err := b.back(slot); err != nil {
		// Those that have pages are above it in the stack, so all of them are lent, and one of them will be free again.
		b.push(slot)
		return 0, nil, false
	}
	at := b.shape.offset(slot) + stateLine
	// ORDER: zero, then lent. A slot that is lent and not zero has a message; the last one's must not look like it.
	clear(b.data[at : at+zeroed])
	crash.Point("state.inbox-take.before-lent")
	b.state(slot).Store(slotLent)
	crash.Point("state.inbox-take.after-lent")
	return slot, b.data[at : at+b.shape.size : at+b.shape.size], true
}

// Free gives a slot back. ORDER: after the kernel has the answer; a successor would else not know of the request.
// Freeing what is free changes nothing.
func (b *Inbox) Free(slot int) {
	crash.Point("state.inbox-free.before-free")
	if b.state(slot).CompareAndSwap(slotLent, slotFree) {
		crash.Point("state.inbox-free.after-free")
		b.push(slot)
	}
}

// state is the slot's state in the mapping, which is 64-byte aligned.
func (b *Inbox) state(slot int) *atomic.Uint32 {
	return (*atomic.Uint32)(unsafe.Pointer(&b.data[b.shape.offset(slot)]))
}

func (b *Inbox) push(slot int) {
	for {
		h := b.head.Load()
		b.next[slot].Store(uint32(h))
		if b.head.CompareAndSwap(h, (h>>32+1)<<32|uint64(slot+1)) {
			return
		}
	}
}

func (b *Inbox) pop() (slot int, ok bool) {
	for {
		h := b.head.Load()
		n := uint32(h)
		if n == 0 {
			return 0, false
		}
		if b.head.CompareAndSwap(h, (h>>32+1)<<32|uint64(b.next[n-1].Load())) {
			return int(n - 1), true
		}
	}
}

// Close removes the file if no slot is lent. Otherwise it leaves it to a successor, and the mapping to who has the slots.
// Take lends nothing any more. Idempotent.
func (b *Inbox) Close() (err error) {
	b.closing.Do(func() {
		free := 0
		for _, ok := b.pop(); ok; _, ok = b.pop() {
			free++
		}
		if free == b.Slots() {
			b.unmap()
			err = os.Remove(b.path())
		}
		// The lock is the open file's, which a mapping keeps open: it is given up first.
		if err2 := unix.Flock(int(b.file.Fd()), unix.LOCK_UN); err == nil {
			err = err2
		}
		if err2 := b.file.Close(); err == nil {
			err = err2
		}
		if err != nil {
			err = fmt.Errorf("state: close inbox: %w", err)
		}
	})
	return err
}

func (b *Inbox) unmap() {
	if b.data != nil {
		_ = unix.Munmap(b.data)
		b.data = nil
	}
}
