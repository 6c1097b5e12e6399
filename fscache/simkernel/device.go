package simkernel

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"syscall"

	"holdfast/fscache"
)

// device is /dev/cachefiles in on-demand mode. Lines are of fs/cachefiles/ondemand.c in 6.12.117.
type device struct {
	k        *Kernel
	restores bool // the kernel knows `restore`, and opens closed objects anew
	dead     bool
	objects  map[fscache.Key]*kobject
	anons    map[uint32]*anon // object descriptors somebody has, by the kernel's id
	kept     map[uint32]int   // how many of them the supervisor has
	requests []*request       // by number, ascending (the reqs xarray)
	work     []*kobject       // to be opened anew (ondemand_work)
	msgNext  uint64           // msg_id_next
	reqNext  uint64           // where the search for the next request to hand out starts (req_id_next)
	lastID   uint32           // of an object's descriptor
}

// A kobject is the kernel's object, shared by all mounts of a domain (fs/erofs/fscache.c, erofs_domain_register_cookie).
type kobject struct {
	key      fscache.Key
	users    int
	state    objectState
	id       int64 // ondemand_id: 0 never had a descriptor, idClosed its last one is closed
	attached bool  // it has a file
	dropping bool  // CLOSE is sent, or nobody waits for its OPEN
	waiting  []func(error)
	after    []func() // who opens it once it is gone (fscache_wait_on_collision)
}

type objectState int

const (
	objectClosed objectState = iota
	objectReopening
	objectOpen
)

const idClosed = -1 // CACHEFILES_ONDEMAND_ID_CLOSED

// An anon is an object's descriptor ("[cachefiles]"): a file description, however many hold it.
type anon struct {
	id      uint32
	object  *kobject
	holders int
}

var (
	errBadFD = fmt.Errorf("simulated open: %w", syscall.EBADFD)
	errExist = fmt.Errorf("simulated open: %w", syscall.EEXIST)
	errFiles = fmt.Errorf("simulated read of requests: %w", syscall.EMFILE)
)

func newDevice(k *Kernel, restores bool) *device {
	return &device{
		k: k, restores: restores,
		objects: make(map[fscache.Key]*kobject), anons: make(map[uint32]*anon), kept: make(map[uint32]int),
	}
}

// mount opens the image's objects, the bootstrap first, reads the super block, and has the blobs opened in the background.
// That for the lookup of a cookie cannot be killed (netfs/fscache_io.c, fscache_begin_operation).
func (d *device) mount(w *waiter, m *mount, done func(error)) {
	if d.k.used(m.Bootstrap.Key) {
		done(syscall.EEXIST) // fs/erofs/fscache.c, erofs_fscache_acquire_cookie: an fsid once in a domain
		return
	}
	opened := []fscache.Key{}
	fail := func(err error) {
		d.release(opened)
		done(err)
	}
	d.open(m.Bootstrap.Key, func(err error) {
		if err != nil {
			fail(err)
			return
		}
		opened = append(opened, m.Bootstrap.Key)
		d.fetch(w, m.Bootstrap.Key, 0, page, func(err error) {
			if err != nil || len(m.Blobs) == 0 {
				if err != nil {
					fail(err)
				} else {
					done(nil)
				}
				return
			}
			left, failed := len(m.Blobs), error(nil)
			for _, b := range m.Blobs {
				d.open(b.Key, func(err error) {
					if err == nil {
						opened = append(opened, b.Key)
					}
					failed = cmp.Or(failed, err)
					if left--; left > 0 {
						return
					}
					if failed != nil {
						fail(failed)
					} else {
						done(nil)
					}
				})
			}
		})
	})
}

// open makes a mount a user of an object. Only the first asks, through a kernel thread, and waits for copen.
func (d *device) open(k fscache.Key, done func(error)) {
	o := d.objects[k]
	switch {
	case o == nil:
		o = &kobject{key: k, users: 1, waiting: []func(error){done}}
		d.objects[k] = o
		d.send(&request{op: fscache.OpOpen, key: k, object: o, done: func(err error) { d.opened(o, err) }})
	case o.dropping:
		o.after = append(o.after, func() { d.open(k, done) })
	case o.waiting != nil:
		o.users++
		o.waiting = append(o.waiting, done)
	default:
		o.users++
		done(nil)
	}
}

// opened ends the first OPEN of an object.
func (d *device) opened(o *kobject, err error) {
	waiting := o.waiting
	o.waiting = nil
	if err != nil {
		d.gone(o)
		err = fmt.Errorf("object %s: %w", o.key, err)
	} else {
		o.attached = true
	}
	for _, done := range waiting {
		done(err)
	}
}

