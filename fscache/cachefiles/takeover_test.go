package cachefiles

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// A reader mounts the image and reads one page of its blob, with nobody's help: its requests are all that happens.
func startReader(t testing.TB, im image, dir string) <-chan error {
	mounted := startMount(t, im, dir)
	read := make(chan error, 1)
	go func() { // ends when the kernel has its answers, or the device is closed
		if err := <-mounted; err != nil {
			read <- fmt.Errorf("mount: %w", err)
			return
		}
		p, err := readPage(dir, im.blob.Key, 5)
		if err == nil && !bytes.Equal(p, content(im.blob.Key, 5*fscache.BlockSize, fscache.BlockSize)) {
			err = errors.New("wrong bytes")
		}
		read <- err
	}()
	return read
}

// steps are where a process may die between the kernel's request and the end of it.
var steps = []struct {
	name string
	lost bool // without `restore` the request is lost: its descriptor is gone
}{
	{"open boot", true}, {"hold boot", true}, {"held boot", false}, {"open boot answered", false},
	{"read boot", false}, {"read boot written", false}, {"read boot answered", false},
	{"open blob", true}, {"hold blob", true}, {"held blob", false}, {"open blob answered", false},
	{"read blob", false}, {"read blob written", false}, {"read blob answered", false},
}

func TestNoReaderNoticesADeathWhereTheSupervisorHoldsWhatItIsGiven(t *testing.T) {
	needDevice(t)
	restore := hasRestore(t)
	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) {
			im, dir := newImage(t, "takeover", "boot", "blob"), t.TempDir()
			s := newSupervisor(t, im)
			s.start(step.name, 1)
			read := startReader(t, im, dir)
			s.dead()
			e := s.succeed()
			err := <-read
			if step.lost && !restore {
				if !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOBUFS) {
					t.Errorf("the reader of what is lost: %v, want EIO or ENOBUFS, and no silence", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			checkPage(t, dir, im.blob.Key, 5)
			checkPage(t, dir, im.blob.Key, 200)
			if err := e.Unmount(t.Context(), dir); err != nil {
				t.Error(err)
			}
			soon(t, "nothing is held after the unmount", func() bool { return len(e.Holding())+s.holding() == 0 })
		})
	}
}

