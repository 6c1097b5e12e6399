package state

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"
	"pgregory.net/rapid"
)

func openSession(t testing.TB, path, boot string) *Session {
	t.Helper()
	s, damaged, err := OpenSession(path, boot, "1.0")
	if err != nil || len(damaged) != 0 {
		t.Fatalf("open session: %v, damaged %v", err, damaged)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

var (
	testHeld    = HeldObject{Name: "o0", Domain: "d", ID: "03", Size: 4, Handle: 5}
	testRequest = Request{Number: 9, Op: 2, Domain: "d", ID: "03", Handle: 5, Off: 4096, Len: 8192, Since: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)}
)

func fillSession(t testing.TB, s *Session) {
	t.Helper()
	if err := errors.Join(s.RecordObject(testHeld), s.SetPending([]Request{testRequest})); err != nil {
		t.Fatal(err)
	}
}

// wantSession compares all that is on record.
func wantSession(t *testing.T, s *Session, objects []HeldObject, pending []Request) {
	t.Helper()
	o, err := s.Objects()
	if diff := cmp.Diff(objects, o); diff != "" || err != nil {
		t.Errorf("objects (%v): %s", err, diff)
	}
	p, err := s.Pending()
	if diff := cmp.Diff(pending, p); diff != "" || err != nil {
		t.Errorf("pending (%v): %s", err, diff)
	}
}

func TestSessionSurvivesReopening(t *testing.T) {
	path := filepath.Join(t.TempDir(), "session.db")
	s := openSession(t, path, "boot-a")
	fillSession(t, s)
	s.Close()
	s = openSession(t, path, "boot-a")
	wantSession(t, s, []HeldObject{testHeld}, []Request{testRequest})
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v, want 0600", fi.Mode(), err)
	}
}

func TestSecondSessionIsToldWhoHasTheLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "session.db")
	openSession(t, path, "boot-a")
	_, _, err := OpenSession(path, "boot-a", "1.0")
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "--run") {
		t.Errorf("second open: %v, want ErrLocked and what to do", err)
	}
	if _, err := ReadSession(path); !errors.Is(err, ErrLocked) {
		t.Errorf("export: %v, want ErrLocked", err)
	}
}

func TestSessionOfAnotherBootIsReplacedAndIsNoDamage(t *testing.T) {
	for name, edit := range map[string]func(tx *bbolt.Tx) error{
		"as it is": func(tx *bbolt.Tx) error { return nil },
		"of a newer schema": func(tx *bbolt.Tx) error {
			_, err := tx.CreateBucket([]byte("later"))
			return errors.Join(err, tx.Bucket(bucketMeta).Put(keySchema, binary.BigEndian.AppendUint32(nil, 99)))
		},
		"with damaged records": func(tx *bbolt.Tx) error { return tx.Bucket(bucketHeld).Put([]byte("o7"), []byte{0}) },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "session.db")
			s := openSession(t, path, "boot-a")
			fillSession(t, s)
			s.Close()
			change(t, path, edit)
			s = openSession(t, path, "boot-b")
			wantSession(t, s, nil, nil)
			if n := s.FreeName(); n != "o0" {
				t.Errorf("first free name %q, want o0", n)
			}
			e, err := s.Export()
			if err != nil || e.Boot != "boot-b" || e.Schema != sessionLayout.schema() || len(e.Damaged) != 0 {
				t.Errorf("export %+v, %v", e, err)
			}
			if aside, _ := filepath.Glob(path + asideMark + "*"); len(aside) != 0 {
				t.Errorf("set aside as %v", aside)
			}
		})
	}
}

