package power

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// The format of the log and the flags of its entries (drivers/md/dm-log-writes.c): a sector with the head, then for each entry a sector that
// describes it, and its data.
const (
	logMagic   = 0x6a736677736872
	logVersion = 1

	flagFlush   = 1 << 0
	flagFUA     = 1 << 1 // the write itself is on the disk when it ends
	flagDiscard = 1 << 2
	flagMark    = 1 << 3
)

// An entry is a write, a flush, or a mark.
type entry struct {
	off, size int64 // on the disk, in bytes
	data      int64 // offset in the log
	flags     uint64
	mark      string
}

// A writeLog is what device-mapper's log-writes target logged. Writes are in it in the order of the flushes that made them durable: those that were
// not flushed yet come behind all that were.
type writeLog struct {
	f       *os.File
	entries []entry
}

func readLog(path string) (*writeLog, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	l := &writeLog{f: f}
	if err := l.read(); err != nil {
		return nil, errors.Join(fmt.Errorf("read the log of writes: %w", err), f.Close())
	}
	return l, nil
}

func (l *writeLog) read() error {
	head := make([]byte, 28)
	if _, err := l.f.ReadAt(head, 0); err != nil {
		return err
	}
	le := binary.LittleEndian
	if le.Uint64(head) != logMagic || le.Uint64(head[8:]) != logVersion {
		return fmt.Errorf("magic %#x, version %d", le.Uint64(head), le.Uint64(head[8:]))
	}
	count, sector := le.Uint64(head[16:]), int64(le.Uint32(head[24:]))
	buf := make([]byte, sector)
	for at := sector; uint64(len(l.entries)) < count; {
		if _, err := l.f.ReadAt(buf, at); err != nil {
			return fmt.Errorf("entry %d of %d: %w", len(l.entries), count, err)
		}
		e := entry{off: int64(le.Uint64(buf)) * sector, size: int64(le.Uint64(buf[8:])) * sector, flags: le.Uint64(buf[16:]), data: at + sector}
		if e.flags&flagMark != 0 {
			e.mark = string(buf[32 : 32+le.Uint64(buf[24:])])
		}
		at += sector
		if e.flags&flagDiscard == 0 {
			at += e.size
		}
		l.entries = append(l.entries, e)
	}
	return nil
}

// cut makes of base, a copy of the disk as it was before the log, at path what a power failure leaves at the n-th entry. With lose, it comes while
// those writes lie in the disk's cache that the next flush is for, of which any may have been written. It returns what had been marked.
func (l *writeLog) cut(base, path string, n int, lose *rand.Rand) (marks []string, err error) {
	if _, err := run("cp", "--sparse=always", base, path); err != nil {
		return nil, err
	}
	out, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	first, last := n, n
	if lose != nil {
		first, last = l.cached(n)
	}
	for i, e := range l.entries[:last] {
		switch {
		case e.flags&flagMark != 0:
			marks = append(marks, e.mark)
		case e.flags&flagDiscard != 0 || i >= first && lose.IntN(2) == 0:
		default:
			if _, err := io.Copy(io.NewOffsetWriter(out, e.off), io.NewSectionReader(l.f, e.data, e.size)); err != nil {
				return nil, fmt.Errorf("write %d bytes at %d again: %w", e.size, e.off, err)
			}
		}
	}
	return marks, nil
}

// cached returns the writes that one flush made durable: those around entry n, or the next ones.
func (l *writeLog) cached(n int) (first, last int) {
	for last = n; last < len(l.entries) && l.entries[last].flags&flagFlush == 0; last++ {
	}
	for first = last; first > 0 && l.entries[first-1].flags&(flagFlush|flagFUA|flagMark) == 0; first-- {
	}
	if n < first { // marks, or writes that bypassed the cache, lie between
		return n, n
	}
	return first, last
}

func TestLogIsReplayedUpToTheCut(t *testing.T) {
	dir := t.TempDir()
	block := func(b byte) []byte { return bytes.Repeat([]byte{b}, 512) }
	var log bytes.Buffer
	put := func(sector, sectors, flags uint64, mark string, data []byte) {
		var head []byte
		for _, v := range []uint64{sector, sectors, flags, uint64(len(mark))} {
			head = binary.LittleEndian.AppendUint64(head, v)
		}
		log.Write(append(append(head, mark...), make([]byte, 512-len(head)-len(mark))...))
		log.Write(data)
	}
	var head []byte
	for _, v := range []uint64{logMagic, logVersion, 7} {
		head = binary.LittleEndian.AppendUint64(head, v)
	}
	log.Write(append(binary.LittleEndian.AppendUint32(head, 512), make([]byte, 512-28)...))
	put(0, 1, 0, "", block('a'))
	put(0, 0, flagFlush, "", nil)
	put(0, 0, flagMark, "flushed", nil)
	put(2, 4, flagDiscard, "", nil)
	put(1, 2, 0, "", append(block('b'), block('c')...))
	put(3, 1, 0, "", block('d'))
	put(0, 1, flagFlush|flagFUA, "", block('e'))
	path, base, out := filepath.Join(dir, "log"), filepath.Join(dir, "base"), filepath.Join(dir, "out")
	if err := errors.Join(os.WriteFile(path, log.Bytes(), 0o600), os.WriteFile(base, bytes.Repeat([]byte{'.'}, 2048), 0o600)); err != nil {
		t.Fatal(err)
	}
	l, err := readLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.f.Close()
	for n, want := range []string{"....", "a...", "a...", "a...", "a...", "abc.", "abcd", "ebcd"} {
		marks, err := l.cut(base, out, n, nil)
		got, readErr := os.ReadFile(out)
		if err != nil || readErr != nil || len(marks) != min(n/3, 1) {
			t.Fatalf("cut %d: %v, %v, marks %q", n, err, readErr, marks)
		}
		if short := string([]byte{got[0], got[512], got[1024], got[1536]}); short != want || len(got) != 2048 {
			t.Errorf("cut %d: %q, want %q", n, short, want)
		}
	}
	seen := map[string]bool{}
	for lose := rand.New(rand.NewPCG(1, 1)); len(seen) < 4; {
		if _, err := l.cut(base, out, 4, lose); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		if short := string([]byte{got[0], got[512], got[1024], got[1536]}); slices.Contains([]string{"a...", "abc.", "a..d", "abcd"}, short) {
			seen[short] = true
		} else {
			t.Fatalf("with two writes in the disk's cache: %q", short)
		}
	}
}
