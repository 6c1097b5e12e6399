package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"holdfast/daemon"
	"holdfast/fscache"
)

// spaceFlags say how much room the cache leaves and who may take how much of it. The watermarks have the names that cachefilesd gave
// them.
func spaceFlags() []cli.Flag {
	d := fscache.DefaultLimits
	flags := []cli.Flag{
		&cli.GenericFlag{Name: "domain-quota", Value: &quota{}, Usage: "let a domain's objects take so many bytes: `DOMAIN=BYTES`, or BYTES for each domain that is not named; more of them with commas, or repeated"},
		&cli.BoolFlag{Name: "cull-mounted", Usage: "when unmounted images are not enough, cull what nobody has read yet of mounted ones too, and have the kernel ask about complete images for that; not with the cachefiles engine"},
		&cli.DurationFlag{Name: "space-deadline", Value: daemon.DefaultSpaceDeadline, Usage: "`TIME` that readers wait for room in a full cache before they get an error"},
	}
	for _, m := range []struct {
		name, usage string
		value       int
	}{
		{"brun", "cull nothing while so many `PERCENT` of the cache's file system are free", d.Space.Run},
		{"bcull", "below so many `PERCENT` free, cull until --brun is reached", d.Space.Cull},
		{"bstop", "below so many `PERCENT` free, write nothing new to the cache", d.Space.Stop},
		{"frun", "--brun for inodes, in `PERCENT`", d.Inodes.Run},
		{"fcull", "--bcull for inodes, in `PERCENT`", d.Inodes.Cull},
		{"fstop", "--bstop for inodes, in `PERCENT`", d.Inodes.Stop},
	} {
		flags = append(flags, &cli.GenericFlag{Name: m.name, Value: &percent{m.value}, Usage: m.usage})
	}
	return flags
}

// limits reads the watermarks.
func limits(c *cli.Context) (fscache.Limits, error) {
	of := func(kind string) fscache.Watermarks {
		n := func(flag string) int { return c.Generic(kind + flag).(*percent).n }
		return fscache.Watermarks{Run: n("run"), Cull: n("cull"), Stop: n("stop")}
	}
	l := fscache.Limits{Space: of("b"), Inodes: of("f")}
	if err := l.Space.Check(); err != nil {
		return l, usagef("--bstop, --bcull, --brun: %w", err)
	}
	if err := l.Inodes.Check(); err != nil {
		return l, usagef("--fstop, --fcull, --frun: %w", err)
	}
	return l, nil
}

// A percent is a flag's value in percent, with or without the sign.
type percent struct{ n int }

// Set implements flag.Value.
func (p *percent) Set(v string) error {
	n, err := strconv.Atoi(strings.TrimSuffix(v, "%"))
	if err != nil || n < 0 || n > 99 {
		return errors.New("want a whole number from 0 to 99")
	}
	p.n = n
	return nil
}

// String implements flag.Value.
func (p *percent) String() string { return strconv.Itoa(p.n) }

// A quota is how many bytes domains may take.
type quota struct{ bytes map[string]int64 }

// Set implements flag.Value. What is said twice of a domain counts as it was said last.
func (q *quota) Set(v string) error {
	next := maps.Clone(q.bytes)
	if next == nil {
		next = map[string]int64{}
	}
	for _, part := range strings.Split(v, ",") {
		domain, bytes, named := strings.Cut(part, "=")
		if !named {
			domain, bytes = daemon.AllDomains, part
		} else if domain == "" {
			return errors.New("want DOMAIN=BYTES, or BYTES for all domains")
		}
		var n size
		if err := n.Set(bytes); err != nil {
			return err
		}
		next[domain] = n.n
	}
	q.bytes = next
	return nil
}

// String implements flag.Value.
func (q *quota) String() string {
	var parts []string
	for _, domain := range slices.Sorted(maps.Keys(q.bytes)) {
		n := size{q.bytes[domain]}
		if domain == daemon.AllDomains {
			parts = append(parts, n.String())
		} else {
			parts = append(parts, fmt.Sprintf("%s=%s", domain, &n))
		}
	}
	return strings.Join(parts, ",")
}
