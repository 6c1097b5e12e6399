package daemon

import (
	"context"
	"errors"
	"io"
	"testing"

	"holdfast/fscache/simkernel"
	"holdfast/rafs"
	"holdfast/rafs/source"
)

func TestAnyImagesSourceMayFillASharedObject(t *testing.T) {
	gone := source.Permanent(errors.New("no such blob"))
	wrong := func(_ context.Context, _, n int64, _ io.Reader) (io.Reader, error) {
		return io.LimitReader(zeroReader{}, n), nil
	}
	for name, bad := range map[string]func(context.Context, int64, int64, io.Reader) (io.Reader, error){
		"refuses":     refuse(gone),
		"fails":       refuse(errBroken),
		"wrong bytes": wrong,
	} {
		t.Run(name, func(t *testing.T) {
			eachMode(t, func(t *testing.T, mode simkernel.Mode) {
				r := newRig(t, mode, func(o *Options) { o.ReadAhead = 1 })
				defer r.close()
				first, second := newBlob("aa", 1, rafs.CodecNone, many(4, 64*kib)...), newBlob("aa", 1, rafs.CodecNone, many(4, 64*kib)...)
				defer r.mount(nil, first)()
				unmount := r.mount(nil, second)
				first.setBefore(bad)
				r.wantOK(first, 0, 4*kib)
				unmount()
				second.asked()
				if name != "fails" { // which ends at the deadline only
					r.wantError(first, 192*kib, 4*kib)
				}
				if n := len(second.asked()); n > 0 {
					t.Errorf("the source of an image that is gone was asked %d times", n)
				}
			})
		})
	}
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// refuse is a source that gives nothing but an error.
func refuse(err error) func(context.Context, int64, int64, io.Reader) (io.Reader, error) {
	return func(context.Context, int64, int64, io.Reader) (io.Reader, error) { return nil, err }
}
