package state

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write this release's files to testdata, where there are none")

// TestFilesOfEveryReleaseAreRead opens files as releases wrote them, each named by its schema. A release that writes another schema
// adds its own and keeps these.
func TestFilesOfEveryReleaseAreRead(t *testing.T) {
	state := filepath.Join("testdata", fmt.Sprintf("state-schema%d.db", stateLayout.schema()))
	session := filepath.Join("testdata", fmt.Sprintf("session-schema%d.db", sessionLayout.schema()))
	inbox := filepath.Join("testdata", fmt.Sprintf("inbox-layout%d", inboxVersion))
	if *update {
		writeGolden(t, state, session, inbox)
	}
	for _, path := range []string{state, session, inbox} {
		if _, err := os.Stat(path); err != nil {
			t.Errorf("%v: go test -run %s ./state -update", err, t.Name())
		}
	}
	dir := t.TempDir()
	for _, path := range glob(t, "testdata/state-*.db") {
		db := open1(t, copyFile(t, path, filepath.Join(dir, "state.db")))
		e, err := db.Export()
		want := StateExport{Origin: Origin{Schema: stateLayout.schema(), Release: "1.0"}, Mounts: []Mount{testMount}, Images: []Image{testImage}, Objects: []Object{testObject}}
		if filepath.Base(path) == "state-schema1.db" { // which knows no blobs, and no sizes
			want.Images[0].Blobs, want.Objects[0].Size = nil, 0
		}
		if diff := cmp.Diff(want, e); diff != "" || err != nil {
			t.Errorf("%s (%v): %s", path, err, diff)
		}
		db.Close()
	}
	for _, path := range glob(t, "testdata/session-*.db") {
		s := openSession(t, copyFile(t, path, filepath.Join(dir, "session.db")), "boot-a")
		e, err := s.Export()
		want := SessionExport{
			Origin:  Origin{Schema: sessionLayout.schema(), Release: "1.0", Boot: "boot-a"},
			Objects: []HeldObject{testHeld}, Pending: []Request{testRequest},
		}
		if diff := cmp.Diff(want, e); diff != "" || err != nil {
			t.Errorf("%s (%v): %s", path, err, diff)
		}
		s.Close()
	}
	for _, path := range glob(t, "testdata/inbox-*") {
		copyFile(t, path, filepath.Join(dir, "inbox", "1-x"))
		boxes, damaged, err := ReadInboxes(filepath.Join(dir, "inbox"), "boot-a", "cachefiles")
		if err != nil || len(damaged) != 0 || len(boxes) != 1 || boxes[0].Header != testHeader {
			t.Fatalf("%s: %+v, damaged %v, %v", path, boxes, damaged, err)
		}
		if m := boxes[0].Messages; len(m) != 2 || len(m[0]) != 100 || !bytes.HasPrefix(m[0], []byte("a\x00")) || !bytes.HasPrefix(m[1], []byte("c\x00")) {
			t.Errorf("%s: messages %q", path, m)
		}
		if err := boxes[0].Remove(); err != nil {
			t.Error(err)
		}
	}
}

// writeGolden writes the files that are not there: what a release wrote does not change.
func writeGolden(t *testing.T, state, session, inbox string) {
	t.Helper()
	missing := func(path string) bool {
		_, err := os.Stat(path)
		return err != nil
	}
	if missing(state) {
		db := open1(t, state)
		fill(t, db)
		db.Close()
	}
	if missing(session) {
		s := openSession(t, session, "boot-a")
		fillSession(t, s)
		s.Close()
	}
	if missing(inbox) {
		if err := os.WriteFile(inbox, deadInbox(t), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

func copyFile(t *testing.T, from, to string) string {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = errors.Join(os.MkdirAll(filepath.Dir(to), 0o700), os.WriteFile(to, b, 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
	return to
}
