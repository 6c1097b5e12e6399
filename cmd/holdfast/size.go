package main

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// A size is a flag's value in bytes.
type size struct{ n int64 }

// units are what may stand behind the number of a size. The one-letter ones mean powers of two, as of most tools.
var units = map[string]int64{
	"": 1, "B": 1,
	"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30,
	"kB": 1e3, "MB": 1e6, "GB": 1e9,
}

var errSize = errors.New("want a number of bytes, or one with K, M or G (KiB, MiB, GiB), or kB, MB or GB")

// Set implements flag.Value.
func (s *size) Set(v string) error {
	digits := strings.TrimRight(v, "BKMGik")
	n, err := strconv.ParseInt(digits, 10, 64)
	unit, ok := units[v[len(digits):]]
	if err != nil || !ok || n < 0 || n > math.MaxInt64/unit {
		return errSize
	}
	s.n = n * unit
	return nil
}

// String implements flag.Value.
func (s *size) String() string {
	for _, u := range []string{"GiB", "MiB", "KiB"} {
		if s.n > 0 && s.n%units[u] == 0 {
			return fmt.Sprint(s.n/units[u], u)
		}
	}
	return strconv.FormatInt(s.n, 10)
}

// human returns a number of bytes for people to read.
func human(n int64) string {
	for _, u := range []string{"GiB", "MiB", "KiB"} {
		if n >= units[u] {
			return fmt.Sprintf("%.1f %s", float64(n)/float64(units[u]), u)
		}
	}
	return fmt.Sprintf("%d B", n)
}
