package handover

import (
	"errors"
	"fmt"
	"os"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// A waker watches held descriptors while no command runs: one that becomes readable has a request for it.
type waker struct {
	poll  *os.File // epoll
	woken chan struct{}
	done  chan struct{}
}

// watch starts to watch what is held and can be polled: a cachefiles device and a fanotify group can, regular files and the descriptors of cachefiles
// objects cannot (EPERM from epoll_ctl(2)). It returns nil if that is nothing. The caller closes it.
func (h *holder) watch() (*waker, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("watch what is held: %w", err)
	}
	// Non-blocking, so that the runtime watches it together with all else.
	if err := unix.SetNonblock(fd, true); err != nil {
		closeAll([]int{fd})
		return nil, fmt.Errorf("watch what is held: %w", err)
	}
	n := 0
	h.mu.Lock()
	for _, f := range h.held {
		err = unix.EpollCtl(fd, unix.EPOLL_CTL_ADD, int(f.fd), &unix.EpollEvent{Events: unix.EPOLLIN, Fd: f.fd})
		if err == nil {
			n++
		} else if !errors.Is(err, unix.EPERM) {
			break
		}
	}
	h.mu.Unlock()
	if n == 0 || err != nil && !errors.Is(err, unix.EPERM) {
		closeAll([]int{fd})
		if errors.Is(err, unix.EPERM) {
			err = nil
		}
		return nil, err
	}
	w := &waker{os.NewFile(uintptr(fd), "epoll"), make(chan struct{}), make(chan struct{})}
	raw, err := w.poll.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, w.poll.Close())
	}
	// Ends with the first readable descriptor, or with close, which waits for it.
	go func() {
		defer close(w.done)
		err := raw.Read(func(fd uintptr) bool { return readable(int(fd), h.log) })
		if err == nil {
			close(w.woken)
		}
	}()
	return w, nil
}

// readable says whether a descriptor that is watched is readable. One that is only hung up, or in error, would be so for ever: it is not
// watched any more.
func readable(poll int, log *zap.Logger) bool {
	var events [16]unix.EpollEvent
	for {
		n, err := unix.EpollWait(poll, events[:], 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return true // the command is started without being asked for, which is always right
		}
		if n == 0 {
			return false
		}
		for _, e := range events[:n] {
			if e.Events&unix.EPOLLIN != 0 {
				return true
			}
			err := unix.EpollCtl(poll, unix.EPOLL_CTL_DEL, int(e.Fd), nil)
			log.Warn("a held descriptor is hung up or in error, and is not waited for", zap.Int32("descriptor", e.Fd), zap.Error(err))
			if err != nil {
				return true
			}
		}
	}
}

func (w *waker) close() {
	_ = w.poll.Close() // nothing can be lost with it
	<-w.done
}
