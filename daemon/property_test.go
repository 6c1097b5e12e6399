package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
	"holdfast/rafs"
	"holdfast/rafs/source"
)

// TestEveryByteIsRightOrAnErrorWhateverTheSourceDoes reads a random object through a daemon whose source fails at random: no
// reader gets a wrong byte, and once the source works everybody gets everything.
func TestEveryByteIsRightOrAnErrorWhateverTheSourceDoes(t *testing.T) {
	for name, mode := range map[string]simkernel.Mode{"cachefiles": simkernel.Cachefiles, "fanotify": simkernel.Fanotify} {
		t.Run(name, func(t *testing.T) {
			rapid.Check(t, func(rt *rapid.T) {
				rapid.SyncTest(rt, func(rt *rapid.T) { everyByte(rt, t, mode) })
			})
		})
	}
}

func everyByte(rt *rapid.T, t *testing.T, mode simkernel.Mode) {
	seed := rapid.Uint64().Draw(rt, "seed")
	b := drawBlob(rt, seed)
	r := newRig(t, mode, func(o *Options) {
		o.ReadAhead = rapid.SampledFrom([]int64{1, 64 * kib, mib}).Draw(rt, "ahead")
		o.Streams = rapid.IntRange(1, 4).Draw(rt, "streams")
		o.ReadDeadline = time.Minute
	})
	defer r.close()
	defer r.mount(nil, b)()
	b.setBefore(faults(rand.New(rand.NewPCG(seed, 3)), rapid.IntRange(0, 90).Draw(rt, "percent of failures")))
	var wg sync.WaitGroup
	for i := range rapid.IntRange(1, 12).Draw(rt, "readers") {
		off := rapid.Int64Range(0, int64(len(b.want))-1).Draw(rt, fmt.Sprint("offset ", i))
		n := rapid.Int64Range(1, min(512*kib, int64(len(b.want))-off)).Draw(rt, fmt.Sprint("length ", i))
		after := time.Duration(rapid.IntRange(0, 100).Draw(rt, fmt.Sprint("delay ", i))) * time.Millisecond
		wg.Go(func() {
			time.Sleep(after)
			got := make([]byte, n)
			err := r.kernel.Read(context.Background(), r.dirs[b.key], b.key, got, off)
			if err == nil && !bytes.Equal(got, b.want[off:off+n]) {
				rt.Errorf("wrong bytes, %d at %d", n, off)
			}
		})
	}
	wg.Wait()
	b.setBefore(nil)
	time.Sleep(2 * denialLife) // a read that asks for a part of what was denied just now is taken for the kernel's second request
	got := make([]byte, len(b.want))
	if err := r.kernel.Read(context.Background(), r.dirs[b.key], b.key, got, 0); err != nil || !bytes.Equal(got, b.want) {
		rt.Errorf("with a working source: %v, or wrong bytes", err)
	}
	synctest.Wait()
	o := r.object(b)
	if p, f := o.presentBytes(); p != o.size() || f != 0 || len(o.waiters) != 0 || len(o.slots) != 0 {
		rt.Errorf("at the end %d bytes of %d are present and %d on their way, %d waiters and %d slots are left", p, o.size(), f, len(o.waiters), len(o.slots))
	}
}

// drawBlob makes a blob whose chunks have any size, lie in the blob in any order and are stored either way.
func drawBlob(rt *rapid.T, seed uint64) *testBlob {
	rng := rand.New(rand.NewPCG(seed, 2))
	b := &testBlob{key: fscache.Key{Domain: LocalDomain, ID: "aa"}}
	sizes := rapid.SliceOfN(rapid.SampledFrom([]int{0, 1, 100, 4096, 4096, 5000, 60_000, 65_536, 300_000}), 1, 24).Draw(rt, "sizes")
	var rows []rafs.Chunk
	for _, n := range sizes {
		if n > 0 {
			rows = append(rows, rafs.Chunk{Offset: uint64(len(b.want)), Size: uint32(n)})
		}
		b.want = append(b.want, make([]byte, rafs.AlignUp(uint64(max(n, 1))))...)
	}
	order := rng.Perm(len(rows))
	if rng.IntN(2) == 0 { // as builders write them
		for i := range order {
			order[i] = i
		}
	}
	for _, i := range order {
		c := &rows[i]
		p := b.want[c.Offset : c.Offset+uint64(c.Size)]
		for k := range p {
			p[k] = byte(rng.Uint32N(9))
		}
		c.Digest, c.BlobOffset = rafs.Blake3.Sum(p), uint64(len(b.stored))
		stored := p
		if rng.IntN(2) == 0 {
			c.Codec, stored = rafs.CodecZstd, compress(p)
		}
		c.Stored = uint32(len(stored))
		b.stored = append(b.stored, stored...)
		if rng.IntN(4) == 0 {
			b.stored = append(b.stored, 0xee) // a gap
		}
	}
	var err error
	if b.table, err = rafs.NewTable(rows, uint64(len(b.want)), uint64(len(b.stored)), rafs.Blake3); err != nil {
		rt.Fatal(err)
	}
	return b
}

// faults makes some percent of a source's answers bad, each in a way of its own.
func faults(rng *rand.Rand, percent int) func(context.Context, int64, int64, io.Reader) (io.Reader, error) {
	var mu sync.Mutex
	return func(ctx context.Context, _, n int64, r io.Reader) (io.Reader, error) {
		mu.Lock()
		bad, kind, at := rng.IntN(100) < percent, rng.IntN(7), rng.Int64N(n)
		mu.Unlock()
		if err := sleep(ctx, time.Duration(at%50)*time.Millisecond); err != nil || !bad {
			return r, err
		}
		switch kind {
		case 0:
			return nil, errors.New("connection reset")
		case 1:
			return nil, source.Permanent(errors.New("not found"))
		case 2:
			return nil, &source.StatusError{Code: http.StatusServiceUnavailable, RetryAfter: time.Second}
		case 3: // ends early
			return io.LimitReader(r, at), nil
		case 4: // fails in the middle
			return io.MultiReader(io.LimitReader(r, at), &failingReader{}), nil
		case 5: // one wrong byte
			p := make([]byte, n)
			_, err := io.ReadFull(r, p)
			p[at] ^= 0x40
			return bytes.NewReader(p), err
		}
		return &paced{ctx: ctx, r: r, step: 1000, pause: 20 * time.Second}, nil // hardly comes at all
	}
}

type failingReader struct{}

func (*failingReader) Read([]byte) (int, error) {
	return 0, errors.New("connection reset in the middle")
}
