package cachefiles

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
	"holdfast/fscache/internal/erofs"
)

// An upgrade is a predecessor and its successor, both in this process: the kernel tells them apart by nothing.
type upgrade struct {
	t        *testing.T
	im       image
	dir      string // of the mount
	old, new *Engine
	snapshot []fscache.Held
	blob     chan fscache.Request // reads of the blob, and opens of bootstraps named late, that the predecessor got and leaves alone
}

// newUpgrade mounts an image and opens the successor beside the running predecessor.
func newUpgrade(t *testing.T) *upgrade {
	t.Helper()
	needDevice(t)
	cache := t.TempDir()
	u := &upgrade{t: t, im: newImage(t, "upgrade", "boot", "blob"), old: openEngine(t, cache, nil), blob: make(chan fscache.Request, 64)}
	add(t, u.old, u.im)
	serve(t, u.old, func(r fscache.Request) bool {
		if (r.Op != fscache.OpRead || r.Object != u.im.blob.Key) && (r.Op != fscache.OpOpen || r.Object.ID != "late") {
			return false
		}
		u.blob <- r
		return true
	}, u.im)
	u.dir = mount(t, u.old, u.im)
	_, lifeline := u.old.Lifeline()
	left := fscache.Inherited{Lifeline: dup(t, lifeline), Objects: u.copies(u.old.Holding()), Alive: true}
	u.snapshot = u.old.Holding()
	u.new = openWith(t, Config{Dir: cache, Inherited: left})
	add(t, u.new, u.im)
	return u
}

func (u *upgrade) copies(held []fscache.Held) []fscache.Held {
	u.t.Helper()
	held = slices.Clone(held)
	for i := range held {
		held[i].File = dup(u.t, held[i].File)
	}
	return held
}

// read starts a reader of one page; its result comes when the kernel lets it go.
func (u *upgrade) read(page int64) <-chan error {
	done := make(chan error, 1)
	go func() { // ends with its answer
		p, err := readPage(u.dir, u.im.blob.Key, page)
		if err == nil && string(p) != string(content(u.im.blob.Key, page*fscache.BlockSize, fscache.BlockSize)) {
			err = errors.New("wrong bytes")
		}
		done <- err
	}()
	return done
}

// commit is what the daemons do: the predecessor reads no more, the successor expects what it has in flight and reads.
func (u *upgrade) commit() {
	u.t.Helper()
	if err := u.old.Freeze(); err != nil {
		u.t.Fatal(err)
	}
	var opened, gone []fscache.Held
	now := u.old.Holding()
	in := func(all []fscache.Held, h fscache.Held) bool {
		return slices.ContainsFunc(all, func(x fscache.Held) bool { return x.Handle == h.Handle })
	}
	for _, h := range now {
		if !in(u.snapshot, h) {
			opened = append(opened, h)
		}
	}
	for _, h := range u.snapshot {
		if !in(now, h) {
			gone = append(gone, h)
		}
	}
	if err := u.new.Expect(u.old.Pending(), u.copies(opened), gone); err != nil {
		u.t.Fatal(err)
	}
}

func TestSuccessorReadsNothingUntilItExpects(t *testing.T) {
	u := newUpgrade(t)
	if r, err := u.new.Next(); err == nil || errors.Is(err, fscache.ErrClosed) {
		t.Errorf("Next of the successor: %v, %v", r, err)
	}
	done := u.read(3)
	fill(t, u.old, <-u.blob, nil)
	if err := <-done; err != nil {
		t.Errorf("a read while the successor prepares: %v", err)
	}
	if err := u.old.Expect(nil, nil, nil); err == nil {
		t.Error("an engine without a predecessor expects one")
	}
	// The successor dies: nobody notices.
	if err := u.new.Close(); err != nil {
		t.Error(err)
	}
	done = u.read(9)
	fill(t, u.old, <-u.blob, nil)
	if err := <-done; err != nil {
		t.Errorf("a read after the successor gave up: %v", err)
	}
}

