package simkernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"holdfast/fscache"
)

// Name is the engine's name.
const Name = "simkernel"

// An Engine is a process that has a Kernel's interface open. Make one with Kernel.Open. All fields are guarded by
// Kernel.mu.
type Engine struct {
	k       *Kernel
	frozen  bool                  // Next is over
	closed  bool                  // everything is; implies frozen
	added   map[fscache.Key]int64 // sizes
	quiet   map[fscache.Key]bool  // fanotify: files it has a descriptor of that raises no events
	pending map[uint64]uint64     // tokens by number
	token   uint64
}

var _ fscache.Engine = (*Engine)(nil)

// Name implements fscache.Engine.
func (e *Engine) Name() string { return Name }

// Lifeline implements fscache.Engine: there is no descriptor here; see Kernel.SetKept.
func (e *Engine) Lifeline() (string, *os.File) { return Name, nil }

func checkName(s string) error {
	if s == "" || s == "." || s == ".." || len(s) > 255 || strings.ContainsAny(s, "/\x00") {
		return fmt.Errorf("%.20q cannot be a name", s)
	}
	return nil
}

// Add implements fscache.Engine.
func (e *Engine) Add(ctx context.Context, o fscache.Object) error {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if e.closed {
		return fscache.ErrClosed
	}
	if err := errors.Join(ctx.Err(), checkName(o.Key.Domain), checkName(o.Key.ID)); err != nil {
		return err
	}
	if o.Size <= 0 || o.Size%page != 0 {
		return fmt.Errorf("object %s: size %d is not of whole blocks", o.Key, o.Size)
	}
	f := e.k.files[o.Key]
	if f == nil {
		f = &file{size: o.Size, pages: make(map[int64][]byte)}
		e.k.files[o.Key] = f
	}
	if f.size != o.Size {
		return fmt.Errorf("object %s has %d bytes, not %d", o.Key, f.size, o.Size)
	}
	if _, again := e.added[o.Key]; !again {
		e.added[o.Key] = o.Size
		e.k.low.add(e, o.Key)
	}
	return nil
}

// file finds what was added; k.mu is held.
func (e *Engine) file(k fscache.Key) (*file, error) {
	if e.closed {
		return nil, fscache.ErrClosed
	}
	if _, ok := e.added[k]; !ok {
		return nil, fmt.Errorf("object %s: %w", k, fscache.ErrUnknown)
	}
	return e.k.files[k], nil
}

// with runs op on the file of an object that was added.
func (e *Engine) with(k fscache.Key, op func(f *file) error) error {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	f, err := e.file(k)
	if err != nil {
		return err
	}
	return op(f)
}

// Remove implements fscache.Engine.
func (e *Engine) Remove(k fscache.Key) error {
	return e.with(k, func(*file) error {
		if e.k.used(k) {
			return fmt.Errorf("object %s is mounted: %w", k, fscache.ErrBusy)
		}
		e.k.low.complete(k)
		delete(e.added, k)
		delete(e.quiet, k)
		return nil
	})
}

// Complete implements fscache.Engine.
func (e *Engine) Complete(k fscache.Key) error {
	return e.with(k, func(*file) error {
		e.k.low.complete(k)
		return nil
	})
}

// WriteAt implements fscache.Engine.
func (e *Engine) WriteAt(k fscache.Key, p []byte, off int64) error {
	return e.with(k, func(f *file) error {
		if err := f.check(off, int64(len(p)), true); err != nil {
			return err
		}
		if !e.k.low.writable(e, k) {
			return fmt.Errorf("object %s: %w", k, fscache.ErrNotOpen)
		}
		for i := int64(0); i < int64(len(p)); i += page {
			b := make([]byte, page)
			copy(b, p[i:])
			f.pages[off+i] = b
		}
		return nil
	})
}

// unsupported is what the cachefiles interface cannot do: its descriptors are for writing only.
func (e *Engine) unsupported(what string) error {
	if _, ok := e.k.low.(*device); ok {
		return fmt.Errorf("%s through /dev/cachefiles: %w", what, errors.ErrUnsupported)
	}
	return nil
}

