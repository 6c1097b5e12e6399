package state

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"
)

// schema is the number of the layout this release writes; it reads this one and all before it.
const schema = 1

// Buckets, one for each kind of record.
var (
	bucketMeta    = []byte("meta")
	bucketMounts  = []byte("mounts")  // by id
	bucketImages  = []byte("images")  // by digest
	bucketObjects = []byte("objects") // by domain, NUL, id
	bucketDamaged = []byte("damaged") // records set aside, by bucket, NUL, key

	keySchema  = []byte("schema")  // big-endian uint32
	keyRelease = []byte("release") // that wrote the schema
)

// Sentinel errors.
var (
	ErrLocked = errors.New("state is in use by another process")
	ErrNewer  = errors.New("state was written by a newer release")
)

// A DB is an open state.db. All methods may be called from any goroutine.
type DB struct {
	db   *bbolt.DB
	path string
}

// Open opens the state file at path, making it if there is none; release is this program's, and recorded. What was
// damaged and set aside is described in damaged, for the log and the status. Errors wrap [ErrLocked] when another
// process has the file open and [ErrNewer] when this release is too old for it.
func Open(path, release string) (db *DB, damaged []string, err error) {
	db, damaged, err = open(path, release)
	if err == nil || errors.Is(err, ErrLocked) || errors.Is(err, ErrNewer) || !isDamage(err) {
		return db, damaged, err
	}
	aside, err2 := setAside(path)
	if err2 != nil {
		return nil, nil, fmt.Errorf("state: %s is damaged (%w) and cannot be set aside: %w", path, err, err2)
	}
	what := fmt.Sprintf("%s was damaged (%v) and is kept as %s; mounts on record there are not known any more", path, err, aside)
	db, damaged, err = open(path, release)
	return db, append([]string{what}, damaged...), err
}

// A damageError is about a file that is not a sound database.
type damageError struct{ err error }

func (e *damageError) Error() string { return e.err.Error() }
func (e *damageError) Unwrap() error { return e.err }

func isDamage(err error) bool {
	var d *damageError
	return errors.As(err, &d)
}

// setAside renames a damaged file to a name that is not taken.
func setAside(path string) (string, error) {
	stem := path + ".damaged-" + time.Now().UTC().Format("20060102T150405")
	for i := range 100 {
		name := fmt.Sprintf("%s.%d", stem, i)
		// Link fails where the name exists; a rename would replace it.
		err := os.Link(path, name)
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		return name, os.Remove(path)
	}
	return "", fmt.Errorf("too many files named %s", stem)
}

func open(path, release string) (*DB, []string, error) {
	b, err := openBolt(path)
	if err != nil {
		return nil, nil, err
	}
	d := &DB{db: b, path: path}
	damaged, err := d.prepare(release)
	if err != nil {
		// Closing a damaged database may fail too; its lock goes with the descriptor.
		return nil, nil, errors.Join(err, guard(b.Close))
	}
	return d, damaged, nil
}

func openBolt(path string) (b *bbolt.DB, err error) {
	err = guard(func() (err error) {
		// The timeout bounds the wait for the file's lock: 0 would wait for ever.
		b, err = bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second})
		return err
	})
	switch {
	case err == nil:
		return b, nil
	case errors.Is(err, bbolterrors.ErrTimeout):
		return nil, fmt.Errorf("state: %s: %w: is another daemon running with this root? stop it, or use another --root", path, ErrLocked)
	case errors.Is(err, bbolterrors.ErrInvalid), errors.Is(err, bbolterrors.ErrChecksum), errors.Is(err, bbolterrors.ErrVersionMismatch), errors.Is(err, bbolterrors.ErrInvalidMapping):
		err = &damageError{err}
	}
	return nil, fmt.Errorf("state: open %s: %w", path, err)
}

// guard runs f and turns what a damaged file can do to bbolt, panics and faults in its mapping, into damage errors.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = &damageError{fmt.Errorf("%v", r)}
		}
	}()
	return f()
}

// prepare checks the schema, makes what is missing and sets undecodable records aside, in one transaction.
func (d *DB) prepare(release string) (damaged []string, err error) {
	err = guard(func() error {
		return d.db.Update(func(tx *bbolt.Tx) error {
			meta, err := tx.CreateBucketIfNotExists(bucketMeta)
			if err != nil {
				return err
			}
			if err := checkSchema(meta, d.path); err != nil {
				return err
			}
			for _, name := range [][]byte{bucketMounts, bucketImages, bucketObjects, bucketDamaged} {
				if _, err := tx.CreateBucketIfNotExists(name); err != nil {
					return err
				}
			}
			if damaged, err = sweep(tx, d.path); err != nil {
				return err
			}
			if err := meta.Put(keySchema, binary.BigEndian.AppendUint32(nil, schema)); err != nil {
				return err
			}
			return meta.Put(keyRelease, []byte(release))
		})
	})
	if err != nil && !errors.Is(err, ErrNewer) {
		err = fmt.Errorf("state: prepare %s: %w", d.path, err)
	}
	return damaged, err
}

func checkSchema(meta *bbolt.Bucket, path string) error {
	v := meta.Get(keySchema)
	if v == nil {
		return nil
	}
	if len(v) != 4 {
		return &damageError{fmt.Errorf("schema number of %d bytes", len(v))}
	}
	if n := binary.BigEndian.Uint32(v); n > schema {
		return fmt.Errorf("state: %s has schema %d and this release knows up to %d: run holdfast %s or later: %w", path, n, schema, printable(meta.Get(keyRelease)), ErrNewer)
	}
	return nil
}

// sweep moves every record that cannot be decoded to the damaged bucket.
func sweep(tx *bbolt.Tx, path string) (damaged []string, err error) {
	for _, name := range [][]byte{bucketMounts, bucketImages, bucketObjects} {
		var bad [][]byte
		err := tx.Bucket(name).ForEach(func(k, v []byte) error {
			var newer *newerError
			err := check(name, k, v)
			if errors.As(err, &newer) {
				return fmt.Errorf("state: %s, %s %q: %w: run holdfast %s or later: %w", path, name, k, err, printable(tx.Bucket(bucketMeta).Get(keyRelease)), ErrNewer)
			}
			if err != nil {
				damaged = append(damaged, fmt.Sprintf("%s: %s record %q was damaged (%v) and is set aside", path, name, k, err))
				bad = append(bad, bytes.Clone(k))
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		for _, k := range bad {
			aside := append(append(bytes.Clone(name), 0), k...)
			if err := tx.Bucket(bucketDamaged).Put(aside, bytes.Clone(tx.Bucket(name).Get(k))); err != nil {
				return nil, err
			}
			if err := tx.Bucket(name).Delete(k); err != nil {
				return nil, err
			}
		}
	}
	return damaged, nil
}

// check decodes a record and compares it with its key.
func check(bucket, k, v []byte) error {
	var want string
	var err error
	switch string(bucket) {
	case string(bucketMounts):
		var m Mount
		err = decode(v, &m)
		want = m.ID
	case string(bucketImages):
		var i Image
		err = decode(v, &i)
		want = i.Digest
	case string(bucketObjects):
		var o Object
		err = decode(v, &o)
		want = objectKey(o.Domain, o.ID)
	}
	if err == nil && want != string(k) {
		err = fmt.Errorf("it says it is %q", want)
	}
	return err
}

func printable(b []byte) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, string(b[:min(len(b), 64)]))
}

func objectKey(domain, id string) string { return domain + "\x00" + id }

// Close closes the file. Idempotent.
func (d *DB) Close() error { return d.db.Close() }
