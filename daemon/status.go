package daemon

import (
	"cmp"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// counters count over all objects, those of images unmounted since included.
type counters struct {
	served     atomic.Int64 // bytes of requests answered OK
	copied     atomic.Int64 // bytes that were in other objects of a domain
	reflinked  atomic.Int64 // of them, bytes that share their space on disk with those
	mismatches atomic.Int64 // batches of chunks with wrong bytes
	failures   atomic.Int64 // fetches that failed
	refused    atomic.Int64 // requests answered with an error
}

// sourceStats counts what one source gave since the daemon started.
type sourceStats struct {
	fetched  atomic.Int64 // bytes
	requests atomic.Int64 // ranges asked for
}

// sourceTable holds the counters of every source used since the daemon started, by name.
type sourceTable struct {
	mu     sync.Mutex
	byName map[string]*sourceStats
}

func (t *sourceTable) get(name string) *sourceStats {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.byName[name]
	if s == nil {
		s = &sourceStats{}
		t.byName[name] = s
	}
	return s
}

// A Status is the answer to GET /v1/status. Sizes are bytes; counters count from the daemon's start.
type Status struct {
	Release      string    `json:"release"`
	PID          int       `json:"pid"`
	Started      time.Time `json:"started"`
	Engine       string    `json:"engine"`
	EngineReason string    `json:"engine_reason"` // why this engine
	Root         string    `json:"root"`

	ReadDeadline time.Duration `json:"read_deadline_ns"` // how long a reader waits for a source that does not answer

	Space SpaceStatus `json:"space"`

	Mounts  int      `json:"mounts"`
	Damaged []string `json:"damaged,omitempty"` // state found damaged at start, and where it was put
	Lost    []string `json:"lost,omitempty"`    // mounts that could not be kept, since the daemon started

	Pending   int           `json:"pending"`           // requests of the kernel being served
	OldestAge time.Duration `json:"oldest_pending_ns"` // how long the oldest has waited

	Fetched    int64 `json:"fetched"`    // from sources
	Copied     int64 `json:"copied"`     // of chunks that the cache had in another object of the domain, instead of being fetched
	Reflinked  int64 `json:"reflinked"`  // of that, what shares its space on disk with where it was copied from
	Served     int64 `json:"served"`     // of requests answered with data
	Mismatches int64 `json:"mismatches"` // chunks that came with wrong bytes, none of which was written
	Failures   int64 `json:"failures"`   // fetches that failed
	Refused    int64 `json:"refused"`    // requests answered with an error

	Scrub   *ScrubStatus   `json:"scrub,omitempty"` // where the daemon was told to
	Sources []SourceStatus `json:"sources"`
	Objects []ObjectStatus `json:"objects"`
}

// A SpaceStatus is the room that the cache has.
type SpaceStatus struct {
	Total      int64 `json:"total"` // bytes of its file system
	Free       int64 `json:"free"`  // of them, for the cache
	Inodes     int64 `json:"inodes"`
	FreeInodes int64 `json:"free_inodes"`
	Culled     int64 `json:"culled"`       // objects
	Parts      int64 `json:"culled_parts"` // bytes, of mounted objects
	Stopped    bool  `json:"stopped"`      // there is so little that nothing new is written
}

// A SourceStatus is what one source gave.
type SourceStatus struct {
	Name     string `json:"name"`
	Fetched  int64  `json:"fetched"`
	Requests int64  `json:"requests"` // ranges
}

// An ObjectStatus is the state of one cache object of a mounted image.
type ObjectStatus struct {
	Domain   string `json:"domain"`
	ID       string `json:"id"`
	Size     int64  `json:"size"`
	Present  int64  `json:"present"`
	InFlight int64  `json:"in_flight"`
	Fetched  int64  `json:"fetched"`
	Copied   int64  `json:"copied"` // from other objects of the domain
	Served   int64  `json:"served"`
}

// status describes the daemon as it is.
func (d *Daemon) status() Status {
	n, oldest := d.pump.pending()
	s := Status{
		Release: d.opt.Release, PID: os.Getpid(), Started: d.started,
		Engine: d.engine.Name(), EngineReason: d.opt.EngineReason, Root: d.opt.Root, ReadDeadline: d.opt.ReadDeadline,
		Mounts: len(d.mounts.list()), Damaged: d.damaged, Lost: d.lost, Pending: n,
		Copied: d.count.copied.Load(), Reflinked: d.count.reflinked.Load(), Served: d.count.served.Load(), Mismatches: d.count.mismatches.Load(),
		Failures: d.count.failures.Load(), Refused: d.count.refused.Load(),
		Scrub: d.scrubber.report(), Sources: d.sources.status(), Objects: []ObjectStatus{},
	}
	if space, err := d.room.ask(); err == nil {
		s.Space = SpaceStatus{
			Total: space.Total, Free: space.Free, Inodes: space.Inodes, FreeInodes: space.FreeInodes,
			Culled: d.room.culled.Load(), Parts: d.room.parts.Load(), Stopped: d.room.limits.Stopped(space, 0),
		}
	}
	if n > 0 {
		s.OldestAge = time.Since(oldest)
	}
	for _, src := range s.Sources {
		s.Fetched += src.Fetched
	}
	for _, o := range d.objects.all() {
		present, flying := o.presentBytes()
		s.Objects = append(s.Objects, ObjectStatus{
			Domain: o.key.Domain, ID: o.key.ID, Size: o.size(), Present: present, InFlight: flying,
			Fetched: o.fetched.Load(), Copied: o.copied.Load(), Served: o.served.Load(),
		})
	}
	slices.SortFunc(s.Objects, func(a, b ObjectStatus) int {
		return cmp.Or(cmp.Compare(a.Domain, b.Domain), cmp.Compare(a.ID, b.ID))
	})
	return s
}

func (t *sourceTable) status() []SourceStatus {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := make([]SourceStatus, 0, len(t.byName))
	for name, s := range t.byName {
		list = append(list, SourceStatus{Name: name, Fetched: s.fetched.Load(), Requests: s.requests.Load()})
	}
	slices.SortFunc(list, func(a, b SourceStatus) int { return cmp.Compare(a.Name, b.Name) })
	return list
}
