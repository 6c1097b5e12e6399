package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/tests/host"
	"holdfast/tests/registry"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// A fleet is a host with one image of many layers mounted in many domains, from an OCI layout or from a registry that can be made to hang.
type fleet struct {
	*host.Host
	gate   *gate // nil: a layout
	reg    *registry.Registry
	mounts []string
}

const (
	fleetLayers = 20      // objects of a mount
	fleetFiles  = 64      // of a layer
	fleetRead   = 48      // of these are read: no object becomes complete, so all stay open
	fleetSize   = 4 << 10 // bytes of a file, which is a chunk of its own
)

// A gate is in front of a registry, and gives ranges of blobs from the registry's directory by itself: what is measured is not the registry. While it
// is shut, they wait.
type gate struct {
	srv  *http.Server
	addr string
	shut atomic.Pointer[chan struct{}]
}

func newGate(upstream, dir string) (*gate, error) {
	target := &url.URL{Scheme: "http", Host: upstream}
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.ErrorLog = log.New(io.Discard, "", 0) // daemons that are killed hang up
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	g := &gate{addr: l.Addr().String()}
	g.srv = &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, id, ok := strings.Cut(r.URL.Path, "/blobs/sha256:")
		if !ok || r.Header.Get("Range") == "" || len(id) < 2 {
			proxy.ServeHTTP(w, r)
			return
		}
		if ch := g.shut.Load(); ch != nil {
			select {
			case <-*ch:
			case <-r.Context().Done():
				return
			}
		}
		http.ServeFile(w, r, filepath.Join(dir, "docker/registry/v2/blobs/sha256", id[:2], id, "data"))
	})}
	go g.srv.Serve(l) // ends with close
	return g, nil
}

func (g *gate) close() error { return g.srv.Close() }

// hold makes what is asked from here on wait until open.
func (g *gate) hold() { ch := make(chan struct{}); g.shut.Store(&ch) }

func (g *gate) open() {
	if ch := g.shut.Swap(nil); ch != nil {
		close(*ch)
	}
}

// newFleet mounts the image in so many domains.
func (b *bench) newFleet(ctx context.Context, mounts int, local bool, serve ...string) (f *fleet, err error) {
	dir, err := os.MkdirTemp(b.dir, "fleet-")
	if err != nil {
		return nil, err
	}
	f = &fleet{}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.close())
		}
	}()
	src, ref := filepath.Join(dir, "layers"), "oci:"+filepath.Join(dir, "fleet")+":1"
	if err := smallLayers(src); err != nil {
		return f, err
	}
	if !local {
		if f.reg, err = registry.Start(filepath.Join(dir, "registry")); err != nil {
			return f, err
		}
		if f.gate, err = newGate(f.reg.Addr(), filepath.Join(dir, "registry")); err != nil {
			return f, err
		}
		ref = "docker://" + f.gate.addr + "/fleet:1"
	}
	if err := timed(ctx, nil, b.bin, "convert", "--compression", "none", "--chunk-size", "4KiB", "oci:"+src+":layers", ref); err != nil {
		return f, err
	}
	if f.Host, err = host.Start(b.bin, dir, append([]string{"--prefetch", "off", "--read-ahead", "4KiB", "--streams", "256"}, serve...)...); err != nil {
		return f, err
	}
	for i := range mounts {
		mnt := filepath.Join(dir, fmt.Sprintf("mnt%d", i))
		if err := os.Mkdir(mnt, 0o755); err != nil {
			return f, err
		}
		if _, err := f.Run("mount", "--domain", fmt.Sprintf("d%d", i), ref, mnt); err != nil {
			return f, err
		}
		f.mounts = append(f.mounts, mnt)
	}
	return f, nil
}

func (f *fleet) close() (err error) {
	if f.gate != nil {
		f.gate.open()
	}
	if f.Host != nil {
		err = f.Stop()
	}
	if f.gate != nil {
		err = errors.Join(err, f.gate.close())
	}
	if f.reg != nil {
		err = errors.Join(err, f.reg.Close())
	}
	return err
}