func (d *device) unmount(m *mount) { d.release(m.objects()) }

// release drops a user; the last one's going is told by CLOSE, which nobody waits for but a kernel thread.
func (d *device) release(keys []fscache.Key) {
	for _, k := range keys {
		o := d.objects[k]
		if o.users--; o.users > 0 {
			continue
		}
		o.dropping = true
		if o.state == objectOpen && !d.dead { // :548
			d.send(&request{op: fscache.OpClose, key: k, object: o, done: func(error) { d.gone(o) }})
			continue
		}
		d.gone(o)
	}
}

// gone: what is asked for the object fails (:718), it has no file any more, and who waits for its name has it.
func (d *device) gone(o *kobject) {
	o.dropping, o.attached = true, false
	if d.objects[o.key] == o {
		delete(d.objects, o.key)
	}
	for _, r := range slices.Clone(d.requests) {
		if r.object == o {
			d.remove(r)
			r.finish(errRead)
		}
	}
	after := o.after
	o.after = nil
	for _, open := range after {
		open()
	}
}

// fetch asks for the holes of a range one after the other (io.c, cachefiles_do_prepare_read). What has data is read
// without the daemon; a hole that is still one after its answer is an error, not zeros (NETFS_READ_HOLE_FAIL: the
// search is repeated without NETFS_SREQ_ONDEMAND).
func (d *device) fetch(w *waiter, k fscache.Key, off, n int64, done func(error)) {
	f := d.k.files[k]
	for ; n > 0 && f.pages[off] != nil; n -= page {
		off += page
	}
	if n <= 0 {
		done(nil)
		return
	}
	hole := int64(page)
	for hole < n && f.pages[off+hole] == nil {
		hole += page
	}
	r := &request{op: fscache.OpRead, key: k, off: off, n: hole, object: d.objects[k]}
	r.done = func(err error) {
		w.request = nil
		switch {
		case err != nil:
			done(err)
		case f.pages[off] == nil:
			done(errRead)
		default:
			d.fetch(w, k, off, n, done)
		}
	}
	w.request = r
	d.send(r)
}

// cancel: a killed waiter takes its request back (:589). It asks for the one page before it dies, and takes that back at once.
func (d *device) cancel(w *waiter) {
	if r := w.request; r != nil {
		d.remove(r)
		r.done, w.request = nil, nil
		if w.again {
			d.msgNext++
		}
	}
}

// send queues a request under the next message id; ids are not used again soon (:560).
func (d *device) send(r *request) {
	closed := r.op != fscache.OpOpen && r.object.state != objectOpen
	switch {
	case d.dead && d.restores:
		r.finish(errRead)
		return
	case d.dead:
		r.finish(errRead)
		return
	case r.object.dropping && r.op != fscache.OpClose: // :538
		r.finish(errRead)
		return
	case closed && r.op == fscache.OpRead && !d.restores: // v6.7, cachefiles_ondemand_send_req: an object that is closed stays so
		r.finish(errRead)
		return
	}
	r.number = d.msgNext
	d.msgNext++
	d.requests = append(d.requests, r)
	d.k.changed.Broadcast()
}

func (d *device) remove(r *request) {
	if i := slices.Index(d.requests, r); i >= 0 {
		d.requests = slices.Delete(d.requests, i, i+1)
	}
}

// read hands out the first new request from reqNext on, round to the start (:430), or nil; an OPEN comes with a descriptor.
// room says whether the process can have one more. A READ of a closed object makes the kernel ask to open it, and waits
// for that (:388): the request comes from a kernel thread, after this read.
func (d *device) read(p *Engine, room bool) (*request, *anon, error) {
	defer d.runWorkers()
	r := d.selectFrom(d.reqNext)
	if r == nil {
		r = d.selectFrom(0)
	}
	if r == nil {
		return nil, nil, nil
	}
	d.k.reads(p)
	r.read = true
	d.reqNext = r.number + 1
	switch r.op {
	case fscache.OpClose: // not answered: done when read (:477)
		d.remove(r)
		r.finish(nil)
	case fscache.OpOpen:
		a, err := d.getFD(r.object, room)
		if err != nil {
			d.remove(r)
			r.finish(err)
			return nil, nil, err
		}
		return r, a, nil
	}
	return r, nil, nil
}

