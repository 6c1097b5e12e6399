package daemon

import (
	"encoding/json"
	"fmt"

	"holdfast/fscache"
	"holdfast/handover"
	"holdfast/state"
)

// The kinds of records that one process hands to the next. A kind's name ends with its version: what a record means never changes, and
// a successor that does not know a kind says so before anything happens (package handover).
const (
	kindEngine   = "engine.1"   // engineRecord, with the lifeline
	kindSocket   = "socket.1"   // nothing, with the API's listening socket
	kindLock     = "lock.1"     // nothing, with the locked file that keeps others out of the run directory
	kindMount    = "mount.1"    // mountRecord
	kindObjects  = "objects.1"  // []objectRecord, with a descriptor each
	kindPresence = "presence.1" // []presenceRecord
	kindClosed   = "closed.1"   // []objectRecord, without: no longer open
	kindPending  = "pending.1"  // []state.Request
	kindFinished = "finished.1" // []uint64: ids of requests
	kindParted   = "parted.1"   // nothing: the supervisor knows of the successor
)

// kinds are all that this release understands. It needs its successor to understand them too: each is a part of what is handed over.
var kinds = []string{
	kindEngine, kindSocket, kindLock, kindMount, kindObjects, kindPresence, kindClosed, kindPending, kindFinished, kindParted,
}

// An engineRecord says what the successor has to open.
type engineRecord struct {
	Name string `json:"name"`
	Root string `json:"root"`
}

// A mountRecord is a mount the daemon knows of.
type mountRecord struct {
	state.Mount
	Lingering bool   `json:"lingering,omitempty"` // unmounted here, used elsewhere
	Broken    string `json:"broken,omitempty"`
}

// An objectRecord is an object whose descriptor is held.
type objectRecord struct {
	Name   string `json:"name"` // in the fd store; "": not there
	Domain string `json:"domain"`
	ID     string `json:"id"`
	Size   int64  `json:"size"`
	Handle uint32 `json:"handle"`
}

func (r objectRecord) key() fscache.Key { return fscache.Key{Domain: r.Domain, ID: r.ID} }

// A presenceRecord says which chunks of an object are present: verified and in the cache file.
type presenceRecord struct {
	Domain string   `json:"domain"`
	ID     string   `json:"id"`
	Chunks int      `json:"chunks"` // of the table
	Table  string   `json:"table"`  // fingerprint
	Bits   []uint64 `json:"bits"`   // chunk i is bit i%64 of word i/64
}

// perRecord is how many objects one record describes, which bounds its size and its descriptors.
const perRecord = 200

// newRecord encodes body.
func newRecord(kind string, body any, files ...handover.NamedFile) (handover.Record, error) {
	b, err := json.Marshal(body)
	if err != nil {
		return handover.Record{}, fmt.Errorf("encode %s: %w", kind, err)
	}
	return handover.Record{Kind: kind, Body: b, Files: files}, nil
}

// readRecord decodes a record's body.
func readRecord[T any](r handover.Record) (body T, err error) {
	if err := json.Unmarshal(r.Body, &body); err != nil {
		return body, fmt.Errorf("decode %s: %w", r.Kind, err)
	}
	return body, nil
}

// presence is what of the object is present, for a successor, and how often that has changed so far.
func (o *object) presence() (presenceRecord, int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return presenceRecord{
		Domain: o.key.Domain, ID: o.key.ID, Chunks: o.table.Len(), Table: o.print, Bits: append([]uint64(nil), o.present...),
	}, o.changes
}

// changed is how often what is present has changed.
func (o *object) changed() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.changes
}

// spans are the chunks that r says are present, as runs; nil if r is of another table.
func (r presenceRecord) spans(o *object) (list []span) {
	n := o.table.Len()
	if r.Chunks != n || r.Table != o.print || len(r.Bits) != len(newBitset(n)) {
		return nil
	}
	b := bitset(r.Bits)
	for i := range n {
		if !b.has(i) {
			continue
		}
		if k := len(list); k > 0 && list[k-1].last == i {
			list[k-1].last++
		} else {
			list = append(list, span{i, i + 1})
		}
	}
	return list
}
