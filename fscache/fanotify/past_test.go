package fanotify

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"holdfast/fscache"
	"holdfast/fscache/enginetest"
)

// A past is what outlives an engine in these tests.
type past struct {
	t     *testing.T
	dir   string
	inbox *enginetest.Inbox
	store *enginetest.Store
	e     *Engine
}

// begin opens the first engine of a past.
func begin(t *testing.T, objects ...fscache.Object) *past {
	t.Helper()
	p := &past{t: t, dir: t.TempDir(), store: enginetest.NewStore()}
	t.Cleanup(p.store.Close)
	p.open(fscache.Inherited{}, objects...)
	return p
}

func (p *past) open(left fscache.Inherited, objects ...fscache.Object) {
	p.t.Helper()
	p.inbox = enginetest.NewInbox(64, 128)
	p.e = open(p.t, Config{Dir: p.dir, Inherited: left, Inbox: p.inbox, Holder: p.store})
	for _, o := range objects {
		add(p.t, p.e, o)
	}
}

// end closes the engine as death would, and returns what it left.
func (p *past) end() fscache.Inherited {
	p.t.Helper()
	left := fscache.Inherited{Lifeline: copyOf(p.t, p.e)}
	var err error
	if left.Objects, err = p.store.Held(); err != nil { // before numbers are free
		p.t.Fatal(err)
	}
	if err := p.e.Close(); err != nil {
		p.t.Fatal(err)
	}
	left.Messages = p.inbox.Messages()
	return left
}

// blobOf names a test object.
func blobOf(id string, pages int64) fscache.Object {
	return fscache.Object{Key: fscache.Key{Domain: "d", ID: id}, Size: pages * page}
}

func (p *past) next() fscache.Request {
	p.t.Helper()
	r, err := p.e.Next()
	if err != nil {
		p.t.Fatal(err)
	}
	return r
}

// fill writes what a request asks for.
func (p *past) fill(r fscache.Request) {
	p.t.Helper()
	if err := p.e.WriteAt(r.Object, pageOf(r.Object, r.Off), r.Off); err != nil {
		p.t.Fatal(err)
	}
}

func (p *past) answer(r fscache.Request, a fscache.Errno) {
	p.t.Helper()
	if err := p.e.Answer(r, a); err != nil && !errors.Is(err, fscache.ErrGone) {
		p.t.Fatal(err)
	}
}

// pageOf is what a page of an object holds.
func pageOf(k fscache.Key, off int64) []byte {
	b := fscache.AlignedBuffer(page)
	copy(b, bytes.Repeat(fmt.Appendf(nil, "%-15s %15d\n", k, off), page/32))
	return b
}

// read starts a read of a page; nil comes if the bytes are right.
func (p *past) read(k fscache.Key, off int64) <-chan error {
	done := make(chan error, 1)
	go func() { // ends when the kernel lets it go
		f, err := os.Open(p.path(k))
		if err != nil {
			done <- err
			return
		}
		defer f.Close()
		b := make([]byte, page)
		if _, err = f.ReadAt(b, off); err == nil && !bytes.Equal(b, pageOf(k, off)) {
			err = fmt.Errorf("wrong bytes at %d of %s: %.40q", off, k, b)
		}
		done <- err
	}()
	return done
}

func (p *past) path(k fscache.Key) string { return p.dir + "/" + k.Domain + "/" + k.ID }

// asleep fails if a read ends.
func asleep(t *testing.T, done <-chan error) {
	t.Helper()
	select {
	case err := <-done:
		t.Fatalf("the reader was let go: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
}
