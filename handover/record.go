package handover

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
)

// A NamedFile is a descriptor and what it is called.
type NamedFile struct {
	Name string
	File *os.File
}

// A Record is a piece of what one process hands to the next. What is sent stays the sender's; what is received is the receiver's,
// files included.
type Record struct {
	Kind  string
	Body  []byte
	Files []NamedFile // with names unique within the record
}

// Close closes the record's files.
func (r Record) Close() {
	for _, f := range r.Files {
		_ = f.File.Close() // see closeFiles
	}
}

// Bounds of what one phase may bring.
const (
	maxRecords     = 1 << 17
	maxPhaseFiles  = 1 << 16
	maxPhaseBodies = 64 << 20
)

// A piece is what one record frame says: a record, or part of one.
type piece struct {
	index uint32 // of the record in its phase
	more  bool   // pieces of the same record follow
	kind  string
	names []string // of the descriptors that come with it
	chunk []byte
}

const pieceMore = 1

func (p piece) append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, p.index)
	flags := byte(0)
	if p.more {
		flags |= pieceMore
	}
	b = append(b, flags)
	b = appendText(b, p.kind)
	b = appendList(b, p.names)
	return append(b, p.chunk...)
}

// decodePiece parses a record frame's body. The chunk is part of it.
func decodePiece(body []byte) (piece, error) {
	r := reader{b: body}
	p := piece{index: r.u32()}
	flags := r.u8()
	p.kind = r.text()
	p.names = r.list()
	p.chunk = r.b
	switch {
	case r.bad:
		return piece{}, fmt.Errorf("%w: record ends early", errFrameBody)
	case flags&^pieceMore != 0:
		return piece{}, fmt.Errorf("%w: record with flags %#x", errFrameBody, flags)
	case len(p.names) > maxFrameFiles:
		return piece{}, fmt.Errorf("%w: record frame with %d names", errFrameBody, len(p.names))
	}
	p.more = flags&pieceMore != 0
	if err := checkKind(p.kind); err != nil {
		return piece{}, fmt.Errorf("%w: %w", errFrameBody, err)
	}
	for _, n := range p.names {
		if err := checkName(n); err != nil {
			return piece{}, fmt.Errorf("%w: %w", errFrameBody, err)
		}
	}
	return p, nil
}

// check says whether a record can be sent.
func (r Record) check() error {
	if err := checkKind(r.Kind); err != nil {
		return err
	}
	seen := make(map[string]bool, len(r.Files))
	for _, f := range r.Files {
		if err := checkName(f.Name); err != nil {
			return fmt.Errorf("record %q: %w", r.Kind, err)
		}
		if f.File == nil || seen[f.Name] {
			return fmt.Errorf("record %q: descriptor %q is missing or there twice", r.Kind, f.Name)
		}
		seen[f.Name] = true
	}
	return nil
}

// pieces calls f with the pieces of r, which is the index-th of its phase, and the files that belong to each.
func (r Record) pieces(index uint32, f func(piece, []NamedFile) error) error {
	files, body := r.Files, r.Body
	for first := true; first || len(files) > 0 || len(body) > 0; first = false {
		n := min(len(files), maxFrameFiles)
		p := piece{index: index, kind: r.Kind}
		for _, nf := range files[:n] {
			p.names = append(p.names, nf.Name)
		}
		room := maxBody - len(p.append(nil)) // positive: 250 names of 255 bytes, and a kind of 64, fit
		p.chunk = body[:min(len(body), room)]
		p.more = n < len(files) || len(p.chunk) < len(body)
		if err := f(p, files[:n]); err != nil {
			return err
		}
		files, body = files[n:], body[len(p.chunk):]
	}
	return nil
}

// A collector puts the records of one phase together again, and owns their files until take or pop.
type collector struct {
	understood []string
	popped     uint32   // how many were taken out one by one
	records    []Record // the last is not complete while open is set
	open       bool
	files      int
	bytes      int
}

var errOutOfTurn = errors.New("out of turn")

// add takes a piece, and the files that came with it whatever it returns.
func (c *collector) add(p piece, files []*os.File) (err error) {
	defer func() {
		if err != nil {
			closeFiles(files)
		}
	}()
	if err := c.check(p, len(files)); err != nil {
		return err
	}
	if !c.open {
		c.records = append(c.records, Record{Kind: p.kind})
	}
	r := &c.records[len(c.records)-1]
	c.open = true
	if err := uniqueNames(r.Files, p.names); err != nil {
		return fmt.Errorf("record %d (%s): %w", p.index, p.kind, err)
	}
	for i, f := range files {
		r.Files = append(r.Files, NamedFile{p.names[i], f})
	}
	r.Body = append(r.Body, p.chunk...)
	c.open, c.files, c.bytes = p.more, c.files+len(files), c.bytes+len(p.chunk)
	return nil
}

// check says whether the piece, with that many files, is one that can come now.
func (c *collector) check(p piece, files int) error {
	if files != len(p.names) {
		return fmt.Errorf("record %d (%s) came with %d descriptors, and names %d", p.index, p.kind, files, len(p.names))
	}
	if !slices.Contains(c.understood, p.kind) {
		return fmt.Errorf("record %d is of kind %q, which this release does not understand", p.index, p.kind)
	}
	due := int64(c.popped) + int64(len(c.records))
	if c.open {
		due--
	}
	if int64(p.index) != due || c.open && p.kind != c.records[len(c.records)-1].Kind {
		return fmt.Errorf("record %d (%s) where record %d is due: %w", p.index, p.kind, due, errOutOfTurn)
	}
	if c.bytes+len(p.chunk) > maxPhaseBodies || c.files+files > maxPhaseFiles || !c.open && len(c.records) == maxRecords {
		return fmt.Errorf("more than %d records, %d descriptors or %d bytes", maxRecords, maxPhaseFiles, maxPhaseBodies)
	}
	return nil
}

func uniqueNames(have []NamedFile, more []string) error {
	if len(more) == 0 {
		return nil
	}
	seen := make(map[string]bool, len(have)+len(more))
	for _, f := range have {
		seen[f.Name] = true
	}
	for _, n := range more {
		if seen[n] {
			return fmt.Errorf("two descriptors are named %q", n)
		}
		seen[n] = true
	}
	return nil
}

// take returns the records of the phase that were not popped, and begins the next phase. The sender says that there were n in all.
func (c *collector) take(n uint32) ([]Record, error) {
	if came := int64(c.popped) + int64(len(c.records)); c.open || int64(n) != came {
		return nil, fmt.Errorf("the phase ends after %d records, of which %d came (the last unfinished: %v): %w", n, came, c.open, errOutOfTurn)
	}
	records := c.records
	*c = collector{understood: c.understood}
	return records, nil
}

// pop returns the record that has just been completed, if one was: in a phase where each is worked off as it comes.
func (c *collector) pop() (Record, bool) {
	if c.open {
		return Record{}, false
	}
	r := c.records[0]
	c.records, c.files, c.bytes = nil, 0, 0
	c.popped++
	return r, true
}

func (c *collector) close() {
	for _, r := range c.records {
		r.Close()
	}
	c.records = nil
}

// closeFiles closes files that were received and are not wanted: nobody can be told if that fails.
func closeFiles(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}