func TestWhatTheSupervisorDoesNotHoldTheKernelOpensAgain(t *testing.T) {
	needRestore(t)
	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) {
			im, dir := newImage(t, "takeover", "boot", "blob"), t.TempDir()
			s := newSupervisor(t, im)
			s.holds = false
			s.start(step.name, 1)
			read := startReader(t, im, dir)
			s.dead()
			e := s.succeed()
			if err := <-read; err != nil {
				t.Fatal(err)
			}
			checkPage(t, dir, im.blob.Key, 200)
			if err := e.Unmount(t.Context(), dir); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestReadsOfAnObjectWhoseDescriptorIsGoneGetEIOWithoutRestore(t *testing.T) {
	needDevice(t)
	if hasRestore(t) {
		t.Skip("the kernel has restore: it opens the object again")
	}
	im, dir := newImage(t, "lost", "boot", "blob"), t.TempDir()
	s := newSupervisor(t, im)
	s.holds = false
	s.start("read blob", 1)
	read := startReader(t, im, dir)
	s.dead()
	if err := <-read; !errors.Is(err, unix.EIO) { // nobody has to do anything for it
		t.Errorf("the reader: %v, want EIO", err)
	}
	s.succeed()
	if _, err := readPage(dir, im.blob.Key, 9); !errors.Is(err, unix.EIO) {
		t.Errorf("a later reader: %v, want EIO until the image is mounted anew", err)
	}
}

func TestManyPendingReadsSurviveTwoDeaths(t *testing.T) {
	const readers = 100
	im, dir := newImage(t, "many", "boot", "blob"), t.TempDir()
	s := newSupervisor(t, im)
	s.start("read blob", readers)
	if err := <-startMount(t, im, dir); err != nil {
		t.Fatal(err)
	}
	var reading sync.WaitGroup
	for i := range int64(readers) {
		reading.Go(func() { checkPage(t, dir, im.blob.Key, i*2) }) // ends when its read is answered
	}
	s.dead()
	s.start("read blob written", readers/2)
	s.dead()
	s.start("read blob", 1) // the kill during the recovery of the kill
	s.dead()
	s.succeed()
	reading.Wait()
}

// TestFailoverWhileReading is test18 of lostjeffle/demand-read-cachefilesd: the daemon is killed over and over while the image is read.
func TestFailoverWhileReading(t *testing.T) {
	const lives = 12
	im, dir := newImage(t, "failover", "boot", "blob"), t.TempDir()
	s := newSupervisor(t, im)
	s.start("", 0)
	if err := <-startMount(t, im, dir); err != nil {
		t.Fatal(err)
	}
	checkPage(t, dir, im.blob.Key, 0) // now the blob is open, and held: without `restore` it is else lost with the process that read its open
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	var reading sync.WaitGroup
	for i := range int64(4) {
		reading.Go(func() {
			for page := i; page < blobSize/fscache.BlockSize; page += 4 {
				checkPage(t, dir, im.blob.Key, page)
			}
		})
	}
	for range lives {
		time.Sleep(time.Duration(r.IntN(30)) * time.Millisecond) // when it dies, not what must have happened by then
		s.kill()
		s.start("", 0)
	}
	reading.Wait()
	if t.Failed() {
		t.Logf("seed %d", seed)
	}
	s.kill()
	e := s.succeed()
	whole, err := os.ReadFile(filepath.Join(dir, im.blob.Key.ID))
	if err != nil || !bytes.Equal(whole, content(im.blob.Key, 0, blobSize)) {
		t.Errorf("the whole blob: %v, right bytes: false", err)
	}
	if err := e.Unmount(t.Context(), dir); err != nil {
		t.Error(err)
	}
}

func TestCloseReadByADeadProcessLetsTheObjectGo(t *testing.T) {
	for _, step := range []string{"close blob", "drop blob", "close blob answered"} {
		t.Run(step, func(t *testing.T) {
			im, dir := newImage(t, "closed", "boot", "blob"), t.TempDir()
			s := newSupervisor(t, im)
			s.start(step, 1)
			if err := <-startReader(t, im, dir); err != nil {
				t.Fatal(err)
			}
			if err := unix.Unmount(dir, 0); err != nil {
				t.Fatal(err)
			}
			s.dead()
			e := s.succeed()
			soon(t, "nobody holds descriptors of closed objects", func() bool { return len(e.Holding())+s.holding() == 0 })
			for _, k := range []fscache.Key{im.boot.Key, im.blob.Key} {
				if err := e.Remove(k); err != nil {
					t.Errorf("Remove: %v", err)
				}
			}
		})
	}
}

// TestOpenWhoseDescriptorIsHeldIsAnsweredBeforeItIsDeliveredAgain has nobody but takeOver answer the open: delivered again it would
// fail with EEXIST.
func TestOpenWhoseDescriptorIsHeldIsAnsweredBeforeItIsDeliveredAgain(t *testing.T) {
	for _, by := range []string{"message", "record"} {
		t.Run(by, func(t *testing.T) {
			im, dir := newImage(t, "inherited", "boot", "blob"), t.TempDir()
			s := newSupervisor(t, im)
			s.start("held boot", 1)
			read := startReader(t, im, dir)
			s.dead()
			left := s.left()
			if by == "record" {
				m, err := decodeSlot(left.Messages[0])
				if err != nil {
					t.Fatal(err)
				}
				left.Messages = nil
				left.Pending = []fscache.Pending{{Op: fscache.OpOpen, Object: im.boot.Key, ID: uint64(m.ID), Handle: m.ObjectID}}
			}
			e := openWith(t, Config{Dir: s.cache, Inherited: left, Holder: s})
			add(t, e, im)
			serve(t, e, func(r fscache.Request) bool {
				if r.Op == fscache.OpOpen && r.Object == im.boot.Key {
					t.Error("the open was delivered again")
				}
				return false
			}, im)
			if err := <-read; err != nil {
				t.Error(err)
			}
		})
	}
}

// TestOpenThatNobodyRecordedIsDeliveredAgain has a supervisor that holds the descriptor, and an inbox and records that were lost.
func TestOpenThatNobodyRecordedIsDeliveredAgain(t *testing.T) {
	needRestore(t)
	im, dir := newImage(t, "unrecorded", "boot", "blob"), t.TempDir()
	s := newSupervisor(t, im)
	s.start("held boot", 1)
	read := startReader(t, im, dir)
	s.dead()
	s.messages = nil
	s.succeed()
	if err := <-read; err != nil {
		t.Error(err)
	}
}

func TestRecordOfAnotherObjectIsNotAnsweredWithItsSize(t *testing.T) {
	im, dir := newImage(t, "mixup", "boot", "blob"), t.TempDir()
	s := newSupervisor(t, im)
	s.start("held boot", 1)
	read := startReader(t, im, dir)
	s.dead()
	left := s.left()
	left.Objects[0].Object = im.blob
	e := openWith(t, Config{Dir: s.cache, Inherited: left, Holder: s})
	add(t, e, im)
	serve(t, e, func(r fscache.Request) bool {
		if r.Op == fscache.OpRead {
			t.Errorf("the kernel opened the object and asks for %v", r)
		}
		return false
	}, im)
	if err := <-read; !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOBUFS) {
		t.Errorf("mount of an object whose record is another's: %v, want EIO or ENOBUFS", err)
	}
	if n := len(e.Holding()); n != 0 {
		t.Errorf("%d descriptors are kept", n)
	}
}

