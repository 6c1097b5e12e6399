package state

import (
	"bytes"
	"fmt"
	"slices"

	"go.etcd.io/bbolt"
)

// An Origin says what wrote a file.
type Origin struct {
	Schema  uint32 `json:"schema"`
	Release string `json:"release"`
	Boot    string `json:"boot,omitempty"` // session.db
}

// A DamagedRecord is a record that cannot be decoded: set aside, or, when a file is read with nothing changed, to be set aside.
type DamagedRecord struct {
	Bucket string `json:"bucket"`
	Key    string `json:"key"`
	Value  []byte `json:"value"`

	err error
}

// A StateExport is all that is on record in state.db.
type StateExport struct {
	Origin
	Mounts  []Mount         `json:"mounts"`
	Images  []Image         `json:"images"`
	Objects []Object        `json:"objects"`
	Damaged []DamagedRecord `json:"damaged"`
}

// A SessionExport is all that is on record in session.db.
type SessionExport struct {
	Origin
	Objects []HeldObject    `json:"objects"`
	Pending []Request       `json:"pending"`
	Damaged []DamagedRecord `json:"damaged"`
}

// Export returns all that is on record, as of one instant.
func (d *DB) Export() (e StateExport, err error) {
	e.Origin, e.Damaged, err = d.export(func(tx *bbolt.Tx) {
		e.Mounts, e.Images = sound[Mount](d.store, tx, bucketMounts), sound[Image](d.store, tx, bucketImages)
		e.Objects = sound[Object](d.store, tx, bucketObjects)
	})
	return e, err
}

// Export returns all that is on record, as of one instant.
func (s *Session) Export() (e SessionExport, err error) {
	e.Origin, e.Damaged, err = s.export(func(tx *bbolt.Tx) {
		e.Objects, e.Pending = sound[HeldObject](s.store, tx, bucketHeld), sound[Request](s.store, tx, bucketPending)
	})
	return e, err
}

// ReadState exports a state.db that no process has open, and changes nothing in it. Errors are those of [Open].
func ReadState(path string) (e StateExport, err error) {
	err = readOnly(path, stateLayout, func(s *store) (err error) {
		e, err = (&DB{s}).Export()
		return err
	})
	return e, err
}

// ReadSession exports a session.db that no process has open, of whichever boot, and changes nothing in it.
func ReadSession(path string) (e SessionExport, err error) {
	err = readOnly(path, sessionLayout, func(s *store) (err error) {
		e, err = (&Session{store: s}).Export()
		return err
	})
	return e, err
}

func readOnly(path string, l layout, f func(*store) error) error {
	b, err := openBolt(path, &l, true)
	if err != nil {
		return err
	}
	return guard(func() error {
		defer b.Close()
		return f(&store{db: b, path: path, layout: l})
	})
}

func (s *store) export(records func(*bbolt.Tx)) (o Origin, damaged []DamagedRecord, err error) {
	err = s.db.View(func(tx *bbolt.Tx) (err error) {
		if o.Schema, err = s.schemaOf(tx); err != nil {
			return err
		}
		if o.Schema != s.layout.schema() {
			return fmt.Errorf("it has schema %d and this release reads %d: start the daemon once, it brings the file forward", o.Schema, s.layout.schema())
		}
		if k, _ := tx.Cursor().First(); k == nil {
			return nil
		}
		meta := tx.Bucket(bucketMeta)
		o.Release, o.Boot = string(meta.Get(keyRelease)), string(meta.Get(keyBoot))
		if damaged, err = s.damaged(tx); err != nil {
			return err
		}
		records(tx)
		return nil
	})
	if err != nil {
		err = fmt.Errorf("state: export %s: %w", s.path, err)
	}
	return o, damaged, err
}

// damaged lists the records that were set aside and those that are still to be.
func (s *store) damaged(tx *bbolt.Tx) (all []DamagedRecord, err error) {
	for _, b := range s.layout.buckets {
		bad, err := s.undecodable(tx, b)
		if err != nil {
			return nil, err
		}
		all = append(all, bad...)
	}
	err = tx.Bucket(bucketDamaged).ForEach(func(k, v []byte) error {
		bucket, key, _ := bytes.Cut(k, []byte{0})
		all = append(all, DamagedRecord{Bucket: string(bucket), Key: string(key), Value: bytes.Clone(v)})
		return nil
	})
	return all, err
}

// sound returns the records of a bucket that can be decoded.
func sound[T any](s *store, tx *bbolt.Tx, name []byte) []T {
	all := []T{}
	i := slices.IndexFunc(s.layout.buckets, func(b bucket) bool { return bytes.Equal(b.name, name) })
	// The function never fails, and so neither does ForEach.
	_ = tx.Bucket(name).ForEach(func(k, v []byte) error {
		var t T
		if s.layout.buckets[i].check(k, v) == nil && decode(v, &t) == nil {
			all = append(all, t)
		}
		return nil
	})
	return all
}
