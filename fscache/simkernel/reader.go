package simkernel

import (
	"context"
	"fmt"

	"holdfast/fscache"
)

// A Reader is a process in read(2) on a file of a mounted image. It needs no goroutine: what it waits for takes it on.
type Reader struct {
	k     *Kernel
	m     *mount
	key   fscache.Key
	p     []byte
	off   int64
	at    int64 // the page it has come to
	alone bool  // what was read ahead failed: now the one page that is needed
	wait  waiter
	ended bool
	err   error
	end   chan struct{} // closed at the end; nil: nobody asked
}

// StartRead begins to fill p from byte off of the file of blob key in the image mounted on dir.
func (k *Kernel) StartRead(dir string, key fscache.Key, p []byte, off int64) (*Reader, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.startRead(dir, key, p, off, nil)
}

func (k *Kernel) startRead(dir string, key fscache.Key, p []byte, off int64, end chan struct{}) (*Reader, error) {
	m, f, err := k.find(dir, key)
	if err != nil {
		return nil, err
	}
	if off < 0 || off+int64(len(p)) > f.size {
		return nil, fmt.Errorf("read %s at %d: past the end", key, off)
	}
	r := &Reader{k: k, m: m, key: key, p: p, off: off, at: off &^ (page - 1), end: end}
	m.open++
	r.step()
	k.changed.Broadcast()
	return r, nil
}

// Read is StartRead, and the wait for the end. The error is EIO as the kernel's, or ctx's: the reader was killed.
func (k *Kernel) Read(ctx context.Context, dir string, key fscache.Key, p []byte, off int64) error {
	end := make(chan struct{})
	k.mu.Lock()
	r, err := k.startRead(dir, key, p, off, end)
	k.mu.Unlock()
	if err != nil {
		return err
	}
	select {
	case <-end:
	case <-ctx.Done():
		r.kill(ctx.Err())
	}
	_, err = r.Ended()
	return err
}

// Ended says whether the read is over, and its error. Until it is, p must be left alone.
func (r *Reader) Ended() (bool, error) {
	r.k.mu.Lock()
	defer r.k.mu.Unlock()
	return r.ended, r.err
}

// Kill kills the process. A read that is over stays as it ended: an answer that came before the signal wins
// (fanotify_get_response; ondemand.c:589).
func (r *Reader) Kill() { r.kill(context.Canceled) }

func (r *Reader) kill(err error) {
	r.k.mu.Lock()
	defer r.k.mu.Unlock()
	if r.ended {
		return
	}
	r.k.low.cancel(&r.wait)
	r.finish(err)
}

func (r *Reader) finish(err error) {
	r.ended, r.err = true, err
	r.m.open--
	if r.end != nil {
		close(r.end)
	}
}

// step goes on until something has to be waited for. The kernel asks for the pages of p that it does not have, as one range.
func (r *Reader) step() {
	end, cached := r.off+int64(len(r.p)), r.m.cache[r.key]
	for r.at < end && cached[r.at] != nil {
		r.at += page
	}
	if r.at >= end {
		for at := r.off; at < end; {
			first := at &^ (page - 1)
			at += int64(copy(r.p[at-r.off:], cached[first][at-first:]))
		}
		r.finish(nil)
		return
	}
	if r.m.lost {
		r.finish(errRead)
		return
	}
	to := r.at + page
	for to < end && cached[to] == nil {
		to += page
	}
	r.load(to)
}

// load brings [at, to) into the page cache, or at least its first page: what read-ahead failed to get is tried once
// more for the page that is needed (mm/filemap.c, filemap_get_pages: page_cache_sync_ra, then filemap_update_page).
func (r *Reader) load(to int64) {
	r.wait.again = !r.alone
	r.k.low.fetch(&r.wait, r.key, r.at, to-r.at, func(err error) {
		switch {
		case r.m.lost:
			r.finish(errRead)
		case err == nil:
			r.alone = false
			r.cache(to)
			r.step()
		case r.alone:
			r.finish(err)
		default:
			r.alone = true
			r.load(r.at + page)
		}
	})
}

// cache copies pages of the cache file as they are now.
func (r *Reader) cache(to int64) {
	f := r.k.files[r.key]
	for at := r.at; at < to; at += page {
		b := f.pages[at]
		if b == nil {
			b = make([]byte, page) // a hole is zeros
		}
		r.m.cache[r.key][at] = b
	}
}
