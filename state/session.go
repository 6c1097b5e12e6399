package state

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.etcd.io/bbolt"

	"holdfast/state/crash"
)

// Buckets of session.db.
var (
	bucketHeld    = []byte("objects") // by name
	bucketPending = []byte("pending") // by number and part
)

var sessionLayout = layout{
	buckets: []bucket{
		bucketOf(string(bucketHeld), func(o HeldObject) string { return o.Name }),
		bucketOf(string(bucketPending), func(r Request) string { return string(r.place().key()) }),
	},
	lost:   "which objects are held and which requests are in flight is known from the supervisor and the inboxes only",
	locked: "is another daemon running with this run directory? stop it, or use another --run",
}

// keyBereft is a key of the meta bucket.
var keyBereft = []byte("bereft")

// A place is where a request stands in the record.
type place struct {
	number uint64
	part   uint16
}

func (r Request) place() place { return place{r.Number, r.Part} }

// key is the number, big-endian, and behind it the part unless that is 0.
func (p place) key() []byte {
	k := binary.BigEndian.AppendUint64(nil, p.number)
	if p.part != 0 {
		k = binary.BigEndian.AppendUint16(k, p.part)
	}
	return k
}

func (p place) compare(q place) int {
	return cmp.Or(cmp.Compare(p.number, q.number), cmp.Compare(p.part, q.part))
}

// A HeldObject is a cache object whose descriptor the supervisor holds.
type HeldObject struct {
	Name   string `json:"name"` // of the descriptor
	Domain string `json:"domain"`
	ID     string `json:"id"`
	Size   int64  `json:"size"`
	Handle uint32 `json:"handle"` // the kernel's id of this opening of the object
}

// A Request was read from the kernel and is not answered. Domain and ID are kept as UTF-8: no object has a name that this would
// change, and a request for one that there is not stays one.
type Request struct {
	Part   uint16    `json:"part,omitempty"` // 0, 1, ... where one number stands for several: which of them it was died with a process
	Number uint64    `json:"number"`         // by which it is answered: message id, or number of the event's descriptor
	Op     uint8     `json:"op"`
	Domain string    `json:"domain"`
	ID     string    `json:"id"`
	Handle uint32    `json:"handle"`
	Off    int64     `json:"off"`
	Len    int64     `json:"len"`
	Since  time.Time `json:"since"`
}

// A Session is an open session.db: what mirrors kernel state, and is gone with the boot like it. All methods may be called from
// any goroutine. It lies on tmpfs, where the sync of a commit costs nothing.
type Session struct {
	*store

	names names

	// mu is held over the transaction: the copy is what is on record.
	mu      sync.Mutex
	pending map[place]*pendingEntry // nil: to be read again
	round   uint64
}

type pendingEntry struct {
	r     Request
	round uint64 // in which it was last listed
}

// OpenSession opens the session file at path, making it if there is none, and emptying it if it is of another boot than the one
// whose id is given. The rest is as for [Open].
func OpenSession(path, boot, release string) (*Session, []string, error) {
	if boot == "" {
		return nil, nil, fmt.Errorf("state: open %s: no boot id", path)
	}
	l := sessionLayout
	l.boot = boot
	st, damaged, err := openStore(path, release, l)
	if err != nil {
		return nil, damaged, err
	}
	s := &Session{store: st}
	objects, err := s.Objects()
	if err == nil {
		err = s.load()
	}
	if err != nil {
		return nil, damaged, errors.Join(err, st.Close())
	}
	for _, o := range objects {
		s.names.take(o.Name)
	}
	return s, damaged, nil
}

// Bereft reports whether a daemon began with a lifeline of its own and did not come to the end of giving up what had been mounted under another.
func (s *Session) Bereft() (yes bool, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		yes = tx.Bucket(bucketMeta).Get(keyBereft) != nil
		return nil
	})
	if err != nil {
		err = fmt.Errorf("state: read whether mounts lost their lifeline: %w", err)
	}
	return yes, err
}

// SetBereft records what [Session.Bereft] reports. ORDER: true before the supervisor is given the new lifeline, which whoever comes next would
// take for the one that the mounts on record have; false when none of them is on record any more.
func (s *Session) SetBereft(yes bool) error {
	err := s.update("record that mounts lost their lifeline", func(tx *bbolt.Tx) error {
		defer crash.Point("state.set-bereft.before-commit")
		if !yes {
			return tx.Bucket(bucketMeta).Delete(keyBereft)
		}
		return tx.Bucket(bucketMeta).Put(keyBereft, []byte{1})
	})
	crash.Point("state.set-bereft.after-commit")
	return err
}

// Objects returns the held objects on record, by name.
func (s *Session) Objects() ([]HeldObject, error) { return list[HeldObject](s.store, bucketHeld) }

