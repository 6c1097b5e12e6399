package fanotify

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/state/crash"
)

// maxCandidates is of how many objects an event is served whose file nobody wrote down. A process dies so only between its read(2) and
// the next few instructions, and has one event there at most; with more incomplete objects than this its reader is denied.
const maxCandidates = 1024

// An orphan is the number under which another process read an event, and as far as we know did not answer it.
type orphan struct {
	number int32
	claims []claim

	// placed: a placeholder of ours is at the number, so that no event of ours can get it.
	placed bool
	// lent: the process that read it lives, and answers it unless it says otherwise.
	lent bool
	// reads are what Next hands out, one for each thing the event may be; nil until then. done are those that were answered, and
	// answer is the worst of the answers.
	reads  []fscache.Request
	done   map[uint64]bool // by token
	answer fscache.Errno
	// behind is the answer of an event of ours that got the same number all the same: something else had the number when it should
	// have been occupied, and gave it back since. The kernel takes the oldest event of a number first: ours comes second.
	behind *behind
}

type behind struct {
	slot   int
	answer fscache.Errno
}

// A claim says what an orphan may be: a message of the dead process's inbox, or a record of one.
type claim struct {
	message    bool
	identified bool        // by file, if it is a message
	file       inode       // of a message
	key        fscache.Key // of a record
	whole      bool        // the event had no range: all of the file
	off, len   int64
}

// gather makes orphans of what a dead process left, by number.
func (e *Engine) gather(in fscache.Inherited) map[int32]*orphan {
	orphans := make(map[int32]*orphan)
	for _, m := range in.Messages {
		ev, _, err := DecodeEvent(m[:min(len(m), maxEventLen)])
		if err != nil || ev.FD == noFD {
			// Its number is swept like any that nobody knows.
			e.log.Error("the inbox of another process has a message that makes no sense", zap.Error(err), zap.Binary("message", m))
			continue
		}
		c := claim{message: true, whole: !ev.HasRange, off: ev.Off, len: ev.Len}
		c.file, c.identified = identity(m)
		claimNumber(orphans, ev.FD, c)
	}
	for _, p := range in.Pending {
		n, err := number(p)
		if err != nil {
			e.log.Error("ignored the record of a request", zap.Error(err))
			continue
		}
		claimNumber(orphans, n, claim{key: p.Object, off: p.Off, len: p.Len})
	}
	return orphans
}

func claimNumber(orphans map[int32]*orphan, n int32, c claim) {
	if orphans[n] == nil {
		orphans[n] = &orphan{number: n}
	}
	orphans[n].claims = append(orphans[n].claims, c)
}

// number is the event's number in a record; records that no event can have are refused.
func number(p fscache.Pending) (int32, error) {
	if p.Op != fscache.OpRead || p.ID > math.MaxInt32 || p.Off < 0 || p.Len < 0 || p.Len > math.MaxInt64-p.Off {
		return 0, fmt.Errorf("%s of %s at %d+%d as event %d cannot be", p.Op, p.Object, p.Off, p.Len, p.ID)
	}
	return int32(p.ID), nil
}

// candidates lists what an orphan may be, as far as objects are known by now; mu is held. Where nothing is listed and nothing is wrong,
// every byte it may be about is there.
func (e *Engine) candidates(o *orphan) (reads []fscache.Request, wrong string) {
	gone := 0
	for _, c := range o.claims {
		obj := e.objects[c.key]
		switch {
		case c.message && c.identified:
			obj = e.byInode[c.file]
		case c.message:
			all, wrong := e.anybody(c)
			if wrong != "" {
				return nil, wrong
			}
			for _, obj := range all {
				reads = o.candidate(reads, obj, c)
			}
			continue
		}
		switch {
		case obj != nil:
			reads = o.candidate(reads, obj, c)
		case e.marked(c):
			return nil, "of a file that is no cache object"
		default:
			// The object was removed, which takes its mark and finds that nobody has it open, no waiting reader either: the event was answered, and
			// what says otherwise was left by a process that died right after. The number may be another event's by now.
			gone++
		}
	}
	if gone == len(o.claims) {
		return nil, "of a file that is no cache object any more"
	}
	return reads, ""
}

// marked says whether the file a claim is about is under a mark, though no object. mu is held.
func (e *Engine) marked(c claim) bool {
	ino := c.file.ino
	if !c.message {
		if checkName("domain", c.key.Domain) != nil || checkName("object id", c.key.ID) != nil {
			return false
		}
		fi, err := e.root.Lstat(filepath.Join(c.key.Domain, c.key.ID))
		if err != nil {
			return false
		}
		st, ok := fi.Sys().(*syscall.Stat_t)
		if !ok {
			return true
		}
		ino = st.Ino
	}
	return e.watched[ino]
}