func TestSuccessorAnswersWhatThePredecessorDidNot(t *testing.T) {
	u := newUpgrade(t)
	finished, left := u.read(10), u.read(20)
	first, second := <-u.blob, <-u.blob
	if first.Off != 10*fscache.BlockSize {
		first, second = second, first
	}
	u.commit()
	var replayed []fscache.Request
	serve(t, u.new, func(r fscache.Request) bool {
		if r.Op == fscache.OpRead && r.Object == u.im.blob.Key && r.Off < 30*fscache.BlockSize {
			replayed = append(replayed, r)
		}
		return false
	}, u.im)
	if err := <-u.read(100); err != nil { // the pause is over
		t.Errorf("a read that nobody but the successor gets: %v", err)
	}
	fill(t, u.old, first, nil)
	u.new.Finished(first.ID)
	u.new.Finished(1 << 40) // unknown
	if err := <-finished; err != nil {
		t.Errorf("a read that the predecessor answered after the commit: %v", err)
	}
	if got := u.new.Pending(); len(got) != 1 || got[0].ID != second.ID || got[0].Off != second.Off {
		t.Errorf("the successor expects %v, want the read at %d", got, second.Off)
	}
	if err := u.old.Close(); err != nil {
		t.Error(err)
	}
	u.new.Replay()
	if err := <-left; err != nil {
		t.Errorf("a read that the predecessor left: %v", err)
	}
	if err := u.new.Unmount(t.Context(), u.dir); err != nil {
		t.Error(err)
	}
	soon(t, "the kernel closed the inherited objects", func() bool { return len(u.new.Holding()) == 0 })
	if err := u.new.Freeze(); err != nil {
		t.Fatal(err)
	}
	if len(replayed) != 1 || replayed[0].Off != second.Off {
		t.Errorf("replayed: %v, want the read at %d alone", replayed, second.Off)
	}
}

func TestObjectsThatComeAndGoDuringAnUpgrade(t *testing.T) {
	u := newUpgrade(t)
	late := newImage(t, "upgrade", "late", "blob2")
	// The predecessor has the open of another image's bootstrap when it is frozen.
	_, other := openHeld(t, u, late)
	if err := u.old.Unmount(t.Context(), u.dir); err != nil {
		t.Fatal(err)
	}
	soon(t, "the first image's objects are closed", func() bool { return len(u.old.Holding()) == 1 })
	u.commit()
	if got := u.new.Holding(); len(got) != 1 || got[0].Object.Key != late.boot.Key {
		t.Errorf("the successor holds %v, want the late bootstrap alone", got)
	}
	add(t, u.new, late)
	serve(t, u.new, nil, u.im, late)
	if err := u.old.Close(); err != nil {
		t.Error(err)
	}
	u.new.Replay()
	if err := <-other; err != nil {
		t.Errorf("the mount whose open the predecessor left: %v", err)
	}
}

// openHeld makes the predecessor read the open of a bootstrap and leave it.
func openHeld(t *testing.T, u *upgrade, im image) (open fscache.Request, mounted <-chan error) {
	t.Helper()
	add(t, u.old, im)
	mounted = startMount(t, im, t.TempDir())
	if open = <-u.blob; open.Op != fscache.OpOpen || open.Object != im.boot.Key {
		t.Fatalf("%v, want the open of %s", open, im.boot.Key)
	}
	return open, mounted
}

func TestOpenThatThePredecessorAnsweredBeforeItDiedIsNotLostByReplay(t *testing.T) {
	u := newUpgrade(t)
	late := newImage(t, "upgrade", "late", "blob2")
	open, other := openHeld(t, u, late)
	u.commit()
	if err := u.old.Answer(open, fscache.OK); err != nil { // with its last breath: nobody calls Finished
		t.Fatal(err)
	}
	if err := u.old.Close(); err != nil {
		t.Error(err)
	}
	before := u.handleOf(late.boot.Key)
	add(t, u.new, late)
	opens := make(chan fscache.Request, 8)
	serve(t, u.new, func(r fscache.Request) bool {
		if r.Op == fscache.OpOpen && r.Object == late.boot.Key {
			opens <- r
		}
		return false
	}, u.im, late)
	u.new.Replay()
	if err := <-other; err != nil {
		t.Errorf("the mount: %v", err)
	}
	soon(t, "the open was replayed, and answered", func() bool { return len(opens) > 0 && len(u.new.Pending()) == 0 })
	if got := u.handleOf(late.boot.Key); before == 0 || got != before {
		t.Errorf("the successor has opening %d of the bootstrap, want %d, which it inherited", got, before)
	}
	if len(opens) != 1 {
		t.Errorf("the bootstrap was opened %d times, want once, by the replay", len(opens))
	}
}

// handleOf is the successor's opening of an object, 0 if it has none.
func (u *upgrade) handleOf(k fscache.Key) uint32 {
	for _, h := range u.new.Holding() {
		if h.Object.Key == k {
			return h.Handle
		}
	}
	return 0
}

