package state

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// Buckets and keys that every file has. Those in the meta bucket keep their name and form in every schema: they are what a
// release reads of a file before it knows whether it can read the rest.
var (
	bucketMeta    = []byte("meta")
	bucketDamaged = []byte("damaged") // records set aside, by bucket, NUL, key

	keySchema  = []byte("schema")  // big-endian uint32
	keyRelease = []byte("release") // that wrote the file last
	keyBoot    = []byte("boot")    // boot id, in files that are for one boot only
)

// Sentinel errors.
var (
	ErrLocked = errors.New("state is in use by another process")
	ErrNewer  = errors.New("state was written by a newer release")
	// ErrForeign is of state.db only.
	ErrForeign = errors.New("state was written on another host")
)

// A layout is what a kind of file holds.
type layout struct {
	buckets []bucket
	// migrations move a file forward, the first from schema 1 to 2, the next from 2 to 3. They see records as the earlier
	// release wrote them, and leave what they cannot read for the sweep.
	migrations []func(*bbolt.Tx) error
	boot       string // this boot's id, where the file is for one boot only
	lost       string // what is lost with a file that is set aside
	locked     string // what to do when another process has the file
}

// schema is the number of the layout this release writes; it reads this one and all before it.
func (l *layout) schema() uint32 { return uint32(len(l.migrations)) + 1 }

// A bucket holds the records of one kind.
type bucket struct {
	name []byte
	// key decodes a record and returns the key it belongs under.
	key func(v []byte) (string, error)
}

func bucketOf[T any](name string, key func(T) string) bucket {
	return bucket{[]byte(name), func(v []byte) (string, error) {
		var t T
		err := decode(v, &t)
		return key(t), err
	}}
}

// check decodes a record and compares it with its key.
func (b *bucket) check(k, v []byte) error {
	want, err := b.key(v)
	if err == nil && want != string(k) {
		err = fmt.Errorf("it says it is %q", want)
	}
	return err
}

// A store is an open file: what [DB] and [Session] have in common.
type store struct {
	db     *bbolt.DB
	path   string
	layout layout

	mu   sync.Mutex
	next *group // guarded by mu: the transaction that waits for its turn, which more can still join
}

// A group is a transaction that several callers share.
type group struct {
	parts []func(*bbolt.Tx) error
	done  chan struct{} // closed when it was committed, or was not
	err   error
}

// Close closes the file. Idempotent.
func (s *store) Close() error { return s.db.Close() }

// openStore opens a file, making it if there is none. A damaged file is set aside and a new one made.
func openStore(path, release string, l layout) (s *store, damaged []string, err error) {
	s, damaged, err = tryStore(path, release, l)
	if err == nil || errors.Is(err, ErrLocked) || errors.Is(err, ErrNewer) || !isDamage(err) {
		return s, damaged, err
	}
	aside, err2 := setAside(path)
	if err2 != nil {
		return nil, nil, fmt.Errorf("state: %s is damaged (%w) and cannot be set aside: %w", path, err, err2)
	}
	what := fmt.Sprintf("%s was damaged (%v) and is kept as %s; %s", path, err, aside, l.lost)
	s, damaged, err = tryStore(path, release, l)
	return s, append([]string{what}, damaged...), err
}

// A damageError is about a file that is not a sound database.
type damageError struct{ err error }

func (e *damageError) Error() string { return e.err.Error() }
func (e *damageError) Unwrap() error { return e.err }

func isDamage(err error) bool {
	var d *damageError
	return errors.As(err, &d)
}

// asideMark is in the name of everything that was set aside.
const asideMark = ".damaged-"

// setAside renames a damaged file to a name that is not taken.
func setAside(path string) (string, error) {
	stem := path + asideMark + time.Now().UTC().Format("20060102T150405")
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

func tryStore(path, release string, l layout) (*store, []string, error) {
	b, err := openBolt(path, &l, false)
	if err != nil {
		return nil, nil, err
	}
	s := &store{db: b, path: path, layout: l}
	damaged, err := s.prepare(release)
	if err != nil {
		// Closing a damaged database may fail too; its lock goes with the descriptor.
		return nil, nil, errors.Join(err, guard(b.Close))
	}
	return s, damaged, nil
}

func openBolt(path string, l *layout, readOnly bool) (b *bbolt.DB, err error) {
	err = guard(func() (err error) {
		b, err = bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockWait, ReadOnly: readOnly, OpenFile: openChecked})
		return err
	})
	switch {
	case err == nil:
		return b, nil
	case errors.Is(err, bbolterrors.ErrTimeout):
		return nil, fmt.Errorf("state: %s: %w: %s", path, ErrLocked, l.locked)
	case errors.Is(err, bbolterrors.ErrInvalid), errors.Is(err, bbolterrors.ErrChecksum), errors.Is(err, bbolterrors.ErrVersionMismatch), errors.Is(err, bbolterrors.ErrInvalidMapping):
		err = &damageError{err}
	}
	return nil, fmt.Errorf("state: open %s: %w", path, err)
}

