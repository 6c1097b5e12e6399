package daemon

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"holdfast/fscache/simkernel"
)

// schedules is how many are run in each mode.
const schedules = 1000

// TestSchedules runs daemons on a simulated host through what happens to daemons: deaths at every step that others see, upgrades of which either
// side dies, stops, idleness, mounts and unmounts in between, parts of what is mounted being culled, sources that are away. No reader gets a wrong byte or an error, no
// request is forgotten, no lifeline is let go, and once the faults are over everybody gets everything and all records agree.
func TestSchedules(t *testing.T) {
	t.Setenv("GOMEMLIMIT", "off")
	images := simImages(t, 2)
	for name, mode := range map[string]simkernel.Mode{"cachefiles": simkernel.Cachefiles, "fanotify": simkernel.Fanotify} {
		t.Run(name, func(t *testing.T) {
			checks(t, schedules/slowdown)
			parent := shmDir(t)
			rapid.Check(t, func(rt *rapid.T) {
				base, err := os.MkdirTemp(parent, "s")
				if err != nil {
					rt.Fatal(err)
				}
				defer os.RemoveAll(base)
				rapid.SyncTest(rt, func(rt *rapid.T) { newSchedule(rt, mode, base, images).play() })
			})
		})
	}
}

// A schedule is a host and what is going on on it.
type schedule struct {
	*simHost
	rt      *rapid.T
	images  []simImage
	dirs    []string
	readers []*simRead
	idle    time.Duration
	ops     sync.WaitGroup      // requests of the API under way
	used    map[string]simImage // what may be mounted on a directory
}

func newSchedule(rt *rapid.T, mode simkernel.Mode, base string, images []simImage) *schedule {
	s := &schedule{rt: rt, images: images, used: map[string]simImage{}}
	s.simHost = newSimHost(mode, base, func(format string, args ...any) {
		panic(fmt.Sprintf(format, args...) + "\n" + s.notes())
	})
	for i := range 3 {
		d := filepath.Join(base, fmt.Sprint("mnt", i))
		if err := os.Mkdir(d, 0o700); err != nil {
			rt.Fatal(err)
		}
		s.dirs = append(s.dirs, d)
	}
	s.idle = rapid.SampledFrom([]time.Duration{0, 0, 50 * time.Millisecond}).Draw(rt, "idle exit")
	prefetch := rapid.Bool().Draw(rt, "prefetch")
	s.change = func(o *Options) {
		o.IdleExit, o.Prefetch, o.ReadAhead, o.CullMounted = s.idle, prefetch, 1, mode == simkernel.Fanotify
	}
	return s
}

func (s *schedule) pick(what string, n int) int { return rapid.IntRange(0, n-1).Draw(s.rt, what) }

func (s *schedule) play() {
	defer s.end()
	s.boot(0)
	s.mount(s.images[0], s.dirs[0])
	s.used[s.dirs[0]] = s.images[0]
	actions := []func(){
		s.actRead, s.actRead, s.actRead, s.actTime, s.actTime, s.actSource, s.actCrash, s.actCrashWithin, s.actBoot, s.actBoot, s.actUpgrade,
		s.actUpgrade, s.actStop, s.actMount, s.actUnmount, s.actKillReader,
		s.actCullParts,
	}
	for range 8 + s.pick("steps", 24) {
		i := s.pick("action", len(actions))
		s.note("-- %s", runtime.FuncForPC(reflect.ValueOf(actions[i]).Pointer()).Name())
		actions[i]()
		synctest.Wait()
		s.look()
	}
	s.settle()
}

// look checks what can be seen from outside.
func (s *schedule) look() {
	if v := s.kernel.Violations(); len(v) > 0 {
		s.fail("%s", v[0])
	}
	s.readers = slices.DeleteFunc(s.readers, s.over)
}

func (s *schedule) actRead() {
	on := s.kernel.Mounts()
	if len(on) == 0 || len(s.readers) > 8 {
		return
	}
	dir := on[s.pick("mount", len(on))]
	im := s.used[dir]
	size := len(im.blobs[im.ids[0]])
	off := int64(s.pick("page", size/4096)) * 4096
	n := min(int64(1+s.pick("pages", 4))*4096, int64(size)-off)
	s.readers = append(s.readers, s.read(im, dir, off, n))
}

