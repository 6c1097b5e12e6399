package state

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.etcd.io/bbolt"
)

func TestExportIsAllThatIsOnRecordAndChangesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	db := open1(t, path)
	fill(t, db)
	db.Close()
	change(t, path, func(tx *bbolt.Tx) error { return tx.Bucket(bucketMounts).Put([]byte("mount-b"), []byte{1, '{'}) })
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := StateExport{
		Origin: Origin{Schema: stateLayout.schema(), Release: "1.0"}, Mounts: []Mount{testMount}, Images: []Image{testImage}, Objects: []Object{testObject},
		Damaged: []DamagedRecord{{Bucket: "mounts", Key: "mount-b", Value: []byte{1, '{'}}},
	}
	e, err := ReadState(path)
	if diff := cmp.Diff(want, e, cmpopts.IgnoreUnexported(DamagedRecord{})); diff != "" || err != nil {
		t.Errorf("export of a closed file (%v): %s", err, diff)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("export changed the file (%v)", err)
	}
	db, _, err = Open(path, "1.0")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	e, err = db.Export()
	if diff := cmp.Diff(want, e, cmpopts.IgnoreUnexported(DamagedRecord{})); diff != "" || err != nil {
		t.Errorf("export of an open file (%v): %s", err, diff)
	}
	if _, err := ReadState(path); !errors.Is(err, ErrLocked) {
		t.Errorf("export of a file that a process has open: %v, want ErrLocked", err)
	}
}

func TestExportOfNoFileMakesNone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	if _, err := ReadState(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("export: %v", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file was made (%v)", err)
	}
}

func TestExportOfADamagedFileIsAnErrorAndLeavesIt(t *testing.T) {
	path := filepath.Join(t.TempDir(), "session.db")
	for name, b := range map[string][]byte{"text": []byte("this is no database"), "zeros": make([]byte, 16384), "short": soundFiles(t)["session.db"][:20000]} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadSession(path); err == nil || errors.Is(err, ErrNewer) {
			t.Errorf("%s: export: %v", name, err)
		}
		if after, err := os.ReadFile(path); err != nil || !bytes.Equal(b, after) {
			t.Errorf("%s: export changed the file (%v)", name, err)
		}
	}
}
