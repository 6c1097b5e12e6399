package main

import (
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"holdfast/rafs/convert"
	"holdfast/rafs/image"
)

// lineEvery is how often a meter that is no terminal gets a line.
const lineEvery = 5 * time.Second

// A meter shows how far a command is: a bar on a terminal, a plain line now and then elsewhere. Its methods are not safe for
// concurrent use; those who report progress call from one goroutine at a time.
type meter struct {
	out     *os.File
	started time.Time
	said    time.Time

	bars  *mpb.Progress // nil: not a terminal
	bar   *mpb.Bar
	label atomic.Pointer[string] // what stands beside the bar, which draws itself in a goroutine of its own
}

func newMeter(out *os.File) *meter {
	m := &meter{out: out, started: time.Now(), said: time.Now()}
	if isTerminal(out) {
		m.bars = mpb.New(mpb.WithOutput(out), mpb.WithWidth(40))
	}
	return m
}

func (m *meter) converting(p convert.Progress) {
	what := string(p.Phase)
	if p.Images > 1 {
		what = fmt.Sprintf("image %d of %d: %s", p.Image, p.Images, what)
	}
	if p.Layers > 1 {
		what += fmt.Sprintf(" layer %d of %d", p.Layer, p.Layers)
	}
	what += fmt.Sprintf(", %d chunks, %d deduplicated", p.Chunks, p.Deduplicated)
	if p.Pushed > 0 {
		what += ", pushed " + human(p.Pushed)
	}
	done, total := p.Read, p.Total
	if total == 0 {
		done = int64(p.Content)
	}
	m.show(done, total, what)
}

func (m *meter) checking(p image.Progress) { m.show(int64(p.Done), int64(p.Total), "check") }

func (m *meter) exporting(p image.Progress) { m.show(int64(p.Done), int64(p.Total), "export") }

// show takes note of done of total bytes, or of an unknown number if total is 0.
func (m *meter) show(done, total int64, what string) {
	rate := fmt.Sprintf("%s/s", human(int64(float64(done)/max(time.Since(m.started).Seconds(), 0.001))))
	if m.bars == nil {
		if time.Since(m.said) >= lineEvery {
			m.said = time.Now()
			of := ""
			if total > 0 {
				of = " of " + human(total)
			}
			fmt.Fprintf(m.out, "%s%s, %s: %s\n", human(done), of, rate, what)
		}
		return
	}
	label := " " + rate + " " + what
	m.label.Store(&label)
	if m.bar == nil {
		m.bar = m.newBar(total)
	}
	if total > 0 {
		m.bar.SetTotal(max(total, done), false)
	}
	m.bar.SetCurrent(done)
}

// newBar is a bar, or a spinner where nobody knows the total.
func (m *meter) newBar(total int64) *mpb.Bar {
	label := mpb.AppendDecorators(decor.Any(func(decor.Statistics) string { return *m.label.Load() }))
	if total == 0 {
		return m.bars.New(0, mpb.SpinnerStyle(), mpb.BarWidth(3), mpb.PrependDecorators(decor.CurrentKibiByte("% .1f ")), label)
	}
	return m.bars.AddBar(total, mpb.PrependDecorators(decor.CountersKibiByte("% .1f / % .1f")), mpb.AppendDecorators(decor.Percentage(decor.WC{W: 5})), label)
}

// finish leaves the last state on the screen.
func (m *meter) finish() {
	if m.bars == nil {
		return
	}
	if m.bar != nil {
		m.bar.SetTotal(-1, true)
	}
	m.bars.Wait()
}
