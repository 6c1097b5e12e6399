package drill

import (
	"fmt"
	"math"
	"strings"
	"time"
)

// An axis maps values to places in a plot.
type axis struct {
	lo, hi   float64 // values
	from, to float64 // places
	log      bool
}

// at returns where a value is. What is outside is at the edge.
func (a axis) at(v float64) float64 {
	v = min(max(v, a.lo), a.hi)
	if a.log {
		return a.from + (a.to-a.from)*math.Log(v/a.lo)/math.Log(a.hi/a.lo)
	}
	return a.from + (a.to-a.from)*(v-a.lo)/(a.hi-a.lo)
}

// logAxis spans whole decades around lo and hi.
func logAxis(lo, hi, from, to float64) axis {
	a := axis{lo: math.Pow(10, math.Floor(math.Log10(lo)+1e-9)), hi: math.Pow(10, math.Ceil(math.Log10(hi)-1e-9)), from: from, to: to, log: true}
	if a.hi <= a.lo {
		a.hi = 10 * a.lo
	}
	return a
}

// decades are the powers of ten on a logarithmic axis.
func (a axis) decades() (list []float64) {
	for v := a.lo; v <= a.hi*1.0001; v *= 10 {
		list = append(list, v)
	}
	return list
}

// steps are the lengths between marks on an axis of time.
var steps = []time.Duration{
	100 * time.Millisecond, 200 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second, 5 * time.Second, 10 * time.Second,
	15 * time.Second, 30 * time.Second, time.Minute, 2 * time.Minute, 5 * time.Minute, 10 * time.Minute, 15 * time.Minute, 30 * time.Minute,
	time.Hour, 2 * time.Hour, 6 * time.Hour, 12 * time.Hour, 24 * time.Hour,
}

// marks returns the places in time to mark on an axis of time: no more than twelve.
func marks(span time.Duration) (list []time.Duration) {
	step := steps[len(steps)-1]
	for _, s := range steps {
		if span/s <= 12 {
			step = s
			break
		}
	}
	for at := time.Duration(0); at <= span; at += step {
		list = append(list, at)
	}
	return list
}

// A mark is a labelled place on an axis.
type mark struct {
	At    float64
	Label string
}

// A band is a stretch of time in a plot, with what it was.
type band struct {
	X, Width float64
	Kind     Kind
	Bad      bool // it violated something
	Title    string
}

// A bar is one of a histogram's.
type bar struct {
	X, Y, Width, Height float64
	Title               string
}

// The plots' size, and the room for what stands beside them.
const (
	plotWidth  = 1000.0
	plotHeight = 260.0
	plotLeft   = 64.0
	plotRight  = 12.0
	plotTop    = 14.0
	plotBottom = 30.0
	flow       = 70.0 // height of the plot of reads
)

// A stallPlot is the longest wait over time, with the faults.
type stallPlot struct {
	Area   string // path of the area below the curve
	Line   string
	Faults []band
	X, Y   []mark
	Bound  float64 // place of the bound
	Reads  string  // path of the reads a second, in a plot of its own
	Most   string  // reads a second at the top of that
}

// shortest is the least wait that a plot tells from none.
const shortest = 100 * time.Microsecond

func newStallPlot(r *Report) stallPlot {
	span := max(r.Timeline.Bin*time.Duration(len(r.Timeline.Stall)), time.Millisecond)
	x := axis{lo: 0, hi: float64(span), from: plotLeft, to: plotWidth - plotRight}
	y := logAxis(float64(shortest), float64(max(r.Options.StallBound, r.Reads.Max, time.Second)), plotHeight-plotBottom, plotTop)
	p := stallPlot{Bound: y.at(float64(r.Options.StallBound))}
	for _, at := range marks(span) {
		p.X = append(p.X, mark{x.at(float64(at)), at.String()})
	}
	for _, v := range y.decades() {
		p.Y = append(p.Y, mark{y.at(v), short(time.Duration(v))})
	}
	values := make([]float64, len(r.Timeline.Stall))
	for i, s := range r.Timeline.Stall {
		values[i] = float64(s)
	}
	p.Line, p.Area = curve(values, float64(r.Timeline.Bin), x, y)
	most := 1.0
	for i, n := range r.Timeline.Reads {
		values[i] = float64(n) / r.Timeline.Bin.Seconds()
		most = max(most, values[i])
	}
	_, p.Reads = curve(values, float64(r.Timeline.Bin), x, axis{lo: 0, hi: most, from: flow, to: 2})
	p.Most = fmt.Sprintf("%.0f", most)
	for _, f := range r.Faults {
		from, to := x.at(float64(f.At)), x.at(float64(f.At+f.Held+f.Recovery))
		p.Faults = append(p.Faults, band{
			X: from, Width: max(to-from, 1.2), Kind: f.Kind, Bad: f.Violated.Sum() > 0,
			Title: fmt.Sprintf("%d: %s at %s, held %s, recovered after %s, longest wait %s", f.Number, f.Kind, short(f.At), short(f.Held), short(f.Recovery), short(f.MaxStall)),
		})
	}
	return p
}