// getFD gives an object a descriptor, with a new id. One whose descriptor somebody still has gets none, and the OPEN fails
// (:326).
func (d *device) getFD(o *kobject, room bool) (*anon, error) {
	var err error
	d.lastID++
	switch {
	case !room:
		err = errFiles // :312
	case o.id > 0:
		err = errExist
	}
	if err != nil {
		if o.id <= 0 {
			o.state = objectClosed // :356
		}
		return nil, err
	}
	a := &anon{id: d.lastID, object: o, holders: 1}
	d.anons[a.id] = a
	o.id = int64(a.id)
	return a, nil
}

func (d *device) selectFrom(id uint64) *request {
	for _, r := range d.requests {
		if r.number < id || r.read {
			continue
		}
		if r.op == fscache.OpRead && d.restores {
			switch r.object.state {
			case objectClosed:
				r.object.state = objectReopening
				d.work = append(d.work, r.object)
				continue
			case objectReopening:
				continue // :393
			}
		}
		return r
	}
	return nil
}

// runWorkers sends the OPENs of objects that are to be opened anew.
func (d *device) runWorkers() {
	work := d.work
	d.work = nil
	for _, o := range work {
		if o.state != objectOpen { // :688
			d.send(&request{op: fscache.OpOpen, key: o.key, object: o, done: func(error) {}})
		}
	}
}

// copen answers an OPEN. EINVAL, for a request that is gone or was never read (:194), is ErrGone.
func (d *device) copen(number uint64, e fscache.Errno) error {
	r := d.find(number, fscache.OpOpen)
	if r == nil || r.object.id == 0 {
		return fscache.ErrGone
	}
	d.remove(r)
	err := errnoOf(e)
	if o := r.object; o.id == idClosed {
		o.state = objectClosed // :263
		if err == nil {
			err = errBadFD // :243
		}
	} else if err == nil {
		o.state = objectOpen
		o.attached = true
	}
	r.finish(err)
	d.k.changed.Broadcast() // READs wait for it (:258)
	return nil
}

// complete is READ_COMPLETE through a descriptor (:116). A READ has no error answer: completed, it fails its reader by what
// it left a hole.
func (d *device) complete(a *anon, number uint64) error {
	r := d.find(number, fscache.OpRead)
	if r == nil || r.object != a.object {
		return fscache.ErrGone
	}
	d.remove(r)
	r.finish(nil)
	return nil
}

func (d *device) find(number uint64, op fscache.Op) *request {
	for _, r := range d.requests {
		if r.number == number && r.op == op {
			return r
		}
	}
	return nil
}

// restore makes everything pending new (:285).
func (d *device) restore() error {
	if !d.restores {
		return errors.ErrUnsupported
	}
	for _, r := range d.requests {
		r.read = false
	}
	d.k.changed.Broadcast()
	return nil
}

// hold is somebody more that has an object's descriptor; false: nobody has it.
func (d *device) hold(id uint32) (*anon, bool) {
	a := d.anons[id]
	if a == nil {
		return nil, false
	}
	a.holders++
	return a, true
}

func (d *device) keep(id uint32) error {
	if _, ok := d.hold(id); !ok {
		return fmt.Errorf("object descriptor %d: %w", id, syscall.EBADF)
	}
	d.kept[id]++
	return nil
}

func (d *device) let(id uint32) {
	if d.kept[id] > 0 {
		d.kept[id]--
		d.close(d.anons[id])
	}
}

// close drops a holder of a descriptor. The last one's going closes the object, and ends the CLOSE that nobody has read
// (:37, :42); before 6.8 also its READs (v6.7, cachefiles_ondemand_fd_release).
func (d *device) close(a *anon) {
	if a.holders--; a.holders > 0 {
		return
	}
	delete(d.anons, a.id)
	o := a.object
	o.id, o.state = idClosed, objectClosed
	for _, r := range slices.Clone(d.requests) {
		switch {
		case r.object != o:
		case r.op == fscache.OpClose && !r.read:
			d.remove(r)
			r.finish(nil)
		case r.op == fscache.OpRead && !d.restores:
			d.remove(r)
			r.finish(errRead)
		}
	}
}

func (d *device) released(p *Engine) {
	for _, a := range p.cache.handles {
		d.close(a)
	}
	p.cache.handles = nil
}

// last: the cache is dead. What is pending is EIO (daemon.c, cachefiles_daemon_release); what comes after fails too.
func (d *device) last() {
	d.dead = true
	pending := d.requests
	d.requests = nil
	for _, r := range pending {
		r.finish(errRead)
	}
}

func (d *device) obligations() []fscache.Pending {
	var list []fscache.Pending
	for _, r := range d.requests {
		if r.read {
			list = append(list, fscache.Pending{Op: r.op, Object: r.key, Off: r.off, Len: r.n, ID: r.number, Handle: uint32(max(r.object.id, 0))})
		}
	}
	return list
}
