package state

import (
	"fmt"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"go.etcd.io/bbolt"
)

// Those who come while a transaction is under way wait for it, and then share one: it is not one each.
func TestObjectsRecordedAtOnceShareATransaction(t *testing.T) {
	db := open1(t, filepath.Join(t.TempDir(), "state.db"))
	const n = 20
	var before int
	var wg sync.WaitGroup
	err := db.update("hold the others up", func(tx *bbolt.Tx) error {
		before = tx.ID()
		for i := range n {
			wg.Go(func() {
				if err := db.RecordObject(Object{Domain: "d", ID: fmt.Sprint(i)}); err != nil {
					t.Error(err)
				}
			})
		}
		for joined := 0; joined < n; runtime.Gosched() {
			db.mu.Lock()
			if db.next != nil {
				joined = len(db.next.parts)
			}
			db.mu.Unlock()
		}
		return nil
	})
	wg.Wait()
	if err != nil {
		t.Fatal(err)
	}
	if err := db.update("count", func(tx *bbolt.Tx) error {
		if got := tx.ID() - before; got != 2 {
			t.Errorf("%d transactions for %d objects, want 1", got-1, n)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if o, err := db.Object("d", fmt.Sprint(i)); err != nil || o.ID != fmt.Sprint(i) {
			t.Errorf("object %d: %+v, %v", i, o, err)
		}
	}
}

// Whoever comes after a file was closed is told, and so is the next.
func TestObjectsRecordedInAClosedFileAreErrors(t *testing.T) {
	db := open1(t, filepath.Join(t.TempDir(), "state.db"))
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := db.RecordObject(testObject); err == nil {
			t.Error("recorded in a closed file")
		}
	}
}