// file is the n-th of all files of all mounts, a different chunk for each.
func (f *fleet) file(n int) string {
	mnt := f.mounts[n%len(f.mounts)]
	n /= len(f.mounts)
	return filepath.Join(mnt, fmt.Sprintf("layer%d-%d", n%fleetLayers, n/fleetLayers%fleetRead))
}

func smallLayers(dir string) error {
	var layers []v1.Layer
	for l := range fleetLayers {
		layer, err := newLayer(fmt.Sprintf("layer%d", l), fleetFiles, fleetSize, repeated(fleetSize))
		if err != nil {
			return err
		}
		layers = append(layers, layer)
	}
	path, err := newLayout(dir)
	if err != nil {
		return err
	}
	return writeImage(path, "layers", layers...)
}

// An arrival is a read that came back.
type arrival struct {
	at  time.Time
	err error
}

// readers begins n reads of files from the first on, each in a thread of its own, and returns where they arrive.
func (f *fleet) readers(first, n int) <-chan arrival {
	out := make(chan arrival, n)
	for i := range n {
		name := f.file(first + i)
		go func() { // ends when its read does
			b, err := os.ReadFile(name)
			want := strings.Repeat(filepath.Base(name)+"\n", fleetSize)[:fleetSize]
			if err == nil && string(b) != want {
				err = fmt.Errorf("%s: wrong bytes", name)
			}
			out <- arrival{time.Now(), err}
		}()
	}
	return out
}

// recovery kills a daemon with so many objects that has 1,000 requests in flight, and takes the time from its successor's exec to the first
// answer.
func recovery(objects int, target float64) func(context.Context, *bench) ([]result, error) {
	return func(ctx context.Context, b *bench) ([]result, error) {
		f, err := b.newFleet(ctx, objects/fleetLayers, false)
		if err != nil {
			return nil, err
		}
		var first, last []float64
		for round := range b.rounds {
			t1, t2, err := f.killed(round*inFlight, inFlight)
			if err != nil {
				return nil, errors.Join(err, f.close())
			}
			first, last = append(first, t1.Seconds()*1e3), append(last, t2.Seconds()*1e3)
		}
		if err := f.close(); err != nil {
			return nil, err
		}
		m := median(first)
		fmt.Printf("  exec to the last of %d answers: %.0f ms\n", inFlight, median(last))
		name := fmt.Sprintf("exec to first answer, %d objects, %d requests in flight", objects, inFlight)
		return []result{{Name: name, Unit: "ms", Ours: m, Ratio: m, Target: target, AtMost: true}}, nil
	}
}

const inFlight = 1000

// killed does one round. The clock is the keeper's: it logs when it starts the daemon.
func (f *fleet) killed(first, n int) (firstAnswer, lastAnswer time.Duration, err error) {
	f.gate.hold()
	arrivals := f.readers(first, n)
	old, err := f.waitPending(n)
	if err != nil {
		return 0, 0, err
	}
	f.gate.open() // for the next daemon: the old one dies before it can use what comes
	if err := unix.Kill(old, unix.SIGKILL); err != nil {
		return 0, 0, err
	}
	var at []time.Time
	for range n {
		select {
		case a := <-arrivals:
			if a.err != nil {
				return 0, 0, a.err
			}
			at = append(at, a.at)
		case <-time.After(time.Minute):
			return 0, 0, fmt.Errorf("%d of %d readers are not back a minute after the kill:\n%s", n-len(at), n, f.Log())
		}
	}
	exec, err := f.started(old)
	if err != nil {
		return 0, 0, err
	}
	at = slices.DeleteFunc(at, func(t time.Time) bool { return t.Before(exec) }) // answered by the old one with its last breath
	if len(at) == 0 {
		return 0, 0, errors.New("no request outlived the daemon")
	}
	return slices.MinFunc(at, time.Time.Compare).Sub(exec), slices.MaxFunc(at, time.Time.Compare).Sub(exec), nil
}

// waitPending waits until the daemon has read n requests, and returns its process id.
func (f *fleet) waitPending(n int) (int, error) {
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if s, err := f.Status(); err == nil && s.Pending >= n {
			return s.PID, nil
		}
	}
	s, err := f.Status()
	return 0, fmt.Errorf("not %d requests in flight after a minute: %d, %v", n, s.Pending, err)
}

