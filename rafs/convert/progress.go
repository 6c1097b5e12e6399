package convert

import (
	"sync"
	"sync/atomic"
	"time"

	"holdfast/rafs/blob"
)

// A Phase is what a conversion is at.
type Phase string

// Phases of each image, in their order.
const (
	PhaseRead  Phase = "convert" // layers are read and blobs written
	PhasePack  Phase = "pack"    // metadata is put together
	PhaseStore Phase = "store"   // blobs are put in their place, which is quick, or pushed
)

// Progress says how far a conversion is. Counts are totals since its start, over all images and layers.
type Progress struct {
	Phase         Phase
	Image, Images int    // 1-based, and how many there are
	Layer, Layers int    // of the current image
	Read, Total   int64  // bytes of the source, as they are stored there; Total is 0 when not known before (directories)
	Content       uint64 // bytes of files, uncompressed
	Stored        uint64 // bytes of chunks stored
	Chunks        uint64 // chunks stored
	Deduplicated  uint64 // chunks that were there already
	Pushed        int64  // bytes of blobs sent to a registry
}

const reportEvery = 100 * time.Millisecond

// A progressMeter collects what Progress tells.
type progressMeter struct {
	read, pushed atomic.Int64

	mu   sync.Mutex // guards the fields below
	p    Progress
	done blob.Stats   // of finished layers
	cur  *blob.Writer // nil: none
}

func (m *progressMeter) plan(images []inputImage) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.p.Images = len(images)
	for _, img := range images {
		for _, l := range img.layers {
			m.p.Total += l.size
		}
	}
}

func (m *progressMeter) layer(image, layer, layers int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.p.Phase, m.p.Image, m.p.Layer, m.p.Layers = PhaseRead, image, layer, layers
}

func (m *progressMeter) phase(p Phase) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.p.Phase = p
}

// start and finish frame the writing of a blob.
func (m *progressMeter) start(w *blob.Writer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cur = w
}

func (m *progressMeter) finish(s blob.Stats) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cur = nil
	m.done = addStats(m.done, s)
}

func addStats(a, b blob.Stats) blob.Stats {
	a.Bytes += b.Bytes
	a.Stored += b.Stored
	a.Chunks += b.Chunks
	a.Deduplicated += b.Deduplicated
	return a
}

func (m *progressMeter) snapshot() Progress {
	m.mu.Lock()
	defer m.mu.Unlock()
	p, s := m.p, m.done
	if m.cur != nil {
		s = addStats(s, m.cur.Stats())
	}
	p.Read, p.Pushed = m.read.Load(), m.pushed.Load()
	p.Content, p.Stored, p.Chunks, p.Deduplicated = s.Bytes, s.Stored, s.Chunks, s.Deduplicated
	return p
}

// report calls fn regularly until the function it returns is called, which calls it a last time.
func (m *progressMeter) report(fn func(Progress)) (stop func()) {
	if fn == nil {
		return func() {}
	}
	quit, done := make(chan struct{}), make(chan struct{})
	// Owned by the caller, who ends it with stop and waits there.
	go func() {
		defer close(done)
		t := time.NewTicker(reportEvery)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				fn(m.snapshot())
			case <-quit:
				fn(m.snapshot())
				return
			}
		}
	}()
	return func() { close(quit); <-done }
}
