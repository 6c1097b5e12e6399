package state

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// soundFiles are a state.db and a session.db that have every kind of page: branches, leaves, a free list, buckets inside pages.
func soundFiles(t testing.TB) map[string][]byte {
	t.Helper()
	dir := t.TempDir()
	db, _, err := Open(filepath.Join(dir, "state.db"), "1.0")
	if err != nil {
		t.Fatal(err)
	}
	fill(t, db)
	s := openSession(t, filepath.Join(dir, "session.db"), "boot-a")
	if err := s.RecordObject(HeldObject{Name: "o0", Domain: "d", ID: "03", Size: 4, Handle: 5}); err != nil {
		t.Fatal(err)
	}
	var list []Request
	for i := range uint64(60) {
		list = append(list, Request{Number: i, Op: 2, Domain: "d", ID: "03", Off: 4096, Len: 8192, Since: time.Unix(int64(i), 0).UTC()})
	}
	// Twice, so that there are pages to be free.
	if err := errors.Join(s.SetPending(list[:40]), s.SetPending(list)); err != nil {
		t.Fatal(err)
	}
	if err := db.update("fill", func(tx *bbolt.Tx) error {
		for i := range 60 {
			o := Object{Domain: "d", ID: fmt.Sprintf("%064d", i), Boot: "b", Table: "t"}
			if err := put(tx, bucketObjects, objectKey(o.Domain, o.ID), o); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for _, name := range []string{"state.db", "session.db"} {
		if files[name], err = os.ReadFile(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// use opens a file and reads and writes all kinds of records. What it could not open at all it returns.
func use(path string) error {
	if strings.HasSuffix(path, "state.db") {
		db, _, err := Open(path, "1.0")
		if err != nil {
			return err
		}
		_, err = db.Export()
		return errors.Join(err, db.RecordMount(testMount, testImage), db.RecordObject(testObject), db.ForgetMount(testMount.ID), db.Close())
	}
	s, _, err := OpenSession(path, "boot-a", "1.0")
	if err != nil {
		return err
	}
	_, err = s.Export()
	o := HeldObject{Name: s.FreeName(), ID: "04"}
	return errors.Join(err, s.RecordObject(o), s.ForgetObject(o.Name), s.SetPending([]Request{{Number: 7}}), s.SetPending(nil), s.Close())
}

// useDamaged writes a damaged file, uses it, and says what broke the rule: a store that works, or an error, within a second.
func useDamaged(t *testing.T, name string, b []byte, what string) {
	t.Helper()
	dir := tmpfs(t)
	defer os.RemoveAll(dir) // thousands of them at once would fill the memory
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	err := use(path)
	if d := time.Since(start); d > time.Second {
		t.Errorf("%s: took %v", what, d)
	}
	if err != nil && !errors.Is(err, ErrNewer) {
		t.Errorf("%s: %v", what, err)
	}
}

func TestEveryFlippedBitGivesAStoreThatWorksOrAnError(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 1))
	for name, sound := range soundFiles(t) {
		t.Run(name, func(t *testing.T) {
			flip := func(at, bit int) {
				b := bytes.Clone(sound)
				b[at] ^= 1 << bit
				useDamaged(t, name, b, fmt.Sprintf("seed %d: bit %d of byte %d flipped", seed, bit, at))
			}
			for page := 0; page < len(sound); page += 4096 {
				for range 4 {
					flip(page+8+rng.IntN(8), rng.IntN(8)) // flags, count, overflow
					flip(page+rng.IntN(96), rng.IntN(8))  // header and first entries
					flip(page+rng.IntN(4096), rng.IntN(8))
				}
			}
		})
	}
}

// bbolt takes such a page, and panics when it removes something below it.
func TestBranchWithOnePageBelowItIsDamage(t *testing.T) {
	found := 0
	for name, sound := range soundFiles(t) {
		for page := 0; page+pageHeader <= len(sound); page += 4096 {
			if flags, n := flagsAndCount(sound[page:]); flags != flagBranch || n < 2 {
				continue
			}
			b := bytes.Clone(sound)
			binary.NativeEndian.PutUint16(b[page+10:], 1)
			if isDamage(checkPages(bytes.NewReader(b), int64(len(b)))) { // else it is a page that is not used any more
				found++
			}
			useDamaged(t, name, b, fmt.Sprintf("page %d has one page below it", page/4096))
		}
	}
	if found == 0 {
		t.Error("of no file with a branch is that damage")
	}
}

func TestEveryTruncationGivesAStoreThatWorksOrAnError(t *testing.T) {
	for name, sound := range soundFiles(t) {
		for n := 0; n < len(sound); n += 1000 {
			useDamaged(t, name, sound[:n], fmt.Sprintf("%s cut to %d bytes", name, n))
		}
	}
}

// metaPage is where the meta page in use lies, and the file's parts are found from it.
func metaPage(t *testing.T, b []byte) []byte {
	t.Helper()
	m, m2 := b[16:16+64], b[4096+16:4096+16+64]
	if u64(m2, 48) > u64(m, 48) {
		return m2
	}
	return m
}

// seal gives a meta page its checksum.
func seal(m []byte) {
	sum := fnv.New64a()
	sum.Write(m[:56])
	binary.NativeEndian.PutUint64(m[56:], sum.Sum64())
}

func TestPagesThatBboltWouldNotSurviveAreDamage(t *testing.T) {
	set32 := func(p []byte, at int, v uint32) { binary.NativeEndian.PutUint32(p[at:], v) }
	set64 := func(p []byte, at int, v uint64) { binary.NativeEndian.PutUint64(p[at:], v) }
	branch := func(b []byte) (page []byte) {
		for at := 2 * 4096; at < len(b); at += 4096 {
			if flags, n := flagsAndCount(b[at:]); flags == flagBranch && n > 1 && u64(b[at:], 0) == uint64(at/4096) {
				page = b[at : at+4096]
			}
		}
		return page
	}
	for what, edit := range map[string]func(b, m []byte){
		"cycle":               func(b, m []byte) { p := branch(b); set64(p, 16+8, u64(p, 0)) },
		"two ways to a page":  func(b, m []byte) { p := branch(b); set64(p, 16+8, u64(p, 32+8)) },
		"branch says another": func(b, m []byte) { p := b[4096*u64(branch(b), 16+8):]; set32(p, 16+8, uint32(u32(p, 16+8))+1) },
		"page of billions":    func(b, m []byte) { set32(branch(b), 12, math.MaxUint32) },
		"free page in use":    func(b, m []byte) { p := b[4096*u64(m, 32):]; p[10] = 1; set64(p, 16, u64(m, 16)) },
		"free list of 2^60":   func(b, m []byte) { p := b[4096*u64(m, 32):]; p[10], p[11] = 255, 255; set64(p, 16, 1<<60) },
		"2^60 pages":          func(b, m []byte) { set64(m, 40, 1<<60) },
		"pages of 0 bytes":    func(b, m []byte) { set32(m, 8, 0) },
		"pages of 3000 bytes": func(b, m []byte) { set32(m, 8, 3000) },
		"root beyond the end": func(b, m []byte) { set64(m, 16, u64(m, 40)-1<<40) },
		"root is a meta page": func(b, m []byte) { set64(m, 16, 1) },
	} {
		for name, sound := range soundFiles(t) {
			b := bytes.Clone(sound)
			m := metaPage(t, b)
			edit(b, m)
			seal(m)
			if err := checkPages(bytes.NewReader(b), int64(len(b))); !isDamage(err) {
				t.Errorf("%s of %s: %v, want damage", what, name, err)
				continue
			}
			useDamaged(t, name, b, what)
		}
	}
}

func TestFreeListThatEndsBehindItsPageIsDamage(t *testing.T) {
	f := &boltFile{page: 64, pages: 20, used: make([]bool, 20)}
	b := make([]byte, 20*64)
	p := b[2*64:]
	p[0], p[8], p[10] = 2, flagFreelist, 7
	for i := range 6 {
		p[pageHeader+8*i] = byte(10 + i)
	}
	p[64] = 18 // where the seventh would be
	f.r = bytes.NewReader(b)
	if err := f.freelist(2); !isDamage(err) {
		t.Errorf("7 ids in a page that has room for 6: %v", err)
	}
}

func TestBucketAmongTheRecordsIsDamage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "session.db")
	s := openSession(t, path, "boot-a")
	fillSession(t, s)
	s.Close()
	change(t, path, func(tx *bbolt.Tx) error {
		_, err := tx.Bucket(bucketHeld).CreateBucket([]byte("o1"))
		return err
	})
	s, damaged, err := OpenSession(path, "boot-a", "1.0")
	if err != nil || len(damaged) != 1 {
		t.Fatalf("open: %v, damaged %v", err, damaged)
	}
	defer s.Close()
	wantSession(t, s, nil, nil)
}

// TestPagesThatBboltWroteAreSound fills and empties a bucket at random: pages split, merge, move and overflow.
func TestPagesThatBboltWroteAreSound(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 1))
	path := filepath.Join(tmpfs(t), "state.db")
	db := open1(t, path)
	for round := range 120 {
		if err := db.update("test", func(tx *bbolt.Tx) (err error) {
			b := tx.Bucket(bucketObjects)
			grows := round/20%2 == 0
			for range rng.IntN(200) {
				key := fmt.Appendf(nil, "%0*d", 1+rng.IntN(100), rng.IntN(1000))
				if grows == (rng.IntN(5) > 0) {
					err = errors.Join(err, b.Put(key, make([]byte, rng.IntN(1<<rng.IntN(13)))))
				} else if k, _ := b.Cursor().Seek(key); k != nil {
					err = errors.Join(err, b.Delete(k))
				}
			}
			return err
		}); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		b, err := os.ReadFile(path)
		if err == nil {
			err = checkPages(bytes.NewReader(b), int64(len(b)))
		}
		if err != nil {
			t.Fatalf("seed %d, round %d: %v", seed, round, err)
		}
	}
}

