// Command bench measures holdfast against the bare floor, both in turns in one run, and prints medians and ratios beside
// the targets. It runs natively with the fanotify engine and needs root.
//
// The floor is what the kernel itself allows: the same EROFS image with no daemon and no mark for cache hits, and for
// misses a handler of some fifty lines that does nothing but put the bytes in their place.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"holdfast/tests/demoimage"
	"holdfast/tests/host"
)

// A bench is what the measurements share.
type bench struct {
	bin    string
	dir    string // on the file system of the cache
	rounds int
	demo   *demoimage.Image
}

// measurements are run in this order; each gives one or more lines.
var measurements = []struct {
	name string
	run  func(context.Context, *bench) ([]result, error)
}{
	{"convert", convertDemo},
	{"hit", cacheHit},
	{"cold", coldLocal},
	{"miss", missChunk},
	{"miss4k", missPage},
	{"prefetch", prefetchDemo},
	{"memory", residentMemory},
	{"hundreds", hundredsOfImages},
	{"second", secondImage},
	{"cull", culling},
	{"recovery", recovery(1000, 150)},
	{"recovery10k", recovery(10000, 1000)},
	{"upgrade", upgrading},
}

func main() {
	bin := flag.String("holdfast", "bin/holdfast", "the holdfast binary")
	rounds := flag.Int("rounds", 5, "pairs of runs per measurement")
	only := flag.String("only", "", "comma-separated measurements (default: all)")
	asJSON := flag.String("json", "", "also write the results to this file")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	results, err := run(ctx, *bin, *rounds, *only)
	if err == nil && *asJSON != "" {
		var b []byte
		if b, err = json.MarshalIndent(results, "", "  "); err == nil {
			err = os.WriteFile(*asJSON, append(b, '\n'), 0o644)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, bin string, rounds int, only string) (all []result, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("mounting images and dropping caches needs root: run it as root")
	}
	if bin, err = filepath.Abs(bin); err != nil {
		return nil, err
	}
	dir, err := host.WorkDir()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	b := &bench{bin: bin, dir: dir, rounds: rounds}
	if b.demo, err = demoimage.Ensure(ctx); err != nil {
		return nil, err
	}
	for _, m := range measurements {
		if only != "" && !strings.Contains(","+only+",", ","+m.name+",") {
			continue
		}
		results, err := m.run(ctx, b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", m.name, err)
		}
		for _, r := range results {
			fmt.Println(r)
		}
		all = append(all, results...)
	}
	return all, nil
}