func TestNewerSessionIsRefusedWithTheReleaseToRun(t *testing.T) {
	for name, edit := range map[string]func(tx *bbolt.Tx) error{
		"schema": func(tx *bbolt.Tx) error {
			return tx.Bucket(bucketMeta).Put(keySchema, binary.BigEndian.AppendUint32(nil, sessionLayout.schema()+1))
		},
		"object": func(tx *bbolt.Tx) error { return tx.Bucket(bucketHeld).Put([]byte("o1"), []byte{valueVersion + 1}) },
		"request": func(tx *bbolt.Tx) error {
			return tx.Bucket(bucketPending).Put(place{number: 1}.key(), []byte{valueVersion + 1})
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "session.db")
			s := openSession(t, path, "boot-a")
			fillSession(t, s)
			s.Close()
			change(t, path, func(tx *bbolt.Tx) error {
				return errors.Join(tx.Bucket(bucketMeta).Put(keyRelease, []byte("9.1")), edit(tx))
			})
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for what, err := range map[string]error{"open": third(OpenSession(path, "boot-a", "1.0")), "export": second(ReadSession(path))} {
				if !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), "9.1") {
					t.Errorf("%s: %v, want ErrNewer and the release", what, err)
				}
			}
			if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
				t.Errorf("a refused file was changed (%v)", err)
			}
		})
	}
}

func third[T, U any](_ T, _ U, err error) error { return err }

func TestDamagedSessionRecordIsSetAsideAndTheRestKept(t *testing.T) {
	for name, key := range map[string][]byte{"objects": []byte("o1"), "pending": place{number: 1}.key(), "pending, short key": {1}} {
		bucket, _, _ := strings.Cut(name, ",")
		for _, v := range [][]byte{{}, {0}, {1, '{'}, []byte("\x01{\"name\":\"o8\",\"number\":8}")} {
			path := filepath.Join(t.TempDir(), "session.db")
			s := openSession(t, path, "boot-a")
			fillSession(t, s)
			s.Close()
			change(t, path, func(tx *bbolt.Tx) error { return tx.Bucket([]byte(bucket)).Put(key, v) })
			want := []DamagedRecord{{Bucket: bucket, Key: string(key), Value: v}}
			for _, reports := range []int{1, 0} { // as it lies there, and set aside
				e, err := ReadSession(path)
				if diff := cmp.Diff(want, e.Damaged, cmp.Comparer(func(a, b DamagedRecord) bool {
					return a.Bucket == b.Bucket && a.Key == b.Key && bytes.Equal(a.Value, b.Value)
				})); diff != "" || err != nil || len(e.Objects) != 1 || len(e.Pending) != 1 {
					t.Errorf("%s %q: export %+v (%v): %s", name, v, e, err, diff)
				}
				s, damaged, err := OpenSession(path, "boot-a", "1.0")
				if err != nil {
					t.Fatal(err)
				}
				wantSession(t, s, []HeldObject{testHeld}, []Request{testRequest})
				if len(damaged) != reports || reports == 1 && !strings.Contains(damaged[0], fmt.Sprintf("%s record %q", bucket, key)) {
					t.Errorf("%s %q: reported %v", name, v, damaged)
				}
				s.Close()
			}
		}
	}
}