// curve draws values, each as wide as bin, as steps. area is closed along the lower edge.
func curve(values []float64, bin float64, x, y axis) (line, area string) {
	var b strings.Builder
	for i, v := range values {
		verb := "L"
		if i == 0 {
			verb = "M"
		}
		fmt.Fprintf(&b, "%s%.1f %.1fH%.1f", verb, x.at(float64(i)*bin), y.at(v), x.at(float64(i+1)*bin))
	}
	if len(values) == 0 {
		return "", ""
	}
	line = b.String()
	return line, fmt.Sprintf("%sV%.1fH%.1fZ", line, y.from, x.from)
}

// A latencyPlot is the histogram, with both axes logarithmic.
type latencyPlot struct {
	Bars  []bar
	X, Y  []mark
	Lines []mark // quantiles: their labels are to the left
}

func newLatencyPlot(r *Report) latencyPlot {
	x := logAxis(float64(10*time.Microsecond), float64(max(r.Reads.Max, time.Millisecond)), plotLeft, plotWidth-plotRight)
	groups := group(r.Reads.Buckets)
	most := int64(10)
	for _, g := range groups {
		most = max(most, g.Count)
	}
	y := logAxis(0.5, float64(most), plotHeight-plotBottom, plotTop)
	y.lo = 0.5 // so that one read can be seen
	var p latencyPlot
	for _, v := range x.decades() {
		p.X = append(p.X, mark{x.at(v), short(time.Duration(v))})
	}
	for v := 1.0; v <= y.hi*1.0001; v *= 10 {
		p.Y = append(p.Y, mark{y.at(v), fmt.Sprintf("%.0f", v)})
	}
	for _, g := range groups {
		from, to := x.at(float64(g.LE)/step), x.at(float64(g.LE))
		p.Bars = append(p.Bars, bar{
			X: from, Width: max(to-from-1, 0.8), Y: y.at(float64(g.Count)), Height: y.from - y.at(float64(g.Count)),
			Title: fmt.Sprintf("%d reads below %s", g.Count, short(g.LE)),
		})
	}
	for _, q := range []struct {
		name string
		at   time.Duration
	}{{"p50", r.Reads.P50}, {"p99", r.Reads.P99}, {"p99.9", r.Reads.P999}} {
		p.Lines = append(p.Lines, mark{x.at(float64(q.at)), q.name})
	}
	return p
}

// step is the width of a drawn bar: a tenth of a decade.
var step = math.Pow(10, 0.1)

// group joins a histogram's buckets into bars of equal width on a logarithmic axis.
func group(buckets []Bucket) []Bucket {
	var list []Bucket
	for _, b := range buckets {
		n := math.Ceil(10*math.Log10(float64(max(b.LE, 11*time.Microsecond))) - 1e-9) // what is shorter is in the first bar, above 10 us
		le := time.Duration(math.Pow(10, n/10))
		if last := len(list) - 1; last >= 0 && list[last].LE == le {
			list[last].Count += b.Count
		} else {
			list = append(list, Bucket{le, b.Count})
		}
	}
	return list
}

// short writes a time with three digits at most.
func short(d time.Duration) string {
	switch {
	case d >= 2*time.Minute:
		return d.Round(time.Second).String()
	case d >= time.Second:
		return trim(d.Seconds()) + " s"
	case d >= time.Millisecond:
		return trim(d.Seconds()*1e3) + " ms"
	case d > 0:
		return trim(d.Seconds()*1e6) + " µs"
	}
	return "0"
}

func trim(v float64) string { return fmt.Sprintf("%.3g", v) }
