package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sort"
	"time"

	"golang.org/x/sys/unix"
)

// A result is one line of the table: ours beside the floor, measured in turns in this run.
type result struct {
	Name   string  `json:"name"`
	Unit   string  `json:"unit"`
	Ours   float64 `json:"ours"`  // median
	Floor  float64 `json:"floor"` // median; 0: the target is absolute
	Ratio  float64 `json:"ratio"` // median of the ratios pair by pair; ours alone where there is no floor
	Target float64 `json:"target"`
	AtMost bool    `json:"at_most"` // the ratio must not be above the target, else not below
}

func (r result) met() bool {
	if r.AtMost {
		return r.Ratio <= r.Target
	}
	return r.Ratio >= r.Target
}

func (r result) String() string {
	sign, verdict := ">=", "met"
	if r.AtMost {
		sign = "<="
	}
	if !r.met() {
		verdict = "NOT MET"
	}
	if r.Floor == 0 {
		return fmt.Sprintf("%-46s %9.3f %-4s %24s target %s %-5.4g %s", r.Name, r.Ours, r.Unit, "", sign, r.Target, verdict)
	}
	return fmt.Sprintf("%-46s %9.3f %-4s floor %9.3f ratio %5.2f target %s %-5.4g %s", r.Name, r.Ours, r.Unit, r.Floor, r.Ratio, sign, r.Target, verdict)
}

// compare pairs two series measured in turns.
func compare(name, unit string, ours, floor []float64, target float64, atMost bool) result {
	ratios := make([]float64, len(ours))
	for i := range ours {
		ratios[i] = ours[i] / floor[i]
	}
	return result{Name: name, Unit: unit, Ours: median(ours), Floor: median(floor), Ratio: median(ratios), Target: target, AtMost: atMost}
}

func median(v []float64) float64 {
	s := append([]float64(nil), v...)
	sort.Float64s(s)
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// readAll reads every regular file below dir once, one after the other, and returns the bytes read and the seconds taken.
func readAll(dir string) (int64, float64, error) {
	buf := make([]byte, 128<<10)
	var total int64
	start := time.Now()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		for {
			n, err := f.Read(buf)
			total += int64(n)
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("read %s: %w", path, err)
			}
		}
	})
	return total, time.Since(start).Seconds(), err
}

// missLatencies reads 4 KiB at count offsets that are step apart, in random order, and returns the microseconds of each
// read. Each read comes as soon as the one before has its answer, while what is read ahead of that one is still under way.
func missLatencies(path string, count int, step int64, seed uint64) ([]float64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		return nil, err
	}
	buf := make([]byte, 4096)
	out := make([]float64, 0, count)
	for _, i := range rand.New(rand.NewPCG(seed, 0)).Perm(count) {
		start := time.Now()
		if _, err := f.ReadAt(buf, int64(i)*step); err != nil {
			return nil, fmt.Errorf("read %s at %d: %w", path, int64(i)*step, err)
		}
		out = append(out, float64(time.Since(start).Nanoseconds())/1e3)
	}
	return out, nil
}