func TestHoldThatFailsRefusesTheOpen(t *testing.T) {
	needDevice(t)
	im := newImage(t, "unheld", "boot", "blob")
	refusing := &refusingHolder{}
	e := openWith(t, Config{Dir: t.TempDir(), Holder: refusing})
	add(t, e, im)
	answers := make(chan error, 1)
	serve(t, e, func(r fscache.Request) bool {
		if r.Op != fscache.OpOpen {
			return false
		}
		answers <- e.Answer(r, fscache.OK)
		return true
	}, im)
	if err := <-startMount(t, im, t.TempDir()); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOBUFS) {
		t.Errorf("mount: %v, want EIO or ENOBUFS", err)
	}
	if err := <-answers; !errors.Is(err, errRefused) {
		t.Errorf("Answer: %v, want the Holder's error", err)
	}
	if n := objectDescriptors(t); n != 0 || refusing.dropped != 1 {
		t.Errorf("%d descriptors are open, %d were dropped", n, refusing.dropped)
	}
}

var errRefused = errors.New("the store is full")

type refusingHolder struct{ dropped int }

func (*refusingHolder) Hold(fscache.Held) error { return errRefused }
func (r *refusingHolder) Drop(fscache.Held)     { r.dropped++ }

func TestFullInboxLeavesRequestsInTheKernel(t *testing.T) {
	needDevice(t)
	im := newImage(t, "slots", "boot", "blob")
	box := &smallInbox{}
	e := openWith(t, Config{Dir: t.TempDir(), Inbox: box})
	add(t, e, im)
	var mu sync.Mutex
	var held []fscache.Request
	full := make(chan struct{}, 1)
	serve(t, e, func(r fscache.Request) bool {
		if r.Op != fscache.OpRead || r.Object != im.blob.Key {
			return false
		}
		mu.Lock()
		defer mu.Unlock()
		if held = append(held, r); len(held) == smallInboxSlots {
			full <- struct{}{}
		}
		return true
	}, im)
	dir := mount(t, e, im)
	var reading sync.WaitGroup
	for i := range int64(smallInboxSlots * 2) {
		reading.Go(func() { checkPage(t, dir, im.blob.Key, i*2) })
	}
	for range 2 { // as many as there are slots, then the others
		<-full
		mu.Lock()
		if n := len(held); n != smallInboxSlots {
			t.Errorf("%d requests were read into %d slots", n, smallInboxSlots)
		}
		again := held
		held = nil
		mu.Unlock()
		for _, r := range again {
			fill(t, e, r, nil)
		}
	}
	reading.Wait()
	if err := e.Unmount(t.Context(), dir); err != nil {
		t.Error(err)
	}
	soon(t, "every slot but that for the next request is free", func() bool { return box.lentNow() <= 1 })
}

const smallInboxSlots = 4

// smallInbox is an inbox that is soon full.
type smallInbox struct {
	mu    sync.Mutex
	lent  int
	slots [smallInboxSlots][CACHEFILES_MSG_MAX_SIZE]byte
	used  [smallInboxSlots]bool
}

func (b *smallInbox) Take() (int, []byte, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.used {
		if !b.used[i] {
			b.used[i] = true
			b.lent++
			return i, b.slots[i][:], true
		}
	}
	return 0, nil, false
}

func (b *smallInbox) Free(i int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used[i] = false
	b.lent--
}

func (b *smallInbox) Slots() int { return smallInboxSlots }

func (b *smallInbox) lentNow() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.lent
}

func TestInheritedDeviceThatIsNotBoundIsBound(t *testing.T) {
	needDevice(t)
	cache := t.TempDir()
	device, err := openDevice()
	if err != nil {
		t.Fatal(err)
	}
	if Unused(device, false) || !Unused(device, true) {
		t.Error("a device that is not bound is left aside when, and only when, another engine is wanted: the kernel can use it")
	}
	e := openEngine(t, cache, device)
	if Unused(device, true) {
		t.Error("a device with a cache is left aside")
	}
	im := newImage(t, "unbound", "boot", "blob")
	add(t, e, im)
	serve(t, e, nil, im)
	checkPage(t, mount(t, e, im), im.blob.Key, 0)
}

func TestInheritedDescriptorsMustBeWhatTheyAreCalled(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	anon := dup(t, f)
	left := fscache.Inherited{Lifeline: f, Objects: []fscache.Held{{Object: fscache.Object{Key: fscache.Key{Domain: "d", ID: "o"}, Size: 4096}, Handle: 1, File: anon}}}
	if e, err := Open(Config{Dir: t.TempDir(), Inherited: left}); err == nil {
		_ = e.Close()
		t.Error("/dev/null was taken for the device")
	}
	if err := f.Close(); !errors.Is(err, os.ErrClosed) || !errors.Is(anon.Close(), os.ErrClosed) {
		t.Error("Open did not take the descriptors over")
	}
	e := &Engine{log: zap.NewNop(), objects: map[fscache.Key]*object{}, handles: map[uint32]*handle{}}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	left.Objects[0].File = null
	if useless := e.inherit(left.Objects[0]); len(useless) != 1 || len(e.handles) != 0 {
		t.Error("/dev/null was taken for an object")
	}
}
