package state

import (
	"encoding/json"
	"fmt"
	"time"
)

// A Mount is a mounted image on record.
type Mount struct {
	ID          string    `json:"id"`    // of the mount; also the cache key of its bootstrap
	Image       string    `json:"image"` // digest
	Ref         string    `json:"ref"`   // as it was given
	Dir         string    `json:"dir"`   // absolute
	Domain      string    `json:"domain"`
	Bootstrap   string    `json:"bootstrap"` // SHA-256 of the bootstrap file, in hex
	Prefetch    bool      `json:"prefetch"`
	PrefetchBPS int64     `json:"prefetch_bps"` // bytes a second; 0: not limited
	Boot        string    `json:"boot"`         // boot id: no mount outlives its boot
	Created     time.Time `json:"created"`
	Stage       Stage     `json:"stage,omitempty"`
}

// A Stage says how far a mount is that is not simply mounted.
type Stage string

// Stages.
const (
	StageAgain  Stage = "again"  // was mounted in an earlier boot, and is being mounted in this one: if it is not there, it never was
	StageLinger Stage = "linger" // was unmounted, and is still used in another mount namespace

	// StageOffline was mounted without a daemon, or is being so: cache files that a daemon has nothing to do with, and must leave as they are.
	StageOffline Stage = "offline"
)

// An Image is a saved image on record. While it is, it refers to each of its blobs in each of its domains.
type Image struct {
	Digest   string    `json:"digest"`
	Ref      string    `json:"ref"`  // as it was given last
	Size     int64     `json:"size"` // of its objects, in bytes
	Created  time.Time `json:"created"`
	Blobs    []Blob    `json:"blobs"`              // nil: a release before schema 2 recorded it, and what it refers to is not known yet
	Domains  []string  `json:"domains"`            // it was mounted in, sorted
	Removing bool      `json:"removing,omitempty"` // it refers to nothing any more; what is saved of it is being removed
}

// A Blob is one that an image refers to.
type Blob struct {
	ID   string `json:"id"`
	Size int64  `json:"size"` // of its object, in bytes
}

// An Object is a cache object that there may be. It is on record before anything of it is cached, until all of it is removed.
// Boot and Table say when its presence was last settled: in which boot, and by which chunk table; "" if it never was.
type Object struct {
	Domain   string `json:"domain"`
	ID       string `json:"id"`
	Boot     string `json:"boot"`               // boot id
	Table    string `json:"table"`              // fingerprint
	Size     int64  `json:"size,omitempty"`     // bytes; 0: a release before schema 2 recorded it
	Removing bool   `json:"removing,omitempty"` // what is cached of it is being removed

	// Used is when the last mount of it went, or when its presence was settled for one; zero: an earlier release recorded it.
	Used time.Time `json:"used,omitzero"`

	// Stamp is that of the cache file when all of it was found right and had been synced, also across boots; "": it was not.
	Stamp string `json:"stamp,omitempty"`
}

// valueVersion is the first byte of every value; JSON follows.
const valueVersion = 1

func encode(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	return append([]byte{valueVersion}, b...), nil
}

// A newerError is about a record of a later release.
type newerError struct{ what string }

func (e *newerError) Error() string { return e.what }

// decode reads a value into v. A *newerError is a version this release does not know; any other error, damage.
func decode(b []byte, v any) error {
	if len(b) == 0 {
		return fmt.Errorf("empty record")
	}
	if b[0] > valueVersion {
		return &newerError{fmt.Sprintf("record of version %d", b[0])}
	}
	if b[0] == 0 {
		return fmt.Errorf("record of version 0")
	}
	return json.Unmarshal(b[1:], v)
}
