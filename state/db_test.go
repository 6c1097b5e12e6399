package state

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"
)

func open1(t testing.TB, path string) *DB {
	t.Helper()
	db, damaged, err := Open(path, "1.0")
	if err != nil || len(damaged) != 0 {
		t.Fatalf("open: %v, damaged %v", err, damaged)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

var (
	testMount = Mount{
		ID: "mount-a", Image: "sha256:01", Ref: "oci:/x:y", Dir: "/mnt", Domain: "d", Bootstrap: "02", Prefetch: true,
		PrefetchBPS: 7, Created: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
	}
	testImage  = Image{Digest: "sha256:01", Ref: "oci:/x:y", Size: 8, Created: testMount.Created, Blobs: []Blob{{ID: "03", Size: 4096}}, Domains: []string{"d"}}
	testObject = Object{Domain: "d", ID: "03", Boot: "b", Table: "t", Size: 4096}
)

// fill puts one record of each kind in.
func fill(t testing.TB, db *DB) {
	t.Helper()
	if err := errors.Join(db.RecordMount(testMount, testImage), db.RecordObject(testObject)); err != nil {
		t.Fatal(err)
	}
}

func TestRecordsSurviveReopening(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	db := open1(t, path)
	fill(t, db)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	db = open1(t, path)
	mounts, err := db.Mounts()
	if diff := cmp.Diff([]Mount{testMount}, mounts); diff != "" || err != nil {
		t.Errorf("mounts (%v): %s", err, diff)
	}
	images, err := db.Images()
	if diff := cmp.Diff([]Image{testImage}, images); diff != "" || err != nil {
		t.Errorf("images (%v): %s", err, diff)
	}
	if o, err := db.Object("d", "03"); o != testObject || err != nil {
		t.Errorf("object %+v, %v", o, err)
	}
	if o, err := db.Object("other", "03"); o != (Object{}) || err != nil {
		t.Errorf("object of another domain: %+v, %v", o, err)
	}
	if err := errors.Join(db.ForgetMount("mount-a"), db.ForgetMount("mount-a")); err != nil {
		t.Error(err)
	}
	if mounts, err := db.Mounts(); len(mounts) != 0 || err != nil {
		t.Errorf("mounts after forgetting: %v, %v", mounts, err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v, want 0600", fi.Mode(), err)
	}
}

func TestSecondOpenIsToldWhoHasTheLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	open1(t, path)
	_, _, err := Open(path, "1.0")
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "--root") {
		t.Errorf("second open: %v, want ErrLocked and what to do", err)
	}
}

// change edits a closed file through bbolt.
func change(t *testing.T, path string, f func(tx *bbolt.Tx) error) {
	t.Helper()
	b, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(b.Update(f), b.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestNewerSchemaIsRefusedWithTheReleaseToRun(t *testing.T) {
	for name, edit := range map[string]func(tx *bbolt.Tx) error{
		"schema": func(tx *bbolt.Tx) error {
			return tx.Bucket(bucketMeta).Put(keySchema, binary.BigEndian.AppendUint32(nil, stateLayout.schema()+1))
		},
		"record": func(tx *bbolt.Tx) error {
			return tx.Bucket(bucketMounts).Put([]byte("mount-a"), []byte{valueVersion + 1, 1, 2, 3})
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "state.db")
			db := open1(t, path)
			fill(t, db)
			db.Close()
			change(t, path, func(tx *bbolt.Tx) error {
				return errors.Join(tx.Bucket(bucketMeta).Put(keyRelease, []byte("9.1")), edit(tx))
			})
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			_, _, err = Open(path, "1.0")
			if !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), "9.1") {
				t.Errorf("open: %v, want ErrNewer and the release", err)
			}
			after, err := os.ReadFile(path)
			if err != nil || !bytes.Equal(before, after) {
				t.Errorf("a refused file was changed (%v)", err)
			}
		})
	}
}

