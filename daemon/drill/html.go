package drill

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"fmt"
	"html/template"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

//go:embed report.html
var page string

var pageTemplate = template.Must(template.New("report").Funcs(template.FuncMap{
	"short": short, "count": thousands, "bytes": bytesOf, "clock": func(t time.Time) string { return t.Format("2006-01-02 15:04:05 MST") },
	"first": func(n int, list []Violation) []Violation { return list[:min(n, len(list))] },
	"width": func() float64 { return plotWidth }, "height": func() float64 { return plotHeight }, "left": func() float64 { return plotLeft },
	"right": func() float64 { return plotWidth - plotRight }, "top": func() float64 { return plotTop },
	"bottom": func() float64 { return plotHeight - plotBottom }, "flow": func() float64 { return flow },
	"add": func(a, b float64) float64 { return a + b },
	"row": func(i int) float64 { return plotTop + 8 + 13*float64(i) },
}).Parse(page))

// thousands writes a number with its digits in groups.
func thousands(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "\u202f" + s[i:]
	}
	return s
}

func bytesOf(n int64) string {
	for _, u := range []struct {
		name string
		size int64
	}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}} {
		if n >= u.size {
			return fmt.Sprintf("%.1f %s", float64(n)/float64(u.size), u.name)
		}
	}
	return fmt.Sprintf("%d B", n)
}

// HTML returns the report as one page that needs nothing else.
func (r *Report) HTML() ([]byte, error) {
	data := struct {
		*Report
		Stall   stallPlot
		Latency latencyPlot
		All     Violated
		Done    int
	}{Report: r, Stall: newStallPlot(r), Latency: newLatencyPlot(r), All: r.Quiet, Done: len(r.Faults)}
	for _, k := range r.Kinds {
		data.All = data.All.plus(k.Violated)
	}
	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, data); err != nil {
		return nil, fmt.Errorf("write the report: %w", err)
	}
	return b.Bytes(), nil
}

// Write writes drill.json and drill.html to a directory, which it makes.
func (r *Report) Write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	html, err := r.HTML()
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		b    []byte
	}{{"drill.json", append(b, '\n')}, {"drill.html", html}} {
		if err := os.WriteFile(filepath.Join(dir, f.name), f.b, 0o644); err != nil {
			return fmt.Errorf("write the report: %w", err)
		}
	}
	return nil
}