// lockWait bounds the wait for a file's lock.
const lockWait = time.Second

// openChecked opens a file for bbolt, which gets it locked and with its pages looked at.
func openChecked(path string, flag int, mode os.FileMode) (*os.File, error) {
	for until := time.Now().Add(lockWait); ; {
		f, err := os.OpenFile(path, flag, mode)
		if err != nil {
			return nil, err
		}
		if err = lock(f, flag&os.O_RDWR != 0, until); err == nil {
			err = checkFile(f, path)
		}
		if err == nil {
			return f, nil
		}
		_ = f.Close()
		if !errors.Is(err, errReplaced) {
			return nil, err
		}
	}
}

// lock takes the lock that bbolt takes; it finds that it has it.
func lock(f *os.File, exclusive bool, until time.Time) error {
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	for {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return os.NewSyscallError("flock", err)
		}
		if time.Now().After(until) {
			return bbolterrors.ErrTimeout
		}
		time.Sleep(10 * time.Millisecond) // flock(2) has no timeout
	}
}

var errReplaced = errors.New("it was replaced meanwhile")

func checkFile(f *os.File, path string) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	// Who had the lock before may have set the file aside and made another.
	if now, err := os.Stat(path); err != nil || !os.SameFile(fi, now) {
		return errReplaced
	}
	return checkPages(f, fi.Size())
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

// prepare moves the file forward to this release's schema, makes what is missing and sets undecodable records aside, in one
// transaction.
func (s *store) prepare(release string) (damaged []string, err error) {
	err = guard(func() error {
		return s.db.Update(func(tx *bbolt.Tx) (err error) {
			damaged, err = s.forward(tx, release)
			return err
		})
	})
	switch {
	case err == nil, errors.Is(err, ErrNewer):
		return damaged, err
	case errors.Is(err, bbolterrors.ErrIncompatibleValue):
		// A bucket where a value belongs, or a value where a bucket does.
		err = &damageError{err}
	}
	return damaged, fmt.Errorf("state: prepare %s: %w", s.path, err)
}

func (s *store) forward(tx *bbolt.Tx, release string) (damaged []string, err error) {
	if err := s.dropOtherBoot(tx); err != nil {
		return nil, err
	}
	from, err := s.schemaOf(tx)
	if err != nil {
		return nil, err
	}
	for _, migrate := range s.layout.migrations[from-1:] {
		if err := migrate(tx); err != nil {
			return nil, err
		}
	}
	for _, name := range append([][]byte{bucketMeta, bucketDamaged}, s.layout.names()...) {
		if _, err := tx.CreateBucketIfNotExists(name); err != nil {
			return nil, err
		}
	}
	if damaged, err = s.sweep(tx); err != nil {
		return nil, err
	}
	meta := tx.Bucket(bucketMeta)
	err = errors.Join(meta.Put(keySchema, binary.BigEndian.AppendUint32(nil, s.layout.schema())), meta.Put(keyRelease, []byte(release)))
	if err == nil && s.layout.boot != "" {
		err = meta.Put(keyBoot, []byte(s.layout.boot))
	}
	return damaged, err
}

func (l *layout) names() (names [][]byte) {
	for _, b := range l.buckets {
		names = append(names, b.name)
	}
	return names
}

// dropOtherBoot empties a file that is for one boot only and was written in another. This is no damage and no loss: the requests,
// objects and descriptors it tells of were the other kernel's and went with it, and any schema says which boot that was.
func (s *store) dropOtherBoot(tx *bbolt.Tx) error {
	meta := tx.Bucket(bucketMeta)
	if s.layout.boot == "" || meta == nil || meta.Get(keyBoot) == nil || string(meta.Get(keyBoot)) == s.layout.boot {
		return nil
	}
	var names [][]byte
	if err := tx.ForEach(func(name []byte, _ *bbolt.Bucket) error {
		names = append(names, bytes.Clone(name))
		return nil
	}); err != nil {
		return err
	}
	for _, name := range names {
		if err := tx.DeleteBucket(name); err != nil {
			return err
		}
	}
	return nil
}