// RecordObject records a held object. ORDER: before the supervisor is given the descriptor, so that no descriptor comes back from
// it that nobody can name. It is committed when RecordObject returns.
func (s *Session) RecordObject(o HeldObject) error {
	if o.Name == "" {
		return fmt.Errorf("state: record held object %s of %s: it has no name", o.ID, o.Domain)
	}
	s.names.take(o.Name)
	err := s.update("record held object "+o.Name, func(tx *bbolt.Tx) error {
		defer crash.Point("state.record-object.before-commit")
		return put(tx, bucketHeld, o.Name, o)
	})
	crash.Point("state.record-object.after-commit")
	return err
}

// ForgetObject removes a held object from the record and frees its name. ORDER: after the supervisor has let go of the
// descriptor; the name could else come to mean two. Forgetting one that is not on record frees the name only.
func (s *Session) ForgetObject(name string) error {
	err := s.update("forget held object "+name, func(tx *bbolt.Tx) error {
		defer crash.Point("state.forget-object.before-commit")
		return tx.Bucket(bucketHeld).Delete([]byte(name))
	})
	crash.Point("state.forget-object.after-commit")
	if err == nil {
		s.names.free(name)
	}
	return err
}

// FreeName returns the shortest name that no held object has, and keeps it from being returned again until ForgetObject.
// All names together are one environment string of at most 128 KiB (MAX_ARG_STRLEN, include/uapi/linux/binfmts.h) when they come back.
func (s *Session) FreeName() string { return s.names.next() }

// Pending returns the requests on record, by number.
func (s *Session) Pending() ([]Request, error) { return list[Request](s.store, bucketPending) }

// SetPending makes the record of requests in flight equal to list, whose numbers and parts differ, in one transaction, and in none if it is already. It is
// called by one goroutine, over and over, and never while a reader waits for it.
func (s *Session) SetPending(list []Request) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.load(); err != nil {
		return err
	}
	changed, gone := s.diff(list)
	if len(changed)+len(gone) == 0 {
		return nil
	}
	err := s.update("record requests in flight", func(tx *bbolt.Tx) error {
		defer crash.Point("state.set-pending.before-commit")
		return write(tx.Bucket(bucketPending), changed, gone)
	})
	crash.Point("state.set-pending.after-commit")
	if err != nil {
		s.pending = nil // what a failed commit left is known from the file only
		return err
	}
	s.remember(changed)
	for _, p := range gone {
		delete(s.pending, p)
	}
	return nil
}

// load reads the copy of what is on record if there is none. The caller has mu, or the only reference.
func (s *Session) load() error {
	if s.pending != nil {
		return nil
	}
	all, err := s.Pending()
	if err != nil {
		return err
	}
	s.pending = make(map[place]*pendingEntry, len(all))
	s.remember(all)
	return nil
}

func (s *Session) remember(all []Request) {
	for _, r := range all {
		s.pending[r.place()] = &pendingEntry{r, s.round}
	}
}

// diff says what is to be put and removed for the record to be list, both by number: neighbours are on one page.
// It allocates nothing if that is nothing.
func (s *Session) diff(list []Request) (changed []Request, gone []place) {
	s.round++
	listed := 0 // of what is on record
	for _, r := range list {
		e := s.pending[r.place()]
		if e == nil || e.r != r {
			changed = append(changed, r)
		}
		if e != nil && e.round != s.round {
			e.round = s.round
			listed++
		}
	}
	slices.SortFunc(changed, func(a, b Request) int { return a.place().compare(b.place()) })
	if listed == len(s.pending) {
		return changed, nil
	}
	for p, e := range s.pending {
		if e.round != s.round {
			gone = append(gone, p)
		}
	}
	slices.SortFunc(gone, place.compare)
	return changed, gone
}

func write(b *bbolt.Bucket, changed []Request, gone []place) error {
	for _, p := range gone {
		if err := b.Delete(p.key()); err != nil {
			return err
		}
	}
	for _, r := range changed {
		v, err := encode(r)
		if err != nil {
			return err
		}
		if err := b.Put(r.place().key(), v); err != nil {
			return err
		}
	}
	return nil
}

// names says which of the names o0, o1, ... in base 36 are taken.
type names struct {
	mu    sync.Mutex
	taken map[uint64]bool
	least uint64 // all below are taken
}

const namePrefix = "o"

func nameOf(n uint64) string { return namePrefix + strconv.FormatUint(n, 36) }

// numberOf is the inverse of nameOf; other names have no number and stand in nobody's way.
func numberOf(name string) (uint64, bool) {
	n, err := strconv.ParseUint(strings.TrimPrefix(name, namePrefix), 36, 64)
	return n, err == nil && nameOf(n) == name
}

func (s *names) next() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.taken[s.least] {
		s.least++
	}
	s.set(s.least)
	return nameOf(s.least)
}

func (s *names) take(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n, ok := numberOf(name); ok {
		s.set(n)
	}
}

func (s *names) set(n uint64) {
	if s.taken == nil {
		s.taken = map[uint64]bool{}
	}
	s.taken[n] = true
}

func (s *names) free(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n, ok := numberOf(name); ok {
		delete(s.taken, n)
		s.least = min(s.least, n)
	}
}