func TestDamagedSessionFileIsSetAsideUnderAName(t *testing.T) {
	path := filepath.Join(t.TempDir(), "session.db")
	if err := os.WriteFile(path, []byte("this is no database"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, damaged, err := OpenSession(path, "boot-a", "1.0")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	aside, _ := filepath.Glob(path + asideMark + "*")
	if len(aside) != 1 || len(damaged) != 1 || !strings.Contains(damaged[0], aside[0]) {
		t.Errorf("set aside as %v, reported %v", aside, damaged)
	}
	fillSession(t, s)
}

func TestSettingWhatIsPendingAlreadyIsNoTransaction(t *testing.T) {
	s := openSession(t, filepath.Join(t.TempDir(), "session.db"), "boot-a")
	transactions := func() (id int) {
		if err := s.db.View(func(tx *bbolt.Tx) error { id = tx.ID(); return nil }); err != nil {
			t.Fatal(err)
		}
		return id
	}
	now := time.Now() // with the monotonic reading that a record has not
	list := []Request{{Number: 1, Since: now}, {Number: 2, Since: now}}
	for _, step := range []struct {
		list []Request
		want int
	}{{list, 1}, {list, 0}, {[]Request{list[1], list[0]}, 0}, {list[:1], 1}, {list[:1], 0}, {nil, 1}, {nil, 0}} {
		before := transactions()
		if err := s.SetPending(step.list); err != nil {
			t.Fatal(err)
		}
		if n := transactions() - before; n != step.want {
			t.Errorf("%d transactions for %v, want %d", n, step.list, step.want)
		}
	}
	if n := testing.AllocsPerRun(100, func() { s.SetPending(nil) }); n != 0 {
		t.Errorf("%v allocations where nothing changed", n)
	}
}

func TestFreeNamesAreShortAndNobodyElses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "session.db")
	s := openSession(t, path, "boot-a")
	names := map[string]bool{}
	length := 0
	for range 16384 {
		n := s.FreeName()
		if names[n] {
			t.Fatalf("%q twice", n)
		}
		names[n] = true
		length += len(n) + 1
	}
	// MAX_ARG_STRLEN, with room for the lifeline's and others' names
	if length > 128<<10-4096 {
		t.Errorf("16384 names are %d bytes", length)
	}
	if err := errors.Join(s.RecordObject(HeldObject{Name: "o5"}), s.RecordObject(HeldObject{Name: "cachefiles"}), s.RecordObject(HeldObject{Name: "o007"})); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.ForgetObject("o9"), s.ForgetObject("o3")); err != nil {
		t.Fatal(err)
	}
	if a, b, c := s.FreeName(), s.FreeName(), s.FreeName(); a != "o3" || b != "o9" || c != nameOf(16384) {
		t.Errorf("after forgetting o9 and o3: %s, %s, %s", a, b, c)
	}
	if err := s.RecordObject(HeldObject{}); err == nil {
		t.Error("an object without a name was recorded")
	}
	s.Close()
	s = openSession(t, path, "boot-a")
	for i := range uint64(7) {
		if want := nameOf(i + i/5); s.FreeName() != want {
			t.Errorf("after reopening, with o5 on record: want %s", want)
		}
	}
}

// TestSessionIsAMap compares the session with maps, over random calls and reopenings.
func TestSessionIsAMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp("/dev/shm", "state")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		m := &sessionModel{path: filepath.Join(dir, "session.db"), objects: map[string]HeldObject{}, taken: map[string]bool{}}
		m.open(t)
		defer func() { m.s.Close() }()
		t.Repeat(map[string]func(*rapid.T){"": m.check, "record": m.record, "forget": m.forget, "pending": m.setPending, "reopen": m.reopen})
	})
}

type sessionModel struct {
	path    string
	s       *Session
	objects map[string]HeldObject
	taken   map[string]bool
	pending []Request
}

func (m *sessionModel) open(t *rapid.T) {
	s, damaged, err := OpenSession(m.path, "boot-a", "1.0")
	if err != nil || len(damaged) != 0 {
		t.Fatalf("open: %v, damaged %v", err, damaged)
	}
	m.s = s
}

func (m *sessionModel) reopen(t *rapid.T) {
	if err := m.s.Close(); err != nil {
		t.Fatal(err)
	}
	m.taken = map[string]bool{}
	for name := range m.objects {
		m.taken[name] = true
	}
	m.open(t)
}

func (m *sessionModel) record(t *rapid.T) {
	name := m.s.FreeName()
	least := 0
	for m.taken[nameOf(uint64(least))] {
		least++
	}
	if name != nameOf(uint64(least)) {
		t.Fatalf("free name %s, want %s", name, nameOf(uint64(least)))
	}
	m.taken[name] = true
	if rapid.Bool().Draw(t, "only the name") {
		return
	}
	o := HeldObject{Name: name, Domain: rapid.String().Draw(t, "domain"), ID: rapid.String().Draw(t, "id"), Size: rapid.Int64().Draw(t, "size"), Handle: rapid.Uint32().Draw(t, "handle")}
	if err := m.s.RecordObject(o); err != nil {
		t.Fatal(err)
	}
	m.objects[name] = o
}