func (s *schedule) actKillReader() {
	if len(s.readers) > 0 && s.pick("really", 3) == 0 {
		i := s.pick("reader", len(s.readers))
		s.readers[i].Kill()
		s.readers = slices.Delete(s.readers, i, i+1)
	}
}

func (s *schedule) actTime() {
	time.Sleep(rapid.SampledFrom([]time.Duration{time.Millisecond, 9 * time.Millisecond, 15 * time.Millisecond, 80 * time.Millisecond, 3 * time.Second}).Draw(s.rt, "time"))
}

func (s *schedule) actSource() {
	s.setDown(s.pick("down", 3) == 0)
	s.setBroken(s.pick("broken", 3) == 0)
}

func (s *schedule) actCrash() {
	if l := s.running(); l != nil {
		l.kill()
	}
}

func (s *schedule) actCrashWithin() {
	if l := s.running(); l != nil {
		l.dieWithin(1 + s.pick("steps until death", 12))
	}
}

// death draws at which of its steps a process dies; 0, mostly: at none.
func (s *schedule) death() int {
	if s.pick("dies", 3) > 0 {
		return 0
	}
	return 1 + s.pick("steps until death", 40)
}

func (s *schedule) actBoot() {
	if s.running() == nil {
		s.boot(s.death())
	}
}

func (s *schedule) actUpgrade() {
	l := s.running()
	if l == nil {
		return
	}
	s.successorDies = s.death()
	// An error is one of those that the daemon serves on after, or it has died.
	s.ops.Go(func() { _, _ = l.d.Upgrade(context.Background(), UpgradeRequest{Binary: "/x"}) })
}

func (s *schedule) actStop() {
	if l := s.running(); l != nil {
		l.cancel()
	}
}

func (s *schedule) actMount() {
	l := s.running()
	dir := s.dirs[s.pick("dir", len(s.dirs))]
	if l == nil || !isClosed(l.ready) || slices.Contains(s.kernel.Mounts(), dir) {
		return
	}
	im, ok := s.used[dir]
	if !ok { // one image for each: a mount that outlives its process may come late
		im = s.images[s.pick("image", len(s.images))]
	}
	s.used[dir] = im
	s.ops.Go(func() { _, _ = l.d.mount(l.ctx, MountRequest{Image: im.ref, Dir: dir}) })
}

func (s *schedule) actUnmount() {
	l := s.running()
	if l == nil || !isClosed(l.ready) {
		return
	}
	dir := s.dirs[s.pick("dir", len(s.dirs))]
	if s.pick("really", 2) == 0 {
		s.ops.Go(func() { _ = l.d.unmount(l.ctx, dir) })
	}
}

func (s *schedule) actCullParts() {
	l := s.running()
	if l == nil || !isClosed(l.ready) || !l.d.cullsParts {
		return
	}
	for _, o := range l.d.objects.all() {
		s.ops.Go(func() { l.d.cullPart(o) })
	}
}

// settle takes all faults away, and looks whether everybody ends and everything agrees.
func (s *schedule) settle() {
	s.setDown(false)
	s.setBroken(false)
	s.successorDies, s.idle = 0, 0
	for i := 0; ; i++ {
		if l := s.running(); l == nil {
			s.boot(0)
		}
		for _, l := range s.lives {
			l.dieWithin(0)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		s.look()
		if s.running() != nil && len(s.readers) == 0 {
			break
		}
		if i > 5 {
			s.fail("%d readers wait; the kernel waits for %+v", len(s.readers), s.kernel.Obligations())
		}
	}
	s.ops.Wait()
	for _, dir := range s.kernel.Mounts() {
		im := s.used[dir]
		s.readers = append(s.readers, s.read(im, dir, 0, int64(len(im.blobs[im.ids[0]]))))
	}
	time.Sleep(30 * time.Millisecond)
	synctest.Wait()
	s.look()
	if len(s.readers) > 0 {
		s.fail("with everything in order a reader waits")
	}
	s.agree()
}

// checks sets how many schedules rapid runs, unless the command line does.
func checks(t *testing.T, n int) {
	f := flag.Lookup("rapid.checks")
	if f.Value.String() != f.DefValue {
		return
	}
	if err := flag.Set(f.Name, strconv.Itoa(n)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = flag.Set(f.Name, f.DefValue) })
}