// tmpfs is a directory where syncing costs nothing, which is where most of the time would go.
func tmpfs(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "state")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestDamageLeaksNoDescriptor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	before := descriptors(t)
	for range 3 {
		if err := os.WriteFile(path, []byte("this is no database"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := use(path); err != nil {
			t.Fatal(err)
		}
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// opens is how many descriptors this process has of a file.
func opens(t *testing.T, path string) (n int) {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil && to == path {
			n++
		}
	}
	return n
}

// withMigration is state.db's layout in a release after this one.
func withMigration(m func(*bbolt.Tx) error) layout {
	l := stateLayout
	l.migrations = append(l.migrations[:len(l.migrations):len(l.migrations)], m)
	return l
}

func TestMigrationIsOneTransaction(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	db := open1(t, path)
	fill(t, db)
	db.Close()
	rename := func(tx *bbolt.Tx) error {
		m := testMount
		m.Ref = "moved forward"
		return put(tx, bucketMounts, m.ID, m)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	halfway := errors.New("halfway")
	_, _, err = openStore(path, "2.0", withMigration(func(tx *bbolt.Tx) error { return errors.Join(rename(tx), halfway) }))
	if !errors.Is(err, halfway) {
		t.Fatalf("migration that fails: %v", err)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("it changed the file (%v)", err)
	}
	s, _, err := openStore(path, "2.0", withMigration(rename))
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := (&DB{s}).Mounts()
	if err != nil || len(mounts) != 1 || mounts[0].Ref != "moved forward" {
		t.Errorf("migrated mounts %v, %v", mounts, err)
	}
	s.Close()
	if _, _, err := Open(path, "1.0"); !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), "2.0") {
		t.Errorf("this release: %v, want ErrNewer and the release", err)
	}
	again := func(*bbolt.Tx) error { return errors.New("migrated twice") }
	s, _, err = openStore(path, "2.0", withMigration(again))
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}

func TestFileSetAsideByTheLastHolderOfTheLockIsNotTheOneOpened(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	db := open1(t, path)
	opened := make(chan error)
	go func() {
		db, _, err := Open(path, "1.0")
		if err == nil {
			err = errors.Join(db.RecordMount(testMount, testImage), db.Close())
		}
		opened <- err
	}()
	for deadline := time.Now().Add(10 * time.Second); opens(t, path) < 2; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("the second open does not wait for the lock")
		}
	}
	if _, err := setAside(path); err != nil {
		t.Fatal(err)
	}
	db.Close()
	if err := <-opened; err != nil {
		t.Fatal(err)
	}
	e, err := ReadState(path)
	if err != nil || len(e.Mounts) != 1 {
		t.Errorf("the file that has the name has mounts %v (%v), want what was recorded", e.Mounts, err)
	}
}