// schemaOf returns the schema of the file, which is this release's if there is nothing in it yet.
func (s *store) schemaOf(tx *bbolt.Tx) (uint32, error) {
	if k, _ := tx.Cursor().First(); k == nil {
		return s.layout.schema(), nil
	}
	meta := tx.Bucket(bucketMeta)
	if meta == nil {
		return 0, &damageError{errors.New("no schema number")}
	}
	v := meta.Get(keySchema)
	if len(v) != 4 || binary.BigEndian.Uint32(v) == 0 {
		return 0, &damageError{fmt.Errorf("schema number %x", v[:min(len(v), 16)])}
	}
	n := binary.BigEndian.Uint32(v)
	if n > s.layout.schema() {
		return 0, fmt.Errorf("state: %s has schema %d and this release knows up to %d: run holdfast %s or later: %w",
			s.path, n, s.layout.schema(), printable(meta.Get(keyRelease)), ErrNewer)
	}
	return n, nil
}

// sweep moves every record that cannot be decoded to the damaged bucket.
func (s *store) sweep(tx *bbolt.Tx) (damaged []string, err error) {
	for _, b := range s.layout.buckets {
		records := tx.Bucket(b.name)
		bad, err := s.undecodable(tx, b)
		if err != nil {
			return nil, err
		}
		for _, r := range bad {
			damaged = append(damaged, fmt.Sprintf("%s: %s record %q was damaged (%v) and is set aside", s.path, b.name, r.Key, r.err))
			aside := append(append(bytes.Clone(b.name), 0), r.Key...)
			if err := errors.Join(tx.Bucket(bucketDamaged).Put(aside, r.Value), records.Delete([]byte(r.Key))); err != nil {
				return nil, err
			}
		}
	}
	return damaged, nil
}

// undecodable lists the records of a bucket that cannot be decoded, and fails for those of a later release.
func (s *store) undecodable(tx *bbolt.Tx, b bucket) (bad []DamagedRecord, err error) {
	err = tx.Bucket(b.name).ForEach(func(k, v []byte) error {
		var newer *newerError
		err := b.check(k, v)
		if errors.As(err, &newer) {
			return fmt.Errorf("state: %s, %s %q: %w: run holdfast %s or later: %w",
				s.path, b.name, k, err, printable(tx.Bucket(bucketMeta).Get(keyRelease)), ErrNewer)
		}
		if err != nil {
			bad = append(bad, DamagedRecord{Bucket: string(b.name), Key: string(k), Value: bytes.Clone(v), err: err})
		}
		return nil
	})
	return bad, err
}

func printable(b []byte) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, string(b[:min(len(b), 64)]))
}

func (s *store) update(what string, f func(*bbolt.Tx) error) error {
	if err := s.db.Update(f); err != nil {
		return fmt.Errorf("state: %s: %w", what, err)
	}
	return nil
}

// together is update in one transaction with all who call it while another is being committed: the disk is waited for once, not once for
// each. When it fails it fails for all.
func (s *store) together(what string, f func(*bbolt.Tx) error) error {
	s.mu.Lock()
	g, first := s.next, s.next == nil
	if first {
		g = &group{done: make(chan struct{})}
		s.next = g
	}
	g.parts = append(g.parts, f)
	s.mu.Unlock()
	if !first {
		<-g.done
		return g.err
	}
	g.err = s.update(what, func(tx *bbolt.Tx) error {
		for _, part := range s.begin(g) {
			if err := part(tx); err != nil {
				return err
			}
		}
		return nil
	})
	s.begin(g) // where no transaction could be begun
	close(g.done)
	return g.err
}

// begin lets nobody join g any more.
func (s *store) begin(g *group) []func(*bbolt.Tx) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next == g {
		s.next = nil
	}
	return g.parts
}

func put(tx *bbolt.Tx, bucket []byte, key string, v any) error {
	b, err := encode(v)
	if err != nil {
		return err
	}
	return tx.Bucket(bucket).Put([]byte(key), b)
}

// get reads a record, and says whether there is one.
func get[T any](tx *bbolt.Tx, bucket []byte, key string) (t T, ok bool, err error) {
	v := tx.Bucket(bucket).Get([]byte(key))
	if v == nil {
		return t, false, nil
	}
	return t, true, decode(v, &t)
}

// all reads the records of a bucket.
func all[T any](tx *bbolt.Tx, bucket []byte) (list []T, err error) {
	err = tx.Bucket(bucket).ForEach(func(_, v []byte) error {
		var t T
		if err := decode(v, &t); err != nil {
			return err
		}
		list = append(list, t)
		return nil
	})
	return list, err
}

func list[T any](s *store, bucket []byte) (list []T, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		list, err = all[T](tx, bucket)
		return err
	})
	if err != nil {
		err = fmt.Errorf("state: read %s: %w", bucket, err)
	}
	return list, err
}