func (m *sessionModel) forget(t *rapid.T) {
	name := nameOf(rapid.Uint64Range(0, 40).Draw(t, "name"))
	if err := m.s.ForgetObject(name); err != nil {
		t.Fatal(err)
	}
	delete(m.objects, name)
	delete(m.taken, name)
}

func (m *sessionModel) setPending(t *rapid.T) {
	request := rapid.Custom(func(t *rapid.T) Request {
		return Request{
			Number: rapid.OneOf(rapid.Uint64Range(0, 20), rapid.Uint64()).Draw(t, "number"), Op: rapid.Byte().Draw(t, "op"), ID: rapid.String().Draw(t, "id"),
			Off: rapid.Int64Range(0, 2).Draw(t, "off"), Len: rapid.Int64().Draw(t, "len"), Since: time.Unix(rapid.Int64Range(0, 1<<33).Draw(t, "since"), 0).UTC(),
		}
	})
	list := rapid.SliceOfNDistinct(request, 0, 20, func(r Request) uint64 { return r.Number }).Draw(t, "list")
	for _, r := range m.pending { // some of what was
		if !slices.ContainsFunc(list, func(l Request) bool { return l.Number == r.Number }) && rapid.Bool().Draw(t, "keep") {
			list = append(list, r)
		}
	}
	if err := m.s.SetPending(list); err != nil {
		t.Fatal(err)
	}
	m.pending = list
}

func (m *sessionModel) check(t *rapid.T) {
	objects, err1 := m.s.Objects()
	pending, err2 := m.s.Pending()
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	want := slices.SortedFunc(maps.Values(m.objects), func(a, b HeldObject) int { return strings.Compare(a.Name, b.Name) })
	if diff := cmp.Diff(want, objects); diff != "" {
		t.Fatalf("objects: %s", diff)
	}
	slices.SortFunc(m.pending, func(a, b Request) int {
		return bytes.Compare(place{number: a.Number}.key(), place{number: b.Number}.key())
	})
	if !slices.Equal(m.pending, pending) {
		t.Fatalf("pending: %s", cmp.Diff(m.pending, pending))
	}
}

func BenchmarkSetPending(b *testing.B) {
	s := openSession(b, filepath.Join(tmpfs(b), "session.db"), "boot-a")
	now := time.Now()
	id := strings.Repeat("0123456789abcdef", 4)
	for _, n := range []int{16, 1000} {
		list := make([]Request, n)
		for what, fresh := range map[string]int{"nothing changed": 0, "a tenth is new": (n + 9) / 10, "all are new": n} {
			b.Run(fmt.Sprintf("%d requests, %s", n, what), func(b *testing.B) {
				b.ReportAllocs()
				for round := 0; b.Loop(); round++ {
					for i := range list {
						list[i] = Request{Number: uint64(round*fresh + i), Op: 2, Domain: "default", ID: id, Off: 4096, Len: 128 << 10, Since: now}
					}
					if err := s.SetPending(list); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

func BenchmarkRecordObject(b *testing.B) {
	s := openSession(b, filepath.Join(tmpfs(b), "session.db"), "boot-a")
	for b.Loop() {
		if err := s.RecordObject(HeldObject{Name: s.FreeName(), Domain: "default", ID: strings.Repeat("0123456789abcdef", 4)}); err != nil {
			b.Fatal(err)
		}
	}
}

func TestPartsOfOneNumberAreKeptApart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "session.db")
	want := []Request{{Number: 7, ID: "a"}, {Number: 7, Part: 1, ID: "b"}, {Number: 8, ID: "c"}}
	for _, list := range [][]Request{want, want[:2], want[1:], want} {
		s, _, err := OpenSession(path, "boot", "r")
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SetPending(list); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if s, _, err = OpenSession(path, "boot", "r"); err != nil {
			t.Fatal(err)
		}
		got, err := s.Pending()
		if err := errors.Join(err, s.Close()); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(list, got); diff != "" {
			t.Errorf("on record (-want +got):\n%s", diff)
		}
	}
}
