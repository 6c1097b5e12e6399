package daemon

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/fscache"
	"holdfast/fscache/simkernel"
	"holdfast/state"
)

// upgrade begins an upgrade, whose error the returned function waits for.
func (h *simHost) upgrade() (ended func() error) {
	l, done := h.running(), make(chan error, 1)
	go func() { // ends with the upgrade
		_, err := l.d.Upgrade(context.Background(), UpgradeRequest{Binary: "/x"})
		done <- err
	}()
	synctest.Wait()
	return sync.OnceValue(func() error { return <-done })
}

// served says whether a read is served.
func (h *simHost) served(im simImage, dir string) {
	r := h.read(im, dir, 0, 4096)
	synctest.Wait()
	if !h.over(r) {
		h.fail("a reader waits")
	}
}

func TestUpgradeServesOn(t *testing.T) {
	eachHost(t, func(h *simHost, im simImage, dir string) {
		old := h.boot(0)
		h.mount(im, dir)
		h.setDown(true)
		first := h.read(im, dir, 0, 4096)
		synctest.Wait()
		ended := h.upgrade()
		if h.running() == old {
			h.fail("the supervisor follows the predecessor")
		}
		second := h.read(im, dir, 8192, 4096)
		synctest.Wait()
		h.setDown(false)
		synctest.Wait()
		if err := ended(); err != nil {
			h.fail("upgrade: %v", err)
		}
		<-old.done
		synctest.Wait()
		if !h.over(first) || !h.over(second) {
			h.fail("a reader waits")
		}
		h.agree()
	})
}

func TestSuccessorEndsBesideAPredecessorThatStillAnswers(t *testing.T) {
	eachHost(t, func(h *simHost, im simImage, dir string) {
		h.boot(0)
		h.mount(im, dir)
		h.setDown(true)
		r := h.read(im, dir, 0, 4096)
		synctest.Wait()
		h.upgrade()
		l := h.running()
		l.cancel()
		time.Sleep(100 * time.Millisecond)
		if !isClosed(l.done) {
			h.fail("it waits for its predecessor")
		}
		h.setDown(false)
		h.boot(0)
		synctest.Wait()
		if !h.over(r) {
			h.fail("a reader waits")
		}
	})
}

func TestUpgradeIsCalledOffWhenTheDaemonIsToldToEnd(t *testing.T) {
	eachHost(t, func(h *simHost, im simImage, dir string) {
		l := h.boot(0)
		h.mount(im, dir)
		h.stall = make(chan struct{})
		ended := h.upgrade()
		l.cancel()
		synctest.Wait()
		if isClosed(l.done) {
			h.fail("the daemon ended before its successor was dead")
		}
		if err := ended(); err == nil {
			h.fail("the upgrade went on")
		}
		<-l.done
		if l.err != nil {
			h.fail("the daemon ended with %v", l.err)
		}
		h.stall = nil
		h.boot(0)
		h.served(im, dir)
		h.agree()
	})
}

func TestUpgradeThatCannotStopReadingChangesNothing(t *testing.T) {
	eachHost(t, func(h *simHost, im simImage, dir string) {
		h.boot(0)
		h.mount(im, dir)
		h.freezeError = errors.New("it will not")
		if err := h.upgrade()(); err == nil {
			h.fail("the upgrade went on")
		}
		h.freezeError = nil
		h.served(im, dir)
		h.agree()
	})
}

func TestPredecessorOfADeadSuccessorEndsWithAnError(t *testing.T) {
	eachHost(t, func(h *simHost, im simImage, dir string) {
		l := h.boot(0)
		h.mount(im, dir)
		h.setDown(true)
		r := h.read(im, dir, 0, 4096)
		synctest.Wait()
		h.unfit = true
		h.upgrade()
		h.setDown(false)
		<-l.done
		if l.err == nil {
			h.fail("it ended as if it had handed over")
		}
		h.boot(0)
		synctest.Wait()
		if !h.over(r) {
			h.fail("a reader waits")
		}
	})
}

