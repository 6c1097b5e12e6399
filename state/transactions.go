package state

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"go.etcd.io/bbolt"
)

// BootID is the id of this boot of the host (/proc/sys/kernel/random/boot_id).
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// RecordMount records a mount and its image, before anything is mounted: a mount nobody remembers would be worse than
// one that is remembered and is not there.
func (d *DB) RecordMount(m Mount, i Image) error {
	return d.update("record mount "+m.Dir, func(tx *bbolt.Tx) error {
		return errors.Join(put(tx, bucketImages, i.Digest, i), put(tx, bucketMounts, m.ID, m))
	})
}

// ForgetMount removes a mount from the record, after it is gone. Forgetting one that is not there changes nothing.
func (d *DB) ForgetMount(id string) error {
	return d.update("forget mount "+id, func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketMounts).Delete([]byte(id))
	})
}

// Mounts returns the mounts on record, by id.
func (d *DB) Mounts() ([]Mount, error) { return list[Mount](d, bucketMounts) }

// Images returns the images on record, by digest.
func (d *DB) Images() ([]Image, error) { return list[Image](d, bucketImages) }

// RecordObject records that an object's presence was settled.
func (d *DB) RecordObject(o Object) error {
	return d.update("record object "+o.ID, func(tx *bbolt.Tx) error {
		return put(tx, bucketObjects, objectKey(o.Domain, o.ID), o)
	})
}

// Object returns the record of an object; the zero Object when there is none.
func (d *DB) Object(domain, id string) (o Object, err error) {
	err = d.db.View(func(tx *bbolt.Tx) error {
		v := tx.Bucket(bucketObjects).Get([]byte(objectKey(domain, id)))
		if v == nil {
			return nil
		}
		return decode(v, &o)
	})
	if err != nil {
		err = fmt.Errorf("state: read object %s of %s: %w", id, domain, err)
	}
	return o, err
}

func (d *DB) update(what string, f func(*bbolt.Tx) error) error {
	if err := d.db.Update(f); err != nil {
		return fmt.Errorf("state: %s: %w", what, err)
	}
	return nil
}

func put(tx *bbolt.Tx, bucket []byte, key string, v any) error {
	b, err := encode(v)
	if err != nil {
		return err
	}
	return tx.Bucket(bucket).Put([]byte(key), b)
}

func list[T any](d *DB, bucket []byte) (all []T, err error) {
	err = d.db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucket).ForEach(func(_, v []byte) error {
			var t T
			if err := decode(v, &t); err != nil {
				return err
			}
			all = append(all, t)
			return nil
		})
	})
	if err != nil {
		err = fmt.Errorf("state: read %s: %w", bucket, err)
	}
	return all, err
}
