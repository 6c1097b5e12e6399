package state

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"go.etcd.io/bbolt"

	"holdfast/state/crash"
)

// BootID is the id of this boot of the host (/proc/sys/kernel/random/boot_id).
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// Buckets of state.db.
var (
	bucketMounts  = []byte("mounts")  // by id
	bucketImages  = []byte("images")  // by digest
	bucketObjects = []byte("objects") // by domain, NUL, id
)

var stateLayout = layout{
	buckets: []bucket{
		bucketOf(string(bucketMounts), func(m Mount) string { return m.ID }),
		bucketOf(string(bucketImages), func(i Image) string { return i.Digest }),
		bucketOf(string(bucketObjects), func(o Object) string { return objectKey(o.Domain, o.ID) }),
	},
	migrations: []func(*bbolt.Tx) error{nameDomains},
	lost:       "mounts on record there are not known any more",
	locked:     "is another daemon running with this root? stop it, or use another --root",
}

func objectKey(domain, id string) string { return domain + "\x00" + id }

// A DB is an open state.db. All methods may be called from any goroutine.
type DB struct{ *store }

// Open opens the state file at path, making it if there is none; release is this program's, and recorded. What was
// damaged and set aside is described in damaged, for the log and the status. Errors wrap [ErrLocked] when another
// process has the file open and [ErrNewer] when this release is too old for it.
func Open(path, release string) (db *DB, damaged []string, err error) {
	s, damaged, err := openStore(path, release, stateLayout)
	if err != nil {
		return nil, damaged, err
	}
	return &DB{s}, damaged, nil
}

// MachineID is the id of this host (machine-id(5)); "" where it has none.
func MachineID() (string, error) {
	b, err := os.ReadFile("/etc/machine-id")
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read machine id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// keyHost is a key of the meta bucket.
var keyHost = []byte("host") // machine id

// Claim records whose the file is: a host's, by its machine id. The error wraps [ErrForeign] if it is another's: a file
// system that was copied or moved brings mounts and presence on record that this host never had.
func (d *DB) Claim(host string) error {
	var owner []byte
	err := d.db.View(func(tx *bbolt.Tx) error {
		owner = bytes.Clone(tx.Bucket(bucketMeta).Get(keyHost))
		return nil
	})
	switch {
	case err != nil:
		return fmt.Errorf("state: read whose %s is: %w", d.path, err)
	case string(owner) == host:
		return nil
	case owner != nil:
		return fmt.Errorf("state: %s was written on the host with machine id %s, and this is %s: "+
			"move the file away to start with nothing on record (what is cached is then checked before it is used): %w", d.path, printable(owner), host, ErrForeign)
	}
	return d.update("record the host", func(tx *bbolt.Tx) error { return tx.Bucket(bucketMeta).Put(keyHost, []byte(host)) })
}

// RecordMount records a mount, its image, and that there may be an object for each of the image's blobs in the mount's domain, before
// anything is mounted or cached: a mount or a file nobody remembers would be worse than one that is remembered and is not there. What was
// being removed of them is no longer.
func (d *DB) RecordMount(m Mount, i Image) error {
	err := d.update("record mount "+m.Dir, func(tx *bbolt.Tx) error {
		defer crash.Point("state.record-mount.before-commit")
		return errors.Join(refer(tx, m, i), put(tx, bucketMounts, m.ID, m))
	})
	crash.Point("state.record-mount.after-commit")
	return err
}

// UpdateMount records anew what is on record about a mount, before it is made again.
func (d *DB) UpdateMount(m Mount) error {
	return d.update("record mount "+m.Dir, func(tx *bbolt.Tx) error { return put(tx, bucketMounts, m.ID, m) })
}

// ForgetMount removes a mount from the record, after it is gone. Forgetting one that is not there changes nothing.
func (d *DB) ForgetMount(id string) error {
	err := d.update("forget mount "+id, func(tx *bbolt.Tx) error {
		defer crash.Point("state.forget-mount.before-commit")
		return tx.Bucket(bucketMounts).Delete([]byte(id))
	})
	crash.Point("state.forget-mount.after-commit")
	return err
}

// Mounts returns the mounts on record, by id.
func (d *DB) Mounts() ([]Mount, error) { return list[Mount](d.store, bucketMounts) }

// Images returns the images on record, by digest.
func (d *DB) Images() ([]Image, error) { return list[Image](d.store, bucketImages) }

// RecordObject records that an object's presence was settled. Those of one mount come together, and share a transaction then.
func (d *DB) RecordObject(o Object) error {
	err := d.together("record object "+o.ID, func(tx *bbolt.Tx) error {
		defer crash.Point("state.settle-object.before-commit")
		return put(tx, bucketObjects, objectKey(o.Domain, o.ID), o)
	})
	crash.Point("state.settle-object.after-commit")
	return err
}

// StampObject records that all of an object was found right and has been synced: Boot, Table and Stamp of o. What else is on record of it
// stays.
func (d *DB) StampObject(o Object) error {
	return d.update("record object "+o.ID, func(tx *bbolt.Tx) error {
		return changeObject(tx, o.Domain, o.ID, func(known *Object) { known.Boot, known.Table, known.Stamp = o.Boot, o.Table, o.Stamp })
	})
}

// UseObjects records that a mount's use of objects, named by their ids, ends at a time.
func (d *DB) UseObjects(domain string, ids []string, at time.Time) error {
	return d.update("record when objects were last used", func(tx *bbolt.Tx) error {
		for _, id := range ids {
			if err := changeObject(tx, domain, id, func(o *Object) { o.Used = at }); err != nil {
				return err
			}
		}
		return nil
	})
}

// changeObject changes the record of an object, or makes one.
func changeObject(tx *bbolt.Tx, domain, id string, change func(*Object)) error {
	key := objectKey(domain, id)
	o := Object{Domain: domain, ID: id}
	if v := tx.Bucket(bucketObjects).Get([]byte(key)); v != nil {
		if err := decode(v, &o); err != nil {
			return err
		}
	}
	change(&o)
	return put(tx, bucketObjects, key, o)
}

// Object returns the record of an object; the zero Object when there is none.
func (d *DB) Object(domain, id string) (o Object, err error) {
	err = d.db.View(func(tx *bbolt.Tx) (err error) {
		o, _, err = get[Object](tx, bucketObjects, objectKey(domain, id))
		return err
	})
	if err != nil {
		err = fmt.Errorf("state: read object %s of %s: %w", id, domain, err)
	}
	return o, err
}
