package daemon

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
	"testing/synctest"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
	"holdfast/rafs"
)

// inFanotify runs a test in a synctest bubble over the kernel's interface whose cache can be read.
func inFanotify(t *testing.T, f func(t *testing.T, r *rig)) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, simkernel.Fanotify, nil)
		defer r.close()
		f(t, r)
	})
}

// twins are two blobs with the same chunks, stored differently.
func twins(sizes ...int) (a, b *testBlob) {
	return newBlob("a", 1, rafs.CodecZstd, sizes...), newBlob("b", 1, rafs.CodecNone, sizes...)
}

// readAll reads a blob's object from end to end, a page at a time.
func (r *rig) readAll(b *testBlob) {
	r.t.Helper()
	for off := int64(0); off < int64(len(b.want)); off += fscache.BlockSize {
		r.wantOK(b, off, fscache.BlockSize)
	}
}

// fetchedBytes is how many bytes of a blob were asked for so far.
func (b *testBlob) fetchedBytes() (n int64) {
	for _, r := range b.asked() {
		n += r[1]
	}
	return n
}

func TestChunksThatAnotherObjectHasAreCopiedAndNotFetched(t *testing.T) {
	inFanotify(t, func(t *testing.T, r *rig) {
		a, b := twins(100, 3*fscache.BlockSize, 0, 1<<20, 5000, 64<<10)
		defer r.mount(nil, a)()
		r.readAll(a)
		defer r.mount(nil, b)()
		r.readAll(b)
		if got := b.asked(); len(got) != 0 {
			t.Errorf("ranges %v were fetched", got)
		}
		synctest.Wait()                                  // what is copied is shared after the reader has its answer
		want := int64(len(b.want)) - 2*fscache.BlockSize // the zero row is no copy
		s := r.d.status()
		if s.Copied != want || s.Objects[1].ID != "b" || s.Objects[1].Copied != want || s.Objects[1].Fetched != 0 || s.Reflinked != want {
			t.Errorf("%d bytes copied, %d of them reflinked, want %d; objects %+v", s.Copied, s.Reflinked, want, s.Objects)
		}
	})
}

func TestFileSystemThatCannotShareExtentsIsAskedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, simkernel.Fanotify, func(o *Options) { o.ReadAhead = 1 }) // so that each chunk is copied by itself
		defer r.close()
		asked := 0
		r.e.share = func() error {
			asked++
			return errors.ErrUnsupported
		}
		a, b := twins(many(20, 8<<10)...)
		defer r.mount(nil, a)()
		r.readAll(a)
		defer r.mount(nil, b)()
		r.readAll(b)
		synctest.Wait()
		if s := r.d.status(); asked != 1 || s.Reflinked != 0 || s.Copied != int64(len(b.want)) {
			t.Errorf("asked %d times; %d of %d bytes copied, %d reflinked", asked, s.Copied, len(b.want), s.Reflinked)
		}
	})
}

func TestWhatWasCachedBeforeTheMountIsCopiedToo(t *testing.T) {
	inFanotify(t, func(t *testing.T, r *rig) {
		a, b := twins(many(20, 8<<10)...)
		unmount := r.mount(nil, a)
		r.readAll(a)
		unmount()
		if n := r.d.index.size.Load(); n != 0 {
			t.Errorf("%d chunks of unmounted images are indexed", n)
		}
		defer r.mount(nil, a)()
		defer r.mount(nil, b)()
		r.readAll(b)
		if got := b.asked(); len(got) != 0 {
			t.Errorf("ranges %v were fetched", got)
		}
	})
}

func TestNothingIsCopiedFromAnotherDomain(t *testing.T) {
	inFanotify(t, func(t *testing.T, r *rig) {
		a, b := twins(many(20, 8<<10)...)
		b.key.Domain = "other"
		defer r.mount(nil, a)()
		r.readAll(a)
		defer r.mount(nil, b)()
		r.readAll(b)
		if got, want := b.fetchedBytes(), b.Size(); got != want || r.d.status().Copied != 0 {
			t.Errorf("%d of %d bytes were fetched, %d copied", got, want, r.d.status().Copied)
		}
	})
}

func TestAChunkThatIsOnlyOnItsWayIsFetched(t *testing.T) {
	inFanotify(t, func(t *testing.T, r *rig) {
		a, b := twins(8 << 10)
		release := make(chan struct{})
		a.setBefore(func(ctx context.Context, _, _ int64, in io.Reader) (io.Reader, error) {
			<-release
			return in, nil
		})
		defer r.mount(nil, a)()
		defer r.mount(nil, b)()
		done := make(chan struct{})
		go func() { defer close(done); r.readAll(a) }() // ends when the source answers; waited for below
		synctest.Wait()
		r.readAll(b)
		if got := b.fetchedBytes(); got != b.Size() {
			t.Errorf("%d of %d bytes were fetched", got, b.Size())
		}
		close(release)
		<-done
	})
}

func TestWhatTheCacheHasLostIsFetched(t *testing.T) {
	for name, lose := range map[string]func(r *rig, a *testBlob){
		"cannot be read": func(r *rig, a *testBlob) { r.e.read = func() error { return errors.New("input/output error") } },
		"holds something else": func(r *rig, a *testBlob) {
			if err := r.e.WriteAt(a.key, fscache.AlignedBuffer(len(a.want)), 0); err != nil {
				r.t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			inFanotify(t, func(t *testing.T, r *rig) {
				a, b := twins(many(20, 8<<10)...)
				defer r.mount(nil, a)()
				r.readAll(a)
				defer r.mount(nil, b)()
				lose(r, a)
				r.readAll(b)
				if ranges := b.asked(); len(ranges) > 2 || r.d.status().Copied != 0 {
					t.Errorf("the source was asked for %v, %d bytes were copied", ranges, r.d.status().Copied)
				}
			})
		})
	}
}