// FuzzRecord decodes a value as each kind of record: a value that is encoded to the same again, or an error.
func FuzzRecord(f *testing.F) {
	for _, v := range []any{testMount, testImage, testObject, testHeld, testRequest} {
		b, err := encode(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte{valueVersion + 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		again[Mount](t, b)
		again[Image](t, b)
		again[Object](t, b)
		again[HeldObject](t, b)
		again[Request](t, b)
	})
}

func again[T any](t *testing.T, b []byte) {
	var v, v2 T
	if decode(b, &v) != nil {
		return
	}
	e, err := encode(v)
	if err == nil {
		err = decode(e, &v2)
	}
	e2, err2 := encode(v2)
	if err != nil || err2 != nil || !bytes.Equal(e, e2) {
		t.Errorf("%q became %q and then %q (%v, %v)", b, e, e2, err, err2)
	}
}

func TestFailedCommitChangesNothingAndTheNextOneHolds(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small tmpfs needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("session", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	s := openSession(t, filepath.Join(dir, "session.db"), "boot-a")
	defer s.Close()
	fillSession(t, s)
	big := testRequest
	big.Number, big.ID = 10, strings.Repeat("x", 512<<10)
	if err := s.SetPending([]Request{big}); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("record of 512 KiB on 256 KiB: %v", err)
	}
	wantSession(t, s, []HeldObject{testHeld}, []Request{testRequest})
	other := testRequest
	other.Number = 11
	if err := s.SetPending([]Request{testRequest, other}); err != nil {
		t.Fatal(err)
	}
	wantSession(t, s, []HeldObject{testHeld}, []Request{testRequest, other})
}