// ReadAt implements fscache.Engine.
func (e *Engine) ReadAt(k fscache.Key, p []byte, off int64) error {
	return e.with(k, func(f *file) error {
		if err := e.unsupported("reading"); err != nil {
			return err
		}
		if err := f.check(off, int64(len(p)), false); err != nil {
			return err
		}
		if !e.quiet[k] {
			return fmt.Errorf("object %s: %w", k, fscache.ErrNotOpen)
		}
		clear(p)
		for i := range p {
			at := off + int64(i)
			if b := f.pages[at&^(page-1)]; b != nil {
				p[i] = b[at&(page-1)]
			}
		}
		return nil
	})
}

// Present implements fscache.Engine.
func (e *Engine) Present(k fscache.Key) (extents []fscache.Extent, err error) {
	err = e.with(k, func(f *file) error {
		extents = f.present()
		return nil
	})
	return extents, err
}

// Drop implements fscache.Engine.
func (e *Engine) Drop(k fscache.Key, x fscache.Extent) error {
	return e.with(k, func(f *file) error {
		if err := e.unsupported("punching holes"); err != nil {
			return err
		}
		if err := f.check(x.Off, x.Len, true); err != nil {
			return err
		}
		for at := x.Off; at < x.Off+x.Len; at += page {
			delete(f.pages, at)
		}
		return nil
	})
}

// Sync implements fscache.Engine; there is no power to fail.
func (e *Engine) Sync(k fscache.Key) error {
	return e.with(k, func(*file) error { return nil })
}

// AsksForBootstrap implements fscache.Engine.
func (e *Engine) AsksForBootstrap() bool {
	_, ok := e.k.low.(*device)
	return ok
}

// Mount implements fscache.Engine.
func (e *Engine) Mount(ctx context.Context, m fscache.Mount) error {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if err := e.k.checkMountPoint(m.Dir); err != nil {
		return err
	}
	objects := m.Blobs
	if e.AsksForBootstrap() {
		objects = append([]fscache.Object{m.Bootstrap}, m.Blobs...)
	}
	for _, o := range objects {
		if _, err := e.file(o.Key); err != nil {
			return fmt.Errorf("mounting on %s: %w", m.Dir, err)
		}
	}
	return e.k.mountOn(ctx, m)
}

// Unmount implements fscache.Engine.
func (e *Engine) Unmount(ctx context.Context, dir string) error {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	return e.k.unmount(dir)
}

// Next implements fscache.Engine.
func (e *Engine) Next() (fscache.Request, error) {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	for !e.frozen {
		if r := e.k.low.next(e); r != nil {
			e.token++
			e.pending[r.number] = e.token
			return fscache.Request{Op: r.op, Object: r.key, Off: r.off, Len: r.n, ID: r.number, Token: e.token}, nil
		}
		e.k.changed.Wait()
	}
	return fscache.Request{}, fscache.ErrClosed
}

// lowestFree is the number the process's next descriptor gets. 0 to 2 are taken.
func (e *Engine) lowestFree() uint64 {
	for n := uint64(3); ; n++ {
		if _, taken := e.pending[n]; !taken {
			return n
		}
	}
}

// Answer implements fscache.Engine.
func (e *Engine) Answer(r fscache.Request, a fscache.Errno) error {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if e.closed {
		return fscache.ErrClosed
	}
	if token, ok := e.pending[r.ID]; !ok || token != r.Token {
		return fmt.Errorf("request %d of %s: %w", r.ID, r.Object, fscache.ErrAnswered)
	}
	delete(e.pending, r.ID)
	defer e.k.changed.Broadcast() // an object that opened has READs waiting
	if r.Op == fscache.OpClose {
		return nil
	}
	return e.k.low.answer(e, r.ID, a)
}

// Freeze implements fscache.Engine.
func (e *Engine) Freeze() error {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	e.frozen = true
	e.k.changed.Broadcast()
	return nil
}

// Close implements fscache.Engine: the process ends.
func (e *Engine) Close() error {
	e.k.mu.Lock()
	defer e.k.mu.Unlock()
	if e.closed {
		return nil
	}
	e.frozen, e.closed = true, true
	e.k.process = nil
	e.k.low.closed(e, !e.k.kept)
	e.k.changed.Broadcast()
	return nil
}