func TestEngineThatCannotReadItsCacheCostsTheIndexNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, simkernel.Cachefiles, nil)
		defer r.close()
		a, b := twins(many(20, 8<<10)...)
		defer r.mount(nil, a)()
		r.readAll(a)
		defer r.mount(nil, b)()
		r.readAll(b)
		if got := b.fetchedBytes(); got != b.Size() || !r.d.index.off.Load() || r.d.index.size.Load() != 0 {
			t.Errorf("%d of %d bytes were fetched; the index is off: %v, and has %d chunks", got, b.Size(), r.d.index.off.Load(), r.d.index.size.Load())
		}
	})
}

func TestIndexHoldsNoMoreThanItsLimit(t *testing.T) {
	inFanotify(t, func(t *testing.T, r *rig) {
		r.d.index.limit = 7
		a, b := twins(many(20, 8<<10)...)
		defer r.mount(nil, a)()
		r.readAll(a)
		if got := r.d.index.size.Load(); got != 7 {
			t.Errorf("the index has %d chunks", got)
		}
		defer r.mount(nil, b)()
		r.readAll(b)
	})
}

func TestFewCachedChunksInTheMiddleOfARangeAreFetchedWithIt(t *testing.T) {
	const size = 16 << 10
	for _, tt := range []struct {
		name   string
		cached []int // chunks of 20
		want   []span
	}{
		{"none", nil, []span{{0, 20}}},
		{"few in the middle", []int{7, 8, 12}, []span{{0, 20}}},
		{"few at the ends", []int{0, 18, 19}, []span{{0, 1}, {1, 18}, {18, 20}}},
		{"many in the middle", []int{5, 6, 7, 8}, []span{{0, 5}, {5, 9}, {9, 20}}},
		{"few and many", []int{3, 10, 11, 12, 13, 15}, []span{{0, 10}, {10, 14}, {14, 20}}},
		{"all", []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19}, []span{{0, 20}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := newBlob("a", 1, rafs.CodecNone, many(20, size)...), newBlob("b", 1, rafs.CodecNone, many(20, size)...)
			have, want := newObject(a.key, a.table, "", 1), newObject(b.key, b.table, "", 1)
			x := newIndex()
			for _, i := range tt.cached {
				s := span{i, i + 1}
				have.mark(s, 0, s)
				x.add(have, s)
			}
			cut, from := x.near(want, []span{{0, 20}})
			if fmt.Sprint(cut) != fmt.Sprint(tt.want) {
				t.Errorf("spans %v, want %v", cut, tt.want)
			}
			for _, s := range cut {
				for i := s.first; i < s.last; i++ {
					if (from[i].o == nil) != (from[s.first].o == nil) {
						t.Errorf("span %v is fetched in part", s)
					}
				}
			}
		})
	}
}

// newPieces makes a blob of pieces that other blobs may have too.
func newPieces(id string, pieces []int) *testBlob {
	b := &testBlob{key: fscache.Key{Domain: LocalDomain, ID: id}}
	var rows []rafs.Chunk
	for _, n := range pieces {
		p := make([]byte, 1000+n*3000)
		binary.LittleEndian.PutUint64(p, uint64(n+1))
		rows = append(rows, rafs.Chunk{Offset: uint64(len(b.want)), BlobOffset: uint64(len(b.stored)), Size: uint32(len(p)), Stored: uint32(len(p)), Digest: rafs.Blake3.Sum(p)})
		b.stored = append(b.stored, p...)
		b.want = append(b.want, p...)
		b.want = append(b.want, make([]byte, int(rafs.AlignUp(uint64(len(b.want))))-len(b.want))...)
	}
	var err error
	if b.table, err = rafs.NewTable(rows, uint64(len(b.want)), uint64(len(b.stored)), rafs.Blake3); err != nil {
		panic(err)
	}
	return b
}

// Images with the same chunks come and go, and parts of the cache are lost: whatever is read is right (r.read compares), and nothing is
// left in the index of what is not mounted.
func TestReadsAreRightWhateverIsCopied(t *testing.T) {
	for seed := range uint64(30) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			inFanotify(t, func(t *testing.T, r *rig) {
				rng := rand.New(rand.NewPCG(seed, 2))
				blobs, mounted := make([]*testBlob, 6), make([]func(), 6)
				for i := range blobs {
					pieces := make([]int, 1+rng.IntN(30))
					for k := range pieces {
						pieces[k] = rng.IntN(40)
					}
					blobs[i] = newPieces(fmt.Sprint("blob", i), pieces)
				}
				for range 200 {
					i := rng.IntN(len(blobs))
					b := blobs[i]
					switch k := rng.IntN(10); {
					case mounted[i] == nil:
						mounted[i] = r.mount(nil, b)
					case k == 0:
						mounted[i]()
						mounted[i] = nil
					default:
						off := rng.Int64N(int64(len(b.want)) / fscache.BlockSize)
						r.wantOK(b, off*fscache.BlockSize, fscache.BlockSize)
					}
				}
				if r.d.status().Copied == 0 {
					t.Error("nothing was copied")
				}
				for _, unmount := range mounted {
					if unmount != nil {
						unmount()
					}
				}
				if n, objects := r.d.index.size.Load(), len(r.d.index.domain(LocalDomain).objects); n != 0 || objects != 0 {
					t.Errorf("%d chunks and %d objects of unmounted images are indexed", n, objects)
				}
			})
		})
	}
}