func TestMountOfASuccessorIsPrefetchedOnce(t *testing.T) {
	eachHost(t, func(h *simHost, im simImage, dir string) {
		h.change = func(o *Options) { o.Prefetch, o.PrefetchBPS, o.ReadAhead = true, 1, 1 } // which takes longer than the test
		h.boot(0)
		h.mount(im, dir)
		h.setDown(true)
		r := h.read(im, dir, 0, 4096)
		synctest.Wait()
		h.upgrade()
		other := filepath.Join(filepath.Dir(dir), "other")
		h.mkdir(other)
		h.mount(im, other) // while the predecessor still answers
		h.setDown(false)
		synctest.Wait()
		if !h.over(r) {
			h.fail("a reader waits")
		}
		time.Sleep(time.Second)
		for _, m := range h.running().d.mounts.list() {
			if n := m.prefetch.running.Load(); n != 1 {
				h.fail("%d prefetches of %s", n, m.record.Dir)
			}
		}
		done := make(chan error, 1)
		go func() { done <- h.running().d.unmount(context.Background(), other) }() // ends with the unmount
		time.Sleep(time.Minute)
		select {
		case err := <-done:
			if err != nil {
				h.fail("%v", err)
			}
		default:
			h.fail("unmounting waits for a prefetch")
		}
	})
}

func TestUnmountedImageThatLingersIsKnownAsThat(t *testing.T) {
	eachHost(t, func(h *simHost, im simImage, dir string) {
		h.boot(0)
		h.mount(im, dir)
		h.busy = func(k fscache.Key) bool { return k.ID == im.ids[0] }
		if err := h.running().d.unmount(context.Background(), dir); err != nil {
			h.fail("%v", err)
		}
		other := h.others[0]
		h.mount(other, dir) // on the same directory
		for _, known := range []bool{true, true, false} {
			h.running().kill()
			if !known { // a process that died in between did not write down what it is
				h.rewrite(func(m *state.Mount) { m.Stage = "" })
			}
			h.boot(0)
			l := h.running()
			if l == nil {
				h.fail("the daemon does not start")
			}
			if n := len(l.d.mounts.every()); n != 2 {
				h.fail("%d mounts are known, want the one that lingers and the one that is there", n)
			}
			h.served(other, dir)
		}
		if err := h.running().d.unmount(context.Background(), dir); err != nil {
			h.fail("%v", err)
		}
		h.running().kill()
		h.reboot()
		h.busy = nil
		h.boot(0)
		if all := h.running().d.mounts.every(); len(all) != 0 {
			h.fail("after a boot of the host there is %+v", all)
		}
		h.agree()
	})
}

func TestMountThatCannotBeMadeAfterABootIsTriedAgain(t *testing.T) {
	eachHost(t, func(h *simHost, im simImage, dir string) {
		h.boot(0)
		h.mount(im, dir)
		h.running().kill()
		h.reboot()
		h.mountError = errors.New("not now")
		h.boot(0)
		synctest.Wait()
		if all := h.running().d.mounts.every(); len(all) != 1 || all[0].Broken == "" {
			h.fail("with a mount that fails there is %+v", all)
		}
		if r, err := h.running().d.report(context.Background()); err != nil || len(r.Findings) != 1 || !strings.Contains(r.Findings[0].Says, "earlier boot") {
			h.fail("what is found is %v, %v", r.Findings, err)
		}
		h.running().kill()
		h.mountError = nil
		for die := 1; h.running() == nil; die++ { // at each step of it
			h.boot(die)
			synctest.Wait()
		}
		h.running().dieWithin(0)
		if all := h.running().d.mounts.every(); len(all) != 1 || all[0].Broken != "" {
			h.fail("after that there is %+v", all)
		}
		h.served(im, dir)
		h.agree()
	})
}

func TestMountThatDiedBeforeItWasMadeDoesNotLinger(t *testing.T) {
	eachHost(t, func(h *simHost, im simImage, dir string) {
		h.boot(0)
		h.mount(im, dir)
		other := filepath.Join(filepath.Dir(dir), "other")
		h.mkdir(other)
		l := h.running()
		l.dieWithin(1) // Mount is the first step that others see
		if _, err := l.d.mount(context.Background(), MountRequest{Image: im.ref, Dir: other}); err == nil {
			h.fail("a dead process has mounted")
		}
		h.boot(0)
		if all := h.running().d.mounts.every(); len(all) != 1 || all[0].Dir != dir {
			h.fail("there is %+v", all)
		}
		h.served(im, dir)
		h.agree()
	})
}

func TestObjectsWithoutTheirLifelineAreLetGo(t *testing.T) {
	eachHost(t, func(h *simHost, im simImage, dir string) {
		h.boot(0)
		h.mount(im, dir)
		h.served(im, dir)
		h.running().kill()
		h.reboot()
		delete(h.store, simkernel.Name)
		h.boot(0) // open looks at what is inherited
		h.served(im, dir)
		h.agree()
	})
}