// started is when the keeper started the daemon that came after old.
func (f *fleet) started(old int) (time.Time, error) {
	b, err := os.ReadFile(filepath.Join(f.Dir, "serve.log"))
	if err != nil {
		return time.Time{}, err
	}
	var last time.Time
	for line := range strings.Lines(string(b)) {
		var e struct {
			TS  time.Time `json:"ts"`
			Msg string    `json:"msg"`
			PID int       `json:"pid"`
		}
		if json.Unmarshal([]byte(line), &e) == nil && e.Msg == "the command was started" && e.PID != old {
			last = e.TS
		}
	}
	if last.IsZero() {
		return last, errors.New("the keeper's log does not say when it started the daemon")
	}
	return last, nil
}

const (
	upgrades       = 200
	upgradeReaders = 16
)

// upgrading upgrades a daemon with 1,000 objects under 16 readers, and takes the time nobody read, and what readers felt of it.
func upgrading(ctx context.Context, b *bench) ([]result, error) {
	f, err := b.newFleet(ctx, 1000/fleetLayers, true)
	if err != nil {
		return nil, err
	}
	quiet, err := f.latencies(0, func() error { return sleep(ctx, 2*time.Second) })
	if err != nil {
		return nil, errors.Join(err, f.close())
	}
	var pauses []float64
	busy, err := f.latencies(len(quiet), func() error {
		for range upgrades {
			out, err := f.Run("upgrade", "--json")
			if err != nil {
				return err
			}
			var r struct {
				Pause time.Duration `json:"pause_ns"`
			}
			if err := json.Unmarshal([]byte(out), &r); err != nil {
				return err
			}
			pauses = append(pauses, r.Pause.Seconds()*1e3)
		}
		return nil
	})
	if err = errors.Join(err, f.close()); err != nil {
		return nil, err
	}
	pause, extra := percentile(pauses, 99), percentile(busy, 99)-percentile(quiet, 99)
	fmt.Printf("  pause: median %.2f ms; reads: p99 %.2f ms quiet, %.2f ms while upgrading, %d and %d reads\n",
		median(pauses), percentile(quiet, 99), percentile(busy, 99), len(quiet), len(busy))
	return []result{
		{Name: fmt.Sprintf("upgrade, pause, p99 of %d, 1000 objects, 16 readers", upgrades), Unit: "ms", Ours: pause, Ratio: pause, Target: 5, AtMost: true},
		{Name: "upgrade, extra latency of a reader, p99", Unit: "ms", Ours: extra, Ratio: extra, Target: 20, AtMost: true},
	}, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// latencies are how long reads that miss took while during ran, in ms, by readers that each read one file after another, from the
// first file on. Where the files run out they begin again, with the page cache dropped: the kernel asks again for what is under a mark.
func (f *fleet) latencies(first int, during func() error) (all []float64, err error) {
	var wg sync.WaitGroup
	var next atomic.Int64
	next.Store(int64(first))
	total := len(f.mounts) * fleetLayers * fleetRead
	stop := make(chan struct{})
	lists := make([][]float64, upgradeReaders)
	errs := make([]error, upgradeReaders)
	for i := range upgradeReaders {
		wg.Go(func() { // until stop
			for {
				select {
				case <-stop:
					return
				default:
				}
				name := f.file(int(next.Add(1)) % total)
				began := time.Now()
				b, err := readCold(name)
				lists[i] = append(lists[i], time.Since(began).Seconds()*1e3)
				want := strings.Repeat(filepath.Base(name)+"\n", fleetSize)[:fleetSize]
				if err != nil || string(b) != want {
					errs[i] = fmt.Errorf("%s: wrong bytes, or %w", name, err)
					return
				}
			}
		})
	}
	err = during()
	close(stop)
	wg.Wait()
	return slices.Concat(lists...), errors.Join(append(errs, err)...)
}

// readCold reads a file that is not in the page cache then.
func readCold(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return nil, err
	}
	b := make([]byte, fleetSize)
	_, err = f.ReadAt(b, 0)
	return b, err
}

func percentile(v []float64, p int) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	return s[min(len(s)*p/100, len(s)-1)]
}