func TestOpenWhoseMessageIDIsUsedAgainWasAnswered(t *testing.T) {
	o := &object{key: fscache.Key{Domain: "d", ID: "o"}, size: fscache.BlockSize}
	h := &handle{id: 7, object: o, inherited: true}
	o.handle = h
	e := &Engine{
		handles: map[uint32]*handle{7: h}, expected: map[uint32]fscache.Pending{5: {Op: fscache.OpOpen, Object: o.key, ID: 5, Handle: 7}},
		pending: map[uint64]*request{}, byMsg: map[uint32]*request{}, changed: make(chan struct{}),
	}
	e.track(fscache.OpRead, delivery{m: Message{ID: 5, ObjectID: 7}, slot: noSlot}, h)
	if !h.opened.Load() || len(e.expected) != 0 {
		t.Error("the object's open is still waited for")
	}
}

func TestReplayWithoutTheDescriptorRefusesTheOpen(t *testing.T) {
	u := newUpgrade(t)
	late := newImage(t, "upgrade", "late", "blob2")
	_, other := openHeld(t, u, late)
	if err := u.old.Freeze(); err != nil {
		t.Fatal(err)
	}
	if err := u.new.Expect(u.old.Pending(), nil, nil); err != nil { // the open object was forgotten
		t.Fatal(err)
	}
	add(t, u.new, late)
	serve(t, u.new, nil, u.im, late)
	u.new.Replay()
	if err := <-other; !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOBUFS) {
		t.Errorf("the mount: %v, want EIO or ENOBUFS, and no silence", err)
	}
}

func TestFrozenEngineThawsAlsoBeforeItReadAnything(t *testing.T) {
	u := newUpgrade(t)
	if err := errors.Join(u.new.Freeze(), u.new.Thaw(), u.new.Thaw()); err != nil {
		t.Fatal(err)
	}
	u.commit()
	serve(t, u.new, nil, u.im)
	if err := <-u.read(7); err != nil {
		t.Error(err)
	}
	if err := errors.Join(u.new.Close(), u.old.Close()); err != nil {
		t.Error(err)
	}
	if err := u.new.Thaw(); !errors.Is(err, fscache.ErrClosed) {
		t.Errorf("Thaw of a closed engine: %v, want ErrClosed", err)
	}
}

func TestAbandonedMountIsGone(t *testing.T) {
	needDevice(t)
	im := newImage(t, "abandoned", "boot", "blob")
	first := openEngine(t, t.TempDir(), nil)
	add(t, first, im)
	serve(t, first, nil, im)
	dir := mount(t, first, im)
	checkPage(t, dir, im.blob.Key, 1)
	f, err := os.Open(filepath.Join(dir, im.blob.Key.ID))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := first.Close(); err != nil { // nobody holds the device: the cache is dead
		t.Fatal(err)
	}
	e := openEngine(t, t.TempDir(), nil)
	for range 2 { // the second time there is nothing to do
		if err := e.Abandon(t.Context(), im.mount(dir)); err != nil {
			t.Fatal(err)
		}
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != 0 {
		t.Errorf("the mount point shows %v, %v", names, err)
	}
	// EIO until the kernel has withdrawn the dead cache's objects, then ENOBUFS.
	if _, err := f.ReadAt(make([]byte, 4096), 100*4096); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOBUFS) {
		t.Errorf("read through a file that was open: %v, want EIO or ENOBUFS", err)
	}
	if err := f.Close(); err != nil { // the last use of the mount
		t.Fatal(err)
	}
	add(t, e, im)
	serve(t, e, nil, im)
	soon(t, "the old mount is gone", func() bool { lives, err := erofs.Lives(mountName(im.boot.Key)); return err == nil && !lives })
	checkPage(t, mount(t, e, im), im.blob.Key, 100)
}

func TestRemoveWaitsForTheKernelOnlyIfSomebodyIsInNext(t *testing.T) {
	o := &object{key: fscache.Key{Domain: "nobody", ID: "hears"}, size: fscache.BlockSize, added: true}
	o.handle = &handle{id: 7, object: o}
	e := &Engine{objects: map[fscache.Key]*object{o.key: o}, changed: make(chan struct{})}
	for _, heard := range []bool{false, true} {
		e.heard.Store(heard)
		began := time.Now()
		if err := e.Remove(o.key); !errors.Is(err, fscache.ErrBusy) {
			t.Errorf("Remove: %v, want ErrBusy", err)
		}
		if waited := time.Since(began) >= closePatience; waited != heard {
			t.Errorf("Remove waited: %v, want %v", waited, heard)
		}
	}
}
