package simkernel

import (
	"context"
	"fmt"
	"slices"
	"syscall"

	"holdfast/fscache"
)

// device is /dev/cachefiles in on-demand mode (fs/cachefiles/ondemand.c).
type device struct {
	k        *Kernel
	dead     bool
	objects  map[fscache.Key]*kobject // in use by a mount
	requests []*request               // by number, ascending (the reqs xarray)
	lastID   uint64
	nextID   uint64 // where the search for the next request to hand out starts (req_id_next)
}

// A kobject is the kernel's object, shared by all mounts of a domain (fs/erofs/fscache.c, erofs_domain_register_cookie).
type kobject struct {
	users int
	state objectState
}

type objectState int

const (
	objectClosed objectState = iota
	objectReopening
	objectOpen
)

// opened writes restore: everything pending is handed out once more (ondemand.c:285).
func (d *device) opened(*Engine) {
	for _, r := range d.requests {
		r.read = false
	}
}

// closed: objects whose descriptor went are closed (ondemand.c:37), and pending CLOSEs end (:42). With the last holder
// the cache is dead: everything pending, and everything after, is EIO (daemon.c, cachefiles_daemon_release).
func (d *device) closed(_ *Engine, last bool) {
	for _, o := range d.objects {
		o.state = objectClosed
	}
	d.requests = slices.DeleteFunc(d.requests, func(r *request) bool {
		if r.op == fscache.OpClose {
			r.done <- nil
		}
		return r.op == fscache.OpClose
	})
	if !last {
		return
	}
	d.dead = true
	for _, r := range d.requests {
		r.done <- errRead
	}
	d.requests = nil
}

func (d *device) add(*Engine, fscache.Key) {}

func (d *device) complete(fscache.Key) {}

// writable: there is a descriptor while the object is open or its OPEN was handed out; writes before copen are ENOBUFS.
func (d *device) writable(_ *Engine, k fscache.Key) bool {
	o := d.objects[k]
	return o != nil && o.state == objectOpen
}

// mount opens the image's objects, the bootstrap first, and reads the super block.
func (d *device) mount(ctx context.Context, m *mount) error {
	if d.k.used(m.Bootstrap.Key) {
		return syscall.EEXIST // fs/erofs/fscache.c, erofs_fscache_acquire_cookie: an fsid once in a domain
	}
	var opened []fscache.Key
	err := func() error {
		for _, k := range m.objects() {
			if err := d.open(ctx, k); err != nil {
				return err
			}
			opened = append(opened, k)
		}
		return d.fetch(ctx, m.Bootstrap.Key, 0, page)
	}()
	if err != nil {
		d.release(opened)
	}
	return err
}

// open makes a mount a user of an object. Only the first asks; it waits for copen.
func (d *device) open(ctx context.Context, k fscache.Key) error {
	if o := d.objects[k]; o != nil {
		o.users++
		return nil
	}
	o := &kobject{users: 1}
	d.objects[k] = o
	err := d.send(ctx, newRequest(fscache.OpOpen, k, 0, 0))
	if err != nil {
		delete(d.objects, k)
		return fmt.Errorf("object %s: %w", k, err)
	}
	return nil
}

func (d *device) unmount(m *mount) { d.release(m.objects()) }

// release drops a user; the last one's going is told by CLOSE, which nobody waits for but a worker.
func (d *device) release(keys []fscache.Key) {
	for _, k := range keys {
		o := d.objects[k]
		if o.users--; o.users > 0 {
			continue
		}
		delete(d.objects, k)
		if o.state == objectOpen && !d.dead { // ondemand.c:548
			d.enqueue(newRequest(fscache.OpClose, k, 0, 0))
		}
	}
}

// fetch asks for the holes of a range one after the other (io.c, cachefiles_do_prepare_read). What has data is read
// without the daemon; a hole that is still one after its answer is an error, not zeros (NETFS_READ_HOLE_FAIL: the
// search is repeated without NETFS_SREQ_ONDEMAND).
func (d *device) fetch(ctx context.Context, k fscache.Key, off, n int64) error {
	f := d.k.files[k]
	for at := off; at < off+n; {
		if f.pages[at] != nil {
			at += page
			continue
		}
		end := at
		for end < off+n && f.pages[end] == nil {
			end += page
		}
		if err := d.send(ctx, newRequest(fscache.OpRead, k, at, end-at)); err != nil {
			return err
		}
		if f.pages[at] == nil {
			return errRead
		}
	}
	return nil
}

// send queues a request and waits, killably (ondemand.c:584). A killed waiter takes its request back (:589).
func (d *device) send(ctx context.Context, r *request) error {
	if d.dead {
		return errRead // :499
	}
	d.enqueue(r)
	err, killed := d.k.wait(ctx, r)
	if killed {
		d.remove(r)
	}
	return err
}

// enqueue gives a request the next message id; ids are not used again soon (:556).
func (d *device) enqueue(r *request) {
	d.lastID++
	r.number = d.lastID
	d.requests = append(d.requests, r)
}

func (d *device) remove(r *request) {
	if i := slices.Index(d.requests, r); i >= 0 {
		d.requests = slices.Delete(d.requests, i, i+1)
	}
}

// next hands out the first new request from nextID on, round to the start (:430). A READ of a closed object makes the
// kernel ask to open it, and waits for that (:388).
func (d *device) next(*Engine) *request {
	for _, r := range slices.Clone(d.requests) {
		o := d.objects[r.key]
		if r.read || r.op != fscache.OpRead || o == nil || o.state != objectClosed {
			continue
		}
		o.state = objectReopening
		d.enqueue(newRequest(fscache.OpOpen, r.key, 0, 0))
	}
	r := d.selectFrom(d.nextID)
	if r == nil {
		r = d.selectFrom(0)
	}
	if r == nil {
		return nil
	}
	r.read = true
	d.nextID = r.number + 1
	if r.op == fscache.OpClose { // not answered: done when read (:477)
		d.remove(r)
	}
	return r
}

func (d *device) selectFrom(id uint64) *request {
	for _, r := range d.requests {
		if r.number < id || r.read {
			continue
		}
		if o := d.objects[r.key]; r.op == fscache.OpRead && o != nil && o.state == objectReopening {
			continue // :393
		}
		return r
	}
	return nil
}

// answer is copen or READ_COMPLETE. A READ has no error answer: completed, it fails its reader by what it left a hole.
// EINVAL, for a request that is gone (:194), is ErrGone.
func (d *device) answer(_ *Engine, number uint64, e fscache.Errno) error {
	i := slices.IndexFunc(d.requests, func(r *request) bool { return r.number == number })
	if i < 0 {
		return fscache.ErrGone
	}
	r := d.requests[i]
	d.requests = slices.Delete(d.requests, i, i+1)
	if r.op == fscache.OpOpen {
		if o := d.objects[r.key]; o != nil {
			o.state = objectClosed
			if e == fscache.OK {
				o.state = objectOpen
			}
		}
		r.done <- errnoOf(e)
		return nil
	}
	r.done <- nil
	return nil
}
