package enginetest

import (
	"context"
	"errors"
	"strings"
	"testing"

	"holdfast/fscache"
)

func cullDeletesWhatNobodyUses(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a, b := blob("d", "a"), blob("d", "b")
	ctx := context.Background()
	if err := r.e.Cull(ctx, a.Key); err != nil {
		t.Errorf("Cull of what never was: %v", err)
	}
	dir := r.mount("image", a, b)
	r.write(a.Key, 0, 16*page)
	r.write(b.Key, 0, 16*page)
	if err := r.e.Cull(ctx, a.Key); !errors.Is(err, fscache.ErrBusy) {
		t.Errorf("Cull while mounted: %v, want ErrBusy", err)
	}
	if n, err := r.e.Usage(a.Key); err != nil || n < 16*page {
		t.Errorf("Usage: %d, %v, want %d or more", n, err, 16*page)
	}
	r.unmount(dir)
	if err := r.e.Cull(ctx, a.Key); !errors.Is(err, fscache.ErrBusy) {
		t.Errorf("Cull of what is added: %v, want ErrBusy", err)
	}
	for _, o := range []fscache.Object{a, b} {
		if err := eventually(func() error { return r.e.Remove(o.Key) }); err != nil {
			t.Fatalf("Remove: %v", err)
		}
	}
	for range 2 {
		if err := eventually(func() error { return r.e.Cull(ctx, a.Key) }); err != nil {
			t.Fatalf("Cull: %v", err)
		}
	}
	if n, err := r.e.Usage(a.Key); err != nil || n != 0 {
		t.Errorf("Usage after Cull: %d, %v, want 0", n, err)
	}
	dir = r.mount("image2", a, b)
	if have, err := r.e.Present(a.Key); err != nil || len(have) != 0 {
		t.Errorf("Present after Cull: %v, %v", have, err)
	}
	if have, err := r.e.Present(b.Key); err != nil || len(have) != 1 {
		t.Errorf("Present of another object: %v, %v, want what was written", have, err)
	}
	done := r.read(dir, a.Key, 0, page)
	r.fill(r.request())
	r.get(done, a.Key, 0)
	r.serve()
	r.get(r.read(dir, b.Key, 0, page), b.Key, 0)
}

// What a predecessor mounted is in use, though this process has not added it.
func cullOfWhatAnotherProcessMounted(t *testing.T, h Harness) {
	r := newRig(t, h)
	r.start(1)
	a := blob("d", "a")
	dir := r.mount("image", a)
	r.write(a.Key, 0, 16*page)
	left, mounts := r.handOver()

	s := takeOver(t, h, r.store, left)
	if err := s.e.Cull(context.Background(), a.Key); !errors.Is(err, fscache.ErrBusy) {
		t.Errorf("Cull of what a predecessor mounted: %v, want ErrBusy", err)
	}
	s.adopt(r, mounts)
	s.serve()
	s.get(s.read(dir, a.Key, 0, 32*page), a.Key, 0)
	if space, err := s.e.Space(); err != nil || space.Total <= 0 || space.Free < 0 || space.Free > space.Total {
		t.Errorf("Space: %+v, %v", space, err)
	}
}

func cullRefusesBadNames(t *testing.T, h Harness) {
	r := newRig(t, h)
	for _, bad := range []string{"", ".", "..", "/", "a/b", "../a", "/etc/passwd", "a\x00b", strings.Repeat("n", 256)} {
		for _, k := range []fscache.Key{{Domain: "d", ID: bad}, {Domain: bad, ID: "a"}} {
			if err := r.e.Cull(context.Background(), k); err == nil {
				t.Errorf("Cull of %q succeeded", k)
			}
		}
	}
}