// candidate adds a read of an object, once.
func (o *orphan) candidate(reads []fscache.Request, obj *object, c claim) []fscache.Request {
	r := fscache.Request{Op: fscache.OpRead, Object: obj.key, Off: c.off, Len: c.len, ID: uint64(o.number)}
	if c.whole {
		r.Off, r.Len = 0, obj.size
	}
	if slices.Contains(reads, r) {
		return reads
	}
	return append(reads, r)
}

// anybody lists the objects that an event of an unknown file may be of: those under a mark that reach as far. An object without one was
// complete when the mark went, and an object that anybody can read was added. mu is held.
func (e *Engine) anybody(c claim) ([]*object, string) {
	var all []*object
	for _, obj := range e.objects {
		if obj.marked.Load() && obj.size > c.off {
			all = append(all, obj)
		}
	}
	if len(e.objects) == 0 || e.strangers() {
		return nil, "of a file nobody wrote down, and it may be of no object"
	}
	if len(all) > maxCandidates {
		return nil, fmt.Sprintf("of a file nobody wrote down, and %d are possible", len(all))
	}
	slices.SortFunc(all, func(a, b *object) int { return strings.Compare(a.key.String(), b.key.String()) })
	return all, ""
}

// strangers says whether files are under marks of another process's that are no objects; mu is held.
func (e *Engine) strangers() bool {
	known := make(map[uint64]bool, len(e.byInode))
	for id := range e.byInode {
		known[id.ino] = true
	}
	for ino := range e.watched {
		if !known[ino] {
			return true
		}
	}
	return false
}

// settle queues what orphans may be, for Next; the caller holds reading. Objects that are not known by now never will be: what nobody can identify
// is denied.
func (e *Engine) settle() {
	var over []*orphan
	why := make(map[*orphan]string)
	e.mu.Lock()
	e.unsettled = false
	for _, n := range slices.Sorted(maps.Keys(e.orphans)) {
		o := e.orphans[n]
		if o.lent || o.done != nil {
			continue
		}
		reads, wrong := e.candidates(o)
		if wrong != "" {
			o.answer, why[o] = fscache.EIO, wrong
		}
		if len(reads) == 0 {
			over = append(over, o)
		}
		for i := range reads {
			e.token++
			reads[i].Token = e.token
		}
		o.reads, o.done = reads, make(map[uint64]bool, len(reads))
		e.queue = append(e.queue, reads...)
	}
	e.mu.Unlock()
	for _, o := range over {
		switch err := e.end(o); {
		case errors.Is(err, fscache.ErrGone): // it was answered, or never was: nobody waits
		case err != nil:
			e.log.Error("answering for another process", zap.Error(err))
		case why[o] != "":
			e.log.Error("denied a reader that another process left: its event is "+why[o], zap.Int32("fd", o.number))
		}
	}
}

// answerOrphan takes the answer to one of the things an orphan may be. The event is answered when all have been, and allowed only if all
// are there: whichever it is, its bytes are. mu is held, and released.
func (e *Engine) answerOrphan(o *orphan, r fscache.Request, a fscache.Errno) error {
	if o.done[r.Token] || !slices.Contains(o.reads, r) {
		e.mu.Unlock()
		return fmt.Errorf("event %d of %s: %w", r.ID, r.Object, fscache.ErrAnswered)
	}
	o.done[r.Token] = true
	if a != fscache.OK {
		o.answer = a
	}
	last := len(o.done) == len(o.reads)
	e.mu.Unlock()
	if !last {
		return nil
	}
	return e.end(o)
}

// end answers an orphan's event, and gives its number back.
func (e *Engine) end(o *orphan) error {
	b := encodeResponse(o.number, response(o.answer))
	crash.Point("fanotify.orphan.before-answer")
	_, err := e.group.Write(b[:])
	for o.placed && err == nil && len(o.claims) > 1 {
		// Two claims can be two events. Nothing but orphans has a number that is occupied, and all they may be about was dealt with.
		if _, err := e.group.Write(b[:]); err != nil {
			break
		}
	}
	switch {
	case err == nil:
	case errors.Is(err, unix.ENOENT):
		err = fscache.ErrGone
	default:
		return e.unanswered(o.number, err)
	}
	crash.Point("fanotify.orphan.before-close")
	e.bury(o)
	return err
}

// bury gives the number of an event that was answered back.
func (e *Engine) bury(o *orphan) {
	e.mu.Lock()
	delete(e.orphans, o.number)
	second := o.behind
	p, ok := e.pending[o.number] // not if the engine was closed meanwhile
	if second != nil && ok {
		p.taken = true
		e.pending[o.number] = p
	}
	e.mu.Unlock()
	if o.placed {
		_ = unix.Close(int(o.number))
	}
	if second == nil || !ok {
		return
	}
	if err := e.finish(o.number, second.slot, second.answer); err != nil && !errors.Is(err, fscache.ErrGone) {
		e.log.Error("answering an event that waited for another", zap.Error(err))
	}
}
