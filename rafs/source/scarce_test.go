package source

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"syscall"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// withoutDescriptors calls f while the process may open nothing.
func withoutDescriptors(t *testing.T, f func()) {
	t.Helper()
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 0, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &old); err != nil {
			t.Fatal(err)
		}
	}()
	f()
}

func TestWithoutDescriptorsAnotherTryIsWorthwhile(t *testing.T) {
	data := pattern(100)
	s := startServer(t, "")
	digest := s.put(data)
	repo := s.client(Options{})
	defer repo.Close()
	file := NewFile(writeBlob(t, data), 100)
	defer file.Close()
	for _, src := range []Source{file, repo.Blob(digest, 100)} {
		t.Run(fmt.Sprintf("%T", src), func(t *testing.T) {
			withoutDescriptors(t, func() {
				if _, err := readRange(t.Context(), src, 10, 20); !errors.Is(err, syscall.EMFILE) || IsPermanent(err) {
					t.Errorf("without: %v (permanent: %v), want EMFILE that is not", err, IsPermanent(err))
				}
			})
			if got, err := readRange(t.Context(), src, 10, 20); err != nil || !bytes.Equal(got, data[10:30]) {
				t.Errorf("with: %d bytes, %v", len(got), err)
			}
		})
	}
}

func TestAnswerToTheFallbackDoesNotHideThatNoDescriptorWasLeft(t *testing.T) {
	https := &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("socket", syscall.EMFILE)}
	http := &transport.Error{StatusCode: http.StatusBadRequest} // "Client sent an HTTP request to an HTTPS server."
	if err := clean(errors.Join(https, http)); IsPermanent(err) {
		t.Errorf("%v is permanent", err)
	}
	if err := clean(errors.Join(io.ErrUnexpectedEOF, http)); !IsPermanent(err) {
		t.Errorf("%v is not permanent", err)
	}
}
