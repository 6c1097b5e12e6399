package simkernel_test

import (
	"bytes"
	"errors"
	"slices"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
)

// Safeties that tests take away, one at a time, to show that the schedules miss them.
type mutation int

const (
	none mutation = iota
	noInbox
	numbersNotOccupied
	restoreBeforeCopen
	oldGoesOnReading
	answerBeforeWrite
	slotBeforeAnswer
	recordsBeforeMessages
	oneRecordPerNumber
	inboxRemovedBeforeRecord
	finishedAtOnce
	replayedOpenReleased
)

// A box is an inbox file: it outlives the process that has it.
type box struct {
	slots [][]byte
	lent  []bool
}

func newBox() *box {
	b := &box{slots: make([][]byte, 8), lent: make([]bool, 8)}
	for i := range b.slots {
		b.slots[i] = make([]byte, 192)
	}
	return b
}

func (b *box) Take() (int, []byte, bool) {
	i := slices.Index(b.lent, false)
	if i < 0 {
		return 0, nil, false
	}
	clear(b.slots[i])
	b.lent[i] = true
	return i, b.slots[i], true
}

func (b *box) Free(slot int) { b.lent[slot] = false }
func (b *box) Slots() int    { return len(b.slots) }

var zeros [64]byte

// messages are what a reader of the file finds: slots that are lent and not zero at their beginning.
func (b *box) messages() (list [][]byte) {
	for i, p := range b.slots {
		if b.lent[i] && !bytes.Equal(p[:len(zeros)], zeros[:]) {
			list = append(list, p)
		}
	}
	return list
}

// death is what a process's panic carries when it dies at one of its steps.
type death struct{ point string }

// A process is the daemon reduced to what the order of things depends on.
type process struct {
	w    *world
	e    *simkernel.Engine
	box  *box
	jobs []*job
	die  int // the step, counted from here, at which it dies; 0: none
	dead bool

	others []int // descriptors of other things
}

// A job is a request that the daemon has.
type job struct {
	fscache.Request
	stage stage
}

type stage int

const (
	fetching stage = iota
	writing
	answering
)

// point is a step at which a process may die.
func (p *process) point(name string) {
	if p.die > 0 {
		if p.die--; p.die == 0 {
			panic(death{name})
		}
	}
}

// Hold implements fscache.Holder. ORDER: record, then supervisor.
func (p *process) Hold(h fscache.Held) error {
	name := p.w.freeName()
	p.w.records[name] = h
	p.point("hold.after-record")
	if err := p.w.k.Keep(h); err != nil {
		return err
	}
	p.w.store = append(p.w.store, entry{name, h})
	p.point("hold.after-push")
	return nil
}

// Drop implements fscache.Holder. ORDER: supervisor, then record. The supervisor may close what it has in its own time.
func (p *process) Drop(h fscache.Held) {
	for i := 0; i < len(p.w.store); i++ {
		s := p.w.store[i]
		if s.held.Object.Key != h.Object.Key || s.held.Handle != h.Handle {
			continue
		}
		p.w.store = slices.Delete(p.w.store, i, i+1)
		i--
		if p.w.slowStore {
			p.w.closing = append(p.w.closing, s.held)
		} else {
			p.w.k.Let(s.held)
		}
		p.point("drop.after-remove")
		delete(p.w.records, s.name)
	}
}

// start is what a process does from its first instruction until it may read requests.
func (p *process) start(c simkernel.Config) error {
	c.Holder, c.Point = p, p.point
	if p.w.mutation != noInbox {
		c.Inbox = p.box
	}
	c.Unsafe = simkernel.Unsafe{
		NoOccupying:  p.w.mutation == numbersNotOccupied,
		RestoreFirst: p.w.mutation == restoreBeforeCopen,
		RecordsFirst: p.w.mutation == recordsBeforeMessages,
		AnswerFreed:  p.w.mutation == slotBeforeAnswer,
		ForgetReplay: p.w.mutation == replayedOpenReleased,
	}
	e, err := p.w.k.Start(c)
	if err != nil {
		return err
	}
	p.e = e
	for _, o := range p.w.objects {
		if err := p.e.Add(ctx, o); err != nil {
			return err
		}
		p.point("start.after-add")
	}
	return nil
}

// take takes one request, if there is one.
func (p *process) take() {
	r, ok, err := p.e.TryNext()
	if err != nil || !ok {
		return
	}
	p.w.note("%s took %s %s %d+%d as %d", p.w.nameOf(p), r.Op, r.Object, r.Off, r.Len, r.ID)
	p.point("daemon.after-next")
	j := &job{Request: r}
	if p.w.mutation == answerBeforeWrite {
		j.stage = answering
	}
	p.jobs = append(p.jobs, j)
}

// step takes a job one step on.
func (p *process) step(j *job) {
	if j.Op != fscache.OpRead {
		p.answer(j, fscache.OK)
		return
	}
	switch {
	case j.stage == fetching && p.w.down:
	case j.stage == fetching && p.w.isBroken(j.Object, j.Off, j.Len):
		p.answer(j, fscache.EIO)
	case j.stage == fetching:
		j.stage = writing
	case j.stage == writing:
		off, n := clip(p.w.size(j.Object), j.Off, j.Len)
		if err := p.e.WriteAt(j.Object, content(j.Object, off, n), off); err != nil {
			p.w.note("%s: %v", j.Object, err)
			p.answer(j, fscache.EIO)
			return
		}
		p.point("daemon.after-write")
		j.stage = answering
		if p.w.mutation == answerBeforeWrite {
			p.jobs = slices.DeleteFunc(p.jobs, func(x *job) bool { return x == j })
		}
	case p.w.mutation == answerBeforeWrite:
		_ = p.e.Answer(j.Request, fscache.OK)
		j.stage = writing
	default:
		p.answer(j, fscache.OK)
	}
}

func (p *process) answer(j *job, e fscache.Errno) {
	p.w.note("%s answers %s %s %d+%d as %d with %d", p.w.nameOf(p), j.Op, j.Object, j.Off, j.Len, j.ID, e)
	p.point("daemon.before-answer")
	if err := p.e.Answer(j.Request, e); err != nil && !errors.Is(err, fscache.ErrGone) {
		p.w.fail("answer %+v: %v", j.Request, err)
	}
	p.jobs = slices.DeleteFunc(p.jobs, func(x *job) bool { return x == j })
	p.point("daemon.after-answer")
	p.w.answered(p, j)
}

// record is the write-behind of what is in flight.
func (p *process) record() {
	list := p.e.Pending()
	if p.w.mutation == oneRecordPerNumber {
		byNumber := make(map[uint64]bool)
		list = slices.DeleteFunc(list, func(x fscache.Pending) bool {
			again := byNumber[x.ID]
			byNumber[x.ID] = true
			return again
		})
	}
	p.point("record.before-commit")
	p.w.pending = list
	p.point("record.after-commit")
}
