package simkernel_test

import (
	"errors"
	"slices"
	"syscall"
	"testing"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
)

// started starts a process that knows the objects of open.
func started(t *testing.T, k *simkernel.Kernel, c simkernel.Config) *simkernel.Engine {
	t.Helper()
	e, err := k.Start(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []fscache.Object{boot, object} {
		if err := e.Add(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	return e
}

// nothing checks that no request can be read.
func nothing(t *testing.T, e *simkernel.Engine) {
	t.Helper()
	if r, ok, err := e.TryNext(); ok || err != nil {
		t.Errorf("TryNext: %+v, %v, want nothing", r, err)
	}
}

// startedRead is a read of the object that waits in the kernel.
func startedRead(t *testing.T, k *simkernel.Kernel, dir string, off, n int64) *simkernel.Reader {
	t.Helper()
	r, err := k.StartRead(dir, object.Key, make([]byte, n), off)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func wantEnd(t *testing.T, r *simkernel.Reader, want error) {
	t.Helper()
	if ended, err := r.Ended(); !ended || !errors.Is(err, want) {
		t.Errorf("the read ended: %v, with %v, want %v", ended, err, want)
	}
}

func wantAsleep(t *testing.T, r *simkernel.Reader) {
	t.Helper()
	if ended, err := r.Ended(); ended {
		t.Errorf("the read ended with %v", err)
	}
}

// ondemand.c:326.
func TestOpenOfAnObjectThatSomebodyHoldsFailsWithEEXIST(t *testing.T) {
	k := simkernel.New(simkernel.Cachefiles)
	s := &supervisor{k: k}
	e := started(t, k, simkernel.Config{Holder: s})
	mount := make(chan error, 1)
	if err := e.StartMount(fscache.Mount{Dir: t.TempDir(), Bootstrap: boot}, func(err error) { mount <- err }); err != nil {
		t.Fatal(err)
	}
	next(t, e, fscache.OpOpen)
	if err := k.Keep(e.Holding()[0]); err != nil {
		t.Fatal(err)
	}
	e.Kill()
	nothing(t, started(t, k, simkernel.Config{})) // restored it, without having answered it
	if err := <-mount; !errors.Is(err, syscall.EEXIST) {
		t.Errorf("the mount: %v, want EEXIST", err)
	}
}

// ondemand.c:388: only objects that are closed are opened anew.
func TestObjectIsOpenWhileSomebodyHoldsItsDescriptor(t *testing.T) {
	k, e, dir := mounted(t, simkernel.Cachefiles)
	held := e.Holding()
	for _, h := range held {
		if err := k.Keep(h); err != nil {
			t.Fatal(err)
		}
	}
	r := startedRead(t, k, dir, 0, page)
	next(t, e, fscache.OpRead)
	e.Kill()
	p := started(t, k, simkernel.Config{Inherited: fscache.Inherited{Objects: held}})
	again := next(t, p, fscache.OpRead)
	write(t, p, object.Key, 0, page)
	answer(t, p, again, fscache.OK)
	wantEnd(t, r, nil)
}

// v6.7, cachefiles_ondemand_fd_release and cachefiles_ondemand_send_req.
func TestWithoutRestoreReadsOfAClosedObjectAreEIO(t *testing.T) {
	k, e, dir := mounted(t, simkernel.CachefilesWithoutRestore)
	r := startedRead(t, k, dir, 0, page)
	next(t, e, fscache.OpRead)
	e.Kill()
	wantEnd(t, r, syscall.EIO)
	wantEnd(t, startedRead(t, k, dir, 8*page, page), syscall.EIO)
}

// daemon.c:80: there is no such command.
func TestWithoutRestoreNothingIsDeliveredAgain(t *testing.T) {
	k, e, dir := mounted(t, simkernel.CachefilesWithoutRestore)
	held := e.Holding()
	for _, h := range held {
		if err := k.Keep(h); err != nil {
			t.Fatal(err)
		}
	}
	r := startedRead(t, k, dir, 0, page)
	next(t, e, fscache.OpRead)
	pending := e.Pending()
	e.Kill()
	p := started(t, k, simkernel.Config{Inherited: fscache.Inherited{Objects: held}})
	nothing(t, p)
	wantAsleep(t, r)
	p.Kill()
	p = started(t, k, simkernel.Config{Inherited: fscache.Inherited{Objects: held, Pending: pending}})
	again := next(t, p, fscache.OpRead)
	write(t, p, object.Key, 0, page)
	answer(t, p, again, fscache.OK)
	wantEnd(t, r, nil)
}

// ondemand.c:42: a CLOSE nobody has read ends with the object's last descriptor, and the object can be opened again.
func TestUnreadCloseEndsWithTheLastDescriptor(t *testing.T) {
	k, e, dir := mounted(t, simkernel.Cachefiles)
	if err := e.Unmount(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	e.Kill()
	p := started(t, k, simkernel.Config{})
	nothing(t, p)
	mount := make(chan error, 1)
	if err := p.StartMount(fscache.Mount{Dir: dir, Bootstrap: boot}, func(err error) { mount <- err }); err != nil {
		t.Fatal(err)
	}
	answer(t, p, next(t, p, fscache.OpOpen), fscache.OK)
	if err := <-mount; err != nil { // the bootstrap's block is there
		t.Error(err)
	}
}

// ondemand.c:430: the search goes on behind the last that was read, and comes round.
func TestRequestsAreHandedOutRoundByMessageID(t *testing.T) {
	k, e, dir := mounted(t, simkernel.Cachefiles)
	for _, h := range e.Holding() {
		if err := k.Keep(h); err != nil {
			t.Fatal(err)
		}
	}
	left := fscache.Inherited{Objects: e.Holding()}
	for i := range int64(3) {
		startedRead(t, k, dir, i*8*page, page)
	}
	one, two := next(t, e, fscache.OpRead), next(t, e, fscache.OpRead)
	e.Kill()
	p := started(t, k, simkernel.Config{Inherited: left})
	var got []uint64
	for range 3 {
		got = append(got, next(t, p, fscache.OpRead).ID)
	}
	if want := []uint64{two.ID + 1, one.ID, two.ID}; !slices.Equal(got, want) {
		t.Errorf("delivered %v, want %v", got, want)
	}
}

// ondemand.c:560: ids do not come back soon. Who is killed has asked for the one page once more (filemap_get_pages).
func TestMessageIDsAreNotUsedAgainSoon(t *testing.T) {
	k, e, dir := mounted(t, simkernel.Cachefiles)
	first := startedRead(t, k, dir, 0, page)
	one := next(t, e, fscache.OpRead)
	first.Kill()
	startedRead(t, k, dir, 16*page, page)
	if two := next(t, e, fscache.OpRead); two.ID != one.ID+2 {
		t.Errorf("ids %d, %d", one.ID, two.ID)
	}
}

// fanotify_user.c, create_fd: get_unused_fd_flags.
func TestAnEventHasTheLowestFreeNumber(t *testing.T) {
	k, e, dir := mounted(t, simkernel.Fanotify)
	below := e.OpenOther()
	e.OpenOther()
	e.CloseOther(below)
	startedRead(t, k, dir, 0, page)
	r := next(t, e, fscache.OpRead)
	if r.ID != uint64(below) {
		t.Errorf("number %d, want %d", r.ID, below)
	}
	answer(t, e, r, fscache.EIO)
	if again := next(t, e, fscache.OpRead); again.ID != r.ID {
		t.Errorf("number %d, want %d again", again.ID, r.ID)
	}
}

// fanotify_user.c, process_access_response: the first of the access list that has the number.
func TestAnAnswerEndsTheOldestEventOfItsNumber(t *testing.T) {
	k, e, dir := mounted(t, simkernel.Fanotify)
	old := startedRead(t, k, dir, 0, page)
	was := next(t, e, fscache.OpRead)
	left := fscache.Inherited{Pending: e.Pending(), Objects: e.Holding()}
	e.Kill()
	p := started(t, k, simkernel.Config{Inherited: left, Unsafe: simkernel.Unsafe{NoOccupying: true}})
	next(t, p, fscache.OpRead)
	young := startedRead(t, k, dir, 8*page, page)
	other := next(t, p, fscache.OpRead)
	if other.ID != was.ID {
		t.Fatalf("numbers %d and %d", was.ID, other.ID)
	}
	answer(t, p, other, fscache.OK)
	wantEnd(t, old, nil)
	wantAsleep(t, young)
	if len(k.Violations()) != 2 {
		t.Errorf("an answer went astray, onto a hole: %q", k.Violations())
	}
}

// fanotify_user.c, fanotify_read: an event that finds no descriptor is denied.
func TestAReaderIsDeniedWhenTheProcessHasNoDescriptorLeft(t *testing.T) {
	k, e, dir := mounted(t, simkernel.Fanotify)
	e.Kill()
	p := started(t, k, simkernel.Config{Limit: 4})
	r := startedRead(t, k, dir, 0, page)
	nothing(t, p) // read-ahead
	nothing(t, p)
	wantEnd(t, r, syscall.EIO)
}

func TestASuccessorRefusesNumbersThatItDoesNotKeepClear(t *testing.T) {
	k, e, dir := mounted(t, simkernel.Fanotify)
	for range 8 {
		e.OpenOther()
	}
	startedRead(t, k, dir, 0, page)
	next(t, e, fscache.OpRead)
	if err := e.Freeze(); err != nil {
		t.Fatal(err)
	}
	for reserve, ok := range map[int]bool{8: false, 32: true} {
		p := started(t, k, simkernel.Config{Inherited: fscache.Inherited{Alive: true, Objects: e.Holding()}, Reserve: reserve})
		if err := p.Expect(e.Pending(), nil, nil); (err == nil) != ok {
			t.Errorf("with %d numbers reserved: %v", reserve, err)
		}
		p.Kill()
	}
}

func TestAProcessThatDiesWhileItStartsIsGone(t *testing.T) {
	for _, mode := range modes {
		k := simkernel.New(mode)
		func() {
			defer func() { _ = recover() }()
			_, _ = k.Start(simkernel.Config{Point: func(name string) { panic(death{name}) }})
		}()
		open(t, k)
	}
}