func TestDamagedRecordIsSetAsideAndTheRestKept(t *testing.T) {
	for name, v := range map[string][]byte{
		"empty": {}, "version 0": {0, '{', '}'}, "not JSON": {1, '{'}, "wrong type": []byte("\x01[1]"), "other key": []byte("\x01{\"id\":\"mount-z\"}"),
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "state.db")
			db := open1(t, path)
			fill(t, db)
			db.Close()
			change(t, path, func(tx *bbolt.Tx) error { return tx.Bucket(bucketMounts).Put([]byte("mount-b"), v) })
			db, damaged, err := Open(path, "1.0")
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			if len(damaged) != 1 || !strings.Contains(damaged[0], "mount-b") {
				t.Errorf("damaged: %v, want one that names the record", damaged)
			}
			if mounts, err := db.Mounts(); len(mounts) != 1 || err != nil {
				t.Errorf("mounts %v, %v, want the sound one", mounts, err)
			}
			if err := db.db.View(func(tx *bbolt.Tx) error {
				if got := tx.Bucket(bucketDamaged).Get([]byte("mounts\x00mount-b")); !bytes.Equal(got, v) {
					t.Errorf("set aside: %q, want %q", got, v)
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestDamagedFileIsSetAsideUnderAName(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 1))
	for name, damage := range map[string]func(b []byte) []byte{
		"text":       func([]byte) []byte { return []byte("this is no database") },
		"zeros":      func(b []byte) []byte { return make([]byte, len(b)) },
		"meta pages": func(b []byte) []byte { b[20]++; b[4096+20]++; return b },
		"short":      func(b []byte) []byte { return b[:8192+100] },
		"pages": func(b []byte) []byte {
			for i := 2 * 4096; i < len(b); i++ {
				b[i] = byte(rng.Uint32())
			}
			return b
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "state.db")
			db := open1(t, path)
			fill(t, db)
			db.Close()
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			b = damage(b)
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			db, damaged, err := Open(path, "1.0")
			if err != nil {
				t.Fatalf("seed %d: open: %v", seed, err)
			}
			defer db.Close()
			aside, err := filepath.Glob(path + ".damaged-*")
			if err != nil || len(aside) != 1 || len(damaged) != 1 || !strings.Contains(damaged[0], aside[0]) {
				t.Fatalf("seed %d: set aside as %v, reported %v (%v)", seed, aside, damaged, err)
			}
			if kept, err := os.ReadFile(aside[0]); err != nil || !bytes.Equal(kept, b) {
				t.Errorf("seed %d: what was set aside is not the damaged file (%v)", seed, err)
			}
			fill(t, db)
		})
	}
}

// FuzzOpen damages one place of a sound file: Open gives a database that works, or an error, and never panics.
func FuzzOpen(f *testing.F) {
	path := filepath.Join(f.TempDir(), "state.db")
	db := open1(f, path)
	fill(f, db)
	db.Close()
	sound, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint32(16), []byte{1, 2, 3}) // the first page's header
	f.Add(uint32(4096+24), []byte{9})  // the second meta page
	f.Add(uint32(3*4096+10), []byte{0xff, 0xff})
	f.Fuzz(func(t *testing.T, at uint32, p []byte) {
		path := filepath.Join(t.TempDir(), "state.db")
		b := bytes.Clone(sound)
		copy(b[int(at)%len(b):], p)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		db, _, err := Open(path, "1.0")
		if err != nil {
			return
		}
		defer db.Close()
		for _, err := range []error{second(db.Mounts()), second(db.Images()), second(db.Object("d", "03"))} {
			if err != nil {
				t.Errorf("opened, and then: %v", err)
			}
		}
	})
}

func second[T any](_ T, err error) error { return err }

func TestStateOfAnotherHostIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	claim := func(host string) error {
		d, _, err := Open(path, "r")
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		return d.Claim(host)
	}
	for _, host := range []string{"a", "a"} {
		if err := claim(host); err != nil {
			t.Fatalf("the host's own: %v", err)
		}
	}
	if err := claim("b"); !errors.Is(err, ErrForeign) {
		t.Fatalf("another host's: %v, want ErrForeign", err)
	}
	if err := claim("a"); err != nil {
		t.Fatalf("after the refusal: %v", err)
	}
}