func TestMountWithoutItsLifelineIsGivenUpWhereverTheDaemonDies(t *testing.T) {
	eachHost(t, func(h *simHost, im simImage, dir string) {
		h.boot(0)
		h.mount(im, dir)
		h.running().kill()
		delete(h.store, simkernel.Name)
		h.bereft = true
		for die := 1; h.running() == nil; die++ { // at each step of it
			h.boot(die)
			synctest.Wait()
		}
		h.running().dieWithin(0)
		if all := h.running().d.mounts.every(); len(all) != 0 || len(h.kernel.Mounts()) != 0 {
			h.fail("served: %+v, mounted: %v; want neither", all, h.kernel.Mounts())
		}
		h.mount(im, dir)
		h.served(im, dir)
		h.agree()
	})
}

func TestLingeringImageGoesWhenItsLastUserHas(t *testing.T) {
	eachHost(t, func(h *simHost, im simImage, dir string) {
		var used, gap atomic.Bool
		var unmounted atomic.Pointer[Daemon]
		used.Store(true)
		h.busy = func(k fscache.Key) bool {
			if d := unmounted.Load(); d != nil && d.Unused() {
				gap.Store(true)
			}
			return used.Load() && k.ID == im.ids[0]
		}
		h.boot(0)
		h.mount(im, dir)
		d := h.running().d
		if err := d.unmount(context.Background(), dir); err != nil {
			h.fail("%v", err)
		}
		unmounted.Store(d)
		time.Sleep(3 * sweepEvery)
		unmounted.Store(nil)
		if n := len(d.mounts.every()); n != 1 {
			h.fail("%d mounts are known while the image is used, want it", n)
		}
		if n := strings.Count(h.notes(), "is still used"); n != 1 {
			h.fail("it was logged %d times that it lingers, want once", n)
		}
		if gap.Load() {
			h.fail("while it was looked for users, the daemon would have ended for want of use")
		}
		used.Store(false)
		time.Sleep(2 * sweepEvery)
		if all := d.mounts.every(); len(all) != 0 {
			h.fail("nobody uses it, nobody mounts or unmounts, and there is %+v", all)
		}
		h.agree()
	})
}

// What holds its files open may be a mount without a daemon.
func TestCheckedImageThatIsUsedElsewhereIsInNobodysWay(t *testing.T) {
	eachHost(t, func(h *simHost, im simImage, dir string) {
		var used atomic.Bool
		h.busy = func(k fscache.Key) bool { return used.Load() && k.ID == im.ids[0] }
		h.boot(0)
		h.mount(im, dir)
		d := h.running().d
		if err := d.unmount(context.Background(), dir); err != nil {
			h.fail("%v", err)
		}
		used.Store(true)
		if r, err := d.checkCache(context.Background(), im.ref, false); err != nil || len(r.Objects) != len(im.ids) {
			h.fail("%+v, %v", r, err)
		}
		list, err := d.state.Mounts()
		if err != nil || len(list) != 1 || list[0].Image != im.digest || list[0].Stage != state.StageLinger {
			h.fail("on record: %+v, %v; want the image, lingering", list, err)
		}
		ended := h.upgrade()
		if err := ended(); err != nil {
			h.fail("%v", err)
		}
		used.Store(false)
		time.Sleep(2 * sweepEvery)
		if all := h.running().d.mounts.every(); len(all) != 0 {
			h.fail("nobody uses it, and there is %+v", all)
		}
		h.agree()
	})
}

// rewrite changes the mounts on record. Nothing runs.
func (h *simHost) rewrite(change func(*state.Mount)) {
	for _, l := range h.lives {
		<-l.done
	}
	db, _, err := state.Open(filepath.Join(h.root, "state.db"), "test")
	if err != nil {
		h.fail("%v", err)
	}
	defer db.Close()
	list, err := db.Mounts()
	if err != nil {
		h.fail("%v", err)
	}
	for _, m := range list {
		change(&m)
		if err := db.UpdateMount(m); err != nil {
			h.fail("%v", err)
		}
	}
}

// reboot makes what is on record that of an earlier boot, and takes the mounts away. Nothing runs.
func (h *simHost) reboot() {
	h.rewrite(func(m *state.Mount) { m.Boot = "another" })
	e, err := h.kernel.Open()
	if err != nil {
		h.fail("%v", err)
	}
	defer e.Close()
	for _, dir := range h.kernel.Mounts() {
		if err := e.Unmount(context.Background(), dir); err != nil {
			h.fail("%v", err)
		}
	}
}
