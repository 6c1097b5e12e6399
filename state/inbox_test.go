package state

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var testHeader = InboxHeader{Engine: "cachefiles", Boot: "boot-a", Release: "1.0", PID: 4711}

func newInbox(t testing.TB, dir string, slots, size int) *Inbox {
	t.Helper()
	b, err := NewInbox(dir, testHeader, slots, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// take takes a slot and writes a message into it.
func take(t testing.TB, b *Inbox, message string) int {
	t.Helper()
	slot, p, ok := b.Take()
	if !ok {
		t.Fatal("no slot")
	}
	copy(p, message)
	return slot
}

// read reads the inboxes of dir with nothing wrong, and returns the beginnings of the messages, sorted.
func read(t testing.TB, dir string) (messages []string) {
	t.Helper()
	boxes, damaged, err := ReadInboxes(dir, "boot-a", "cachefiles")
	if err != nil || len(damaged) != 0 {
		t.Fatalf("read inboxes: %v, damaged %v", err, damaged)
	}
	for _, b := range boxes {
		for _, m := range b.Messages {
			messages = append(messages, string(bytes.TrimRight(m, "\x00")))
		}
	}
	slices.Sort(messages)
	return messages
}

func TestInboxOfALiveProcessIsNotRead(t *testing.T) {
	dir := t.TempDir()
	b := newInbox(t, dir, 4, 128)
	take(t, b, "a")
	if got := read(t, dir); got != nil {
		t.Errorf("read %q", got)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if got := read(t, dir); !slices.Equal(got, []string{"a"}) {
		t.Errorf("after it was closed with a slot lent: %q", got)
	}
}

func TestClosedInboxIsRemovedUnlessASlotIsLent(t *testing.T) {
	dir := t.TempDir()
	b := newInbox(t, dir, 4, 128)
	b.Free(take(t, b, "a"))
	if err := errors.Join(b.Close(), b.Close()); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

func TestOnlyLentSlotsWithAMessageAreRead(t *testing.T) {
	dir := t.TempDir()
	b := newInbox(t, dir, 4, 128)
	take(t, b, "kept")
	b.Free(take(t, b, "answered"))
	take(t, b, "") // where the answered one was
	b.Free(take(t, b, "answered too"))
	b.Close()
	boxes, damaged, err := ReadInboxes(dir, "boot-a", "cachefiles")
	if err != nil || len(damaged) != 0 || len(boxes) != 1 {
		t.Fatalf("read: %v, %v, %v", boxes, damaged, err)
	}
	want := append([]byte("kept"), make([]byte, 124)...)
	if m := boxes[0].Messages; len(m) != 1 || !bytes.Equal(m[0], want) || boxes[0].Header != testHeader {
		t.Errorf("read %q of %+v", m, boxes[0].Header)
	}
	if err := boxes[0].Remove(); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

func TestSlotsAreLentLastUsedFirst(t *testing.T) {
	b := newInbox(t, t.TempDir(), 8, 100)
	first := take(t, b, "")
	second := take(t, b, "")
	b.Free(second)
	b.Free(first)
	if got := take(t, b, ""); got != first {
		t.Errorf("slot %d, want %d", got, first)
	}
	b.Free(second) // again
	for range 7 {
		take(t, b, "")
	}
	if _, _, ok := b.Take(); ok {
		t.Error("a slot was lent twice")
	}
	if b.Slots() != 8 {
		t.Errorf("%d slots", b.Slots())
	}
}

func TestOnlyUsedSlotsCostMemory(t *testing.T) {
	b := newInbox(t, tmpfs(t), 1<<14, 1024)
	for range 10_000 {
		b.Free(take(t, b, "x"))
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(b.file.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if n := st.Blocks * 512; n > 64<<10 {
		t.Errorf("%d bytes", n)
	}
}

func TestSlotIsLentToOneAtATime(t *testing.T) {
	b := newInbox(t, t.TempDir(), 5, 128)
	owners := make([]atomic.Int32, 5)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 5000 {
				slot, p, ok := b.Take()
				if !ok {
					continue
				}
				if owners[slot].Add(1) != 1 {
					t.Errorf("slot %d is lent to two", slot)
				}
				if p[0] != 0 || p[63] != 0 || len(p) != 128 || cap(p) != 128 {
					t.Errorf("slot %d: %d bytes %q", slot, cap(p), p)
				}
				p[0], p[63] = byte(g+1), byte(i)
				owners[slot].Add(-1)
				b.Free(slot)
			}
		})
	}
	wg.Wait()
	for range 5 {
		take(t, b, "")
	}
}

// TestHeadOfTheFreeListIsNeverTheSameTwice is what makes it safe to have been looked at long ago.
func TestHeadOfTheFreeListIsNeverTheSameTwice(t *testing.T) {
	b := newInbox(t, t.TempDir(), 3, 64)
	seen := map[uint64]bool{b.head.Load(): true}
	see := func() {
		if h := b.head.Load(); seen[h] {
			t.Fatalf("head %x is there again", h)
		}
		seen[b.head.Load()] = true
	}
	for range 100 {
		first := take(t, b, "")
		see()
		second := take(t, b, "")
		see()
		b.Free(first)
		see()
		b.Free(second)
		see()
	}
}

func TestTakingAndFreeingAllocatesNothing(t *testing.T) {
	b := newInbox(t, t.TempDir(), 5, 1024)
	if n := testing.AllocsPerRun(100, func() {
		slot, _, _ := b.Take()
		b.Free(slot)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestFullFileSystemLendsNoMoreAndDoesNotFault(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small tmpfs needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("inbox", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	b := newInbox(t, dir, 4096, 1024)
	var slots []int
	for {
		slot, p, ok := b.Take()
		if !ok {
			break
		}
		for i := range p {
			p[i] = 1
		}
		slots = append(slots, slot)
	}
	if n := len(slots); n < backedAtStart || n > 256 {
		t.Fatalf("%d slots of 1 KiB were lent on 256 KiB", n)
	}
	b.Free(slots[3])
	if slot, _, ok := b.Take(); !ok || slot != slots[3] {
		t.Errorf("after one was freed: slot %d, %v, want %d", slot, ok, slots[3])
	}
}

func TestInboxesOfOthersAreLeftOrRemoved(t *testing.T) {
	dir := t.TempDir()
	left := func(h InboxHeader) string {
		b, err := NewInbox(dir, h, 2, 64)
		if err != nil {
			t.Fatal(err)
		}
		take(t, b, "x")
		b.Close()
		return b.path()
	}
	mine := left(testHeader)
	otherEngine := left(InboxHeader{Engine: "fanotify", Boot: "boot-a"})
	otherBoot := left(InboxHeader{Engine: "cachefiles", Boot: "boot-b"})
	page, err := os.ReadFile(otherBoot)
	if err != nil {
		t.Fatal(err)
	}
	binary.NativeEndian.PutUint32(page[8:], inboxVersion+1)
	resum(page)
	newerOfOtherBoot := filepath.Join(dir, "1-newer")
	unfinished := filepath.Join(dir, unfinishedPrefix+"1-x")
	aside := mine + asideMark + "x"
	if err := errors.Join(os.WriteFile(newerOfOtherBoot, page, 0o600), os.WriteFile(unfinished, []byte("x"), 0o600), os.WriteFile(aside, nil, 0o600),
		os.Mkdir(filepath.Join(dir, "directory"), 0o700), unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if got := read(t, dir); !slices.Equal(got, []string{"x"}) {
		t.Errorf("read %q", got)
	}
	for path, want := range map[string]bool{mine: true, otherEngine: true, aside: true, otherBoot: false, newerOfOtherBoot: false, unfinished: false} {
		if _, err := os.Stat(path); (err == nil) != want {
			t.Errorf("%s: %v, want it there: %v", path, err, want)
		}
	}
}

// resum gives a header its checksum.
func resum(page []byte) { binary.NativeEndian.PutUint32(page[12:], inboxSum(page[:inboxPage])) }

// deadInbox is a file with two messages in four slots.
func deadInbox(t testing.TB) []byte {
	t.Helper()
	b := newInbox(t, t.TempDir(), 4, 100)
	take(t, b, "a")
	b.Free(take(t, b, "b"))
	take(t, b, "c")
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	p, err := os.ReadFile(b.path())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestNewerInboxIsRefusedAndNothingIsChanged(t *testing.T) {
	dir := t.TempDir()
	sound := deadInbox(t)
	newer := bytes.Clone(sound)
	binary.NativeEndian.PutUint32(newer[8:], inboxVersion+1)
	copy(newer[80:], "9.1\x00")
	resum(newer)
	files := map[string][]byte{"1": []byte("damaged"), unfinishedPrefix + "2": nil, "3": newer, "4": sound}
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, _, err := ReadInboxes(dir, "boot-a", "cachefiles")
	if !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), "9.1") {
		t.Errorf("read: %v, want ErrNewer and the release", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != len(files) {
		t.Errorf("left %v, %v", entries, err)
	}
	for name, want := range files {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s was changed (%v)", name, err)
		}
	}
}

func TestDamagedInboxIsSetAsideUnderAName(t *testing.T) {
	set := func(at int, v uint32) func(b []byte) []byte {
		return func(b []byte) []byte {
			binary.NativeEndian.PutUint32(b[at:], v)
			resum(b)
			return b
		}
	}
	for name, damage := range map[string]func(b []byte) []byte{
		"empty": func([]byte) []byte { return nil }, "text": func([]byte) []byte { return []byte("this is no inbox") },
		"zeros": func(b []byte) []byte { return make([]byte, len(b)) }, "checksum": func(b []byte) []byte { b[12]++; return b },
		"magic": func(b []byte) []byte { b[0]++; resum(b); return b }, "short": func(b []byte) []byte { return b[:len(b)-1] },
		"long": func(b []byte) []byte { return append(b, 0) }, "half a page": func(b []byte) []byte { return b[:2048] },
		"layout 0": set(8, 0), "no slots": set(212, 0), "2^32-1 slots": set(212, 1<<32-1), "more slots": set(212, 5),
		"no message": set(216, 0), "large messages": set(216, 1<<31), "larger than all": set(212, maxInboxSlots),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			b := damage(deadInbox(t))
			path := filepath.Join(dir, "1-x")
			if err := errors.Join(os.WriteFile(path, b, 0o600), os.WriteFile(filepath.Join(dir, "2-x"), deadInbox(t), 0o600)); err != nil {
				t.Fatal(err)
			}
			boxes, damaged, err := ReadInboxes(dir, "boot-a", "cachefiles")
			if err != nil || len(boxes) != 1 || len(boxes[0].Messages) != 2 {
				t.Errorf("read %v, %v, want the sound one", boxes, err)
			}
			aside, _ := filepath.Glob(path + asideMark + "*")
			if len(aside) != 1 || len(damaged) != 1 || !strings.Contains(damaged[0], aside[0]) {
				t.Fatalf("set aside as %v, reported %v", aside, damaged)
			}
			if kept, err := os.ReadFile(aside[0]); err != nil || !bytes.Equal(kept, b) {
				t.Errorf("what was set aside is not the damaged file (%v)", err)
			}
			if got := read(t, dir); !slices.Equal(got, []string{"a", "c"}) {
				t.Errorf("read again: %q", got)
			}
		})
	}
}

func TestSlotInNoKnownStateIsReportedAndCountsAsLent(t *testing.T) {
	dir := t.TempDir()
	b := deadInbox(t)
	binary.NativeEndian.PutUint32(b[inboxPage:], 3)
	if err := os.WriteFile(filepath.Join(dir, "1-x"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	boxes, damaged, err := ReadInboxes(dir, "boot-a", "cachefiles")
	if err != nil || len(damaged) != 1 || len(boxes) != 1 || len(boxes[0].Messages) != 2 {
		t.Errorf("read %v, damaged %v, %v", boxes, damaged, err)
	}
}

func TestEveryFlippedBitOfAnInboxIsAnErrorOrItsMessages(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 1))
	sound := deadInbox(t)
	dir := t.TempDir()
	for i := range 2000 {
		at := rng.IntN(len(sound))
		if i%2 == 0 {
			at = rng.IntN(220)
		}
		b := bytes.Clone(sound)
		b[at] ^= 1 << rng.IntN(8)
		readHostile(t, dir, b, fmt.Sprintf("seed %d, byte %d", seed, at))
	}
	for n := range len(sound) {
		if n%61 == 0 {
			readHostile(t, dir, sound[:n], fmt.Sprintf("cut to %d bytes", n))
		}
	}
}

// readHostile reads one file: a value or a report, of bounded size, soon.
func readHostile(t *testing.T, dir string, b []byte, what string) {
	t.Helper()
	path := filepath.Join(dir, "1-x")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	boxes, damaged, err := ReadInboxes(dir, "boot-a", "cachefiles")
	if d := time.Since(start); d > time.Second {
		t.Errorf("%s: took %v", what, d)
	}
	if err != nil && !errors.Is(err, ErrNewer) {
		t.Errorf("%s: %v", what, err)
	}
	size := 0
	for _, box := range boxes {
		for _, m := range box.Messages {
			size += len(m)
		}
	}
	if size > len(b) {
		t.Errorf("%s: messages of %d bytes in a file of %d", what, size, len(b))
	}
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		_ = os.Remove(filepath.Join(dir, e.Name()))
	}
	if len(entries) == 1 && strings.Contains(entries[0].Name(), asideMark) != (len(damaged) > 0 && len(boxes) == 0) {
		t.Errorf("%s: reported %v, and there is %s", what, damaged, entries[0].Name())
	}
}

func TestInboxThatCannotBeMadeSaysWhyAndLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	for name, make := range map[string]func() (*Inbox, error){
		"no slots":      func() (*Inbox, error) { return NewInbox(dir, testHeader, 0, 64) },
		"no size":       func() (*Inbox, error) { return NewInbox(dir, testHeader, 1, 0) },
		"too large":     func() (*Inbox, error) { return NewInbox(dir, testHeader, maxInboxSlots, maxInboxMessage) },
		"long name":     func() (*Inbox, error) { return NewInbox(dir, InboxHeader{Engine: strings.Repeat("x", 65)}, 1, 64) },
		"no allocation": func() (*Inbox, error) { return NewInbox("/proc/self", testHeader, 1, 64) },
	} {
		if b, err := make(); err == nil {
			b.Close()
			t.Errorf("%s: made", name)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
	if boxes, damaged, err := ReadInboxes(filepath.Join(dir, "none"), "b", "e"); err != nil || boxes != nil || damaged != nil {
		t.Errorf("no directory: %v, %v, %v", boxes, damaged, err)
	}
}

// FuzzReadInboxes reads a file whose header is patched, with or without its checksum made to fit.
func FuzzReadInboxes(f *testing.F) {
	sound := deadInbox(f)
	f.Add(uint16(8), []byte{2}, true)
	f.Add(uint16(212), []byte{0, 0, 1}, true)
	f.Add(uint16(inboxPage), []byte{7}, false)
	f.Fuzz(func(t *testing.T, at uint16, p []byte, sum bool) {
		b := bytes.Clone(sound)
		copy(b[int(at)%len(b):], p)
		if sum {
			resum(b)
		}
		readHostile(t, t.TempDir(), b, "fuzz")
	})
}

func BenchmarkInboxTakeFree(b *testing.B) {
	box := newInbox(b, tmpfs(b), 1024, 1024)
	b.Run("one", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			slot, _, _ := box.Take()
			box.Free(slot)
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				slot, _, _ := box.Take()
				box.Free(slot)
			}
		})
	})
}
