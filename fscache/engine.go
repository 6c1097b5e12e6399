package fscache

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// BlockSize is the unit of every cache file: offsets and lengths of writes are multiples of it, in bytes.
const BlockSize = 4096

// A Key names a cache object: a blob, or a mount's bootstrap, in one domain (I8).
type Key struct {
	Domain string
	ID     string
}

// String returns "domain/id".
func (k Key) String() string { return k.Domain + "/" + k.ID }

// An Object is what an engine must know of a cache object before anything that uses it is mounted.
type Object struct {
	Key  Key
	Size int64 // bytes, a multiple of BlockSize
}

// A Mount says what to mount where.
type Mount struct {
	Dir           string // absolute, exists
	Bootstrap     Object // added before, where AsksForBootstrap; else not used
	BootstrapPath string // the complete bootstrap as a local file, for engines that mount it as it is
	Blobs         []Object
}

// An Op is what the kernel asks for.
type Op uint8

// Operations. OpOpen and OpClose come from cachefiles only.
const (
	OpOpen  Op = iota + 1 // what size has this object?
	OpRead                // these bytes are missing
	OpClose               // the kernel no longer uses the object; Answer only ends the request
)

// String returns the operation's name as it stands in logs.
func (o Op) String() string {
	switch o {
	case OpOpen:
		return "open"
	case OpRead:
		return "read"
	case OpClose:
		return "close"
	}
	return fmt.Sprintf("op(%d)", uint8(o))
}

// A Request is something the kernel waits for. It is answered exactly once, with [Engine.Answer], from any goroutine.
type Request struct {
	Op     Op
	Object Key
	Off    int64  // OpRead: first missing byte, as the kernel asked
	Len    int64  // OpRead: bytes; may reach past the object's end (cut it to the object's size)
	ID     uint64 // the engine's own name of the request (msg id, or event fd number): for logs and records
	Token  uint64 // the engine's, to tell a second answer from a first
}

// An Errno is an error a reader can be given. Engines that can carry only some of them map the rest, in one table each.
type Errno uint8

// The answers. OK means: the bytes are in the cache file (OpRead), or the object exists with the size it was added
// with (OpOpen).
const (
	OK Errno = iota
	EIO
	ENOSPC
	EAGAIN
)

// Sentinel errors.
var (
	ErrClosed   = errors.New("engine is closed")
	ErrGone     = errors.New("the kernel no longer waits for this request")
	ErrUnknown  = errors.New("object is not known to the engine")
	ErrNotOpen  = errors.New("object is not open in the kernel")
	ErrNoSpace  = errors.New("no space left in the cache")
	ErrAnswered = errors.New("request was answered before")
	ErrBusy     = errors.New("busy")
)

// An Extent is a byte range of a cache object.
type Extent struct{ Off, Len int64 }

// An Engine delivers the kernel's requests for data and takes the answers. All methods may be called from any
// goroutine; those that take a Key fail with [ErrUnknown] for one that was not added.
type Engine interface {
	Successor

	// Name is "cachefiles", "fanotify" or "simkernel".
	Name() string

	// Add makes an object known, and must come before any Mount that uses it. Adding it again with the same size
	// changes nothing; with another size it is an error.
	Add(ctx context.Context, o Object) error
	// Remove forgets an object that no mount in any mount namespace uses (else ErrBusy); its cached data stays. An engine that
	// took over may know so of bootstraps only, where AsksForBootstrap: a mount's goes first, and while it is busy so are
	// the mount's blobs.
	Remove(k Key) error

	// AsksForBootstrap says whether the kernel asks for a mount's bootstrap as for any object (cachefiles), or reads the
	// local file by itself (fanotify).
	AsksForBootstrap() bool
	// Mount mounts an image. With cachefiles the kernel asks for the objects while Mount runs: somebody else must be
	// in Next. It returns when ctx ends, and when the process dies nothing of it keeps the process from ending. Errors name the directory and what
	// to do.
	Mount(ctx context.Context, m Mount) error
	// Unmount is umount(2) of what Mount mounted; it fails with ErrBusy while files in it are open.
	Unmount(ctx context.Context, dir string) error

	// Next blocks until the kernel asks for something and returns it to exactly one caller. After Close, or when the
	// engine's fd fails, it returns an error (ErrClosed after Close), and always will. A malformed message of the
	// kernel's is logged and, where it can be told whose it is, answered with EIO; Next goes on.
	Next() (Request, error)
	// Freeze makes Next return ErrClosed to every caller, from now on, and loses nothing: a request that was read is
	// returned first. Everything else goes on working, so what is in flight can be answered before Close. Idempotent.
	Freeze() error
	// Answer ends a request: OK only after the bytes of [Off, Off+Len) that lie inside the object were written.
	// ErrGone: the reader was killed or the mount is gone, nothing is wrong. ErrAnswered: a bug of the caller's.
	// One read(2) may ask twice before it fails: when its read-ahead was denied, the kernel asks once more for the page.
	Answer(r Request, e Errno) error

	// WriteAt writes p, whose digest was checked, at off of the object's cache file. off and len(p) are multiples of
	// BlockSize; p should come from AlignedBuffer. It may be done again over what is there, complete or not. ErrNotOpen: cachefiles, while nothing has the object open.
	// ErrNoSpace: the cache or its file system is full.
	WriteAt(k Key, p []byte, off int64) error
	// ReadAt reads cached bytes back, without raising a request, where the engine can (fanotify, simkernel; cachefiles: an object
	// that the kernel has not opened since the cache was bound); elsewhere the error wraps errors.ErrUnsupported. A hole reads as zeros.
	ReadAt(k Key, p []byte, off int64) error
	// Share has an extent of k use the space on disk of the one of with's that begins at `at` and holds the same bytes, which the file system
	// compares itself; it returns how many bytes that is done for. Readers see no other bytes, and wait a little; both extents are written to
	// the disk first. The error wraps errors.ErrUnsupported where the engine or the file system cannot (fanotify on xfs and btrfs can).
	Share(k Key, e Extent, with Key, at int64) (int64, error)
	// Evict has the next ReadAt of an extent read the disk, where the engine can: it drops what the page cache keeps of the cache file there, as far
	// as that was written back. What a mount keeps of it in its own page cache stays. No reader notices.
	Evict(k Key, e Extent) error
	// Present returns the extents of the object's cache file that hold data, in order. What a power failure left is
	// listed too: across boots it proves nothing (I5).
	Present(k Key) ([]Extent, error)
	// Drop makes holes of an extent again, where the engine can read it back (else errors.ErrUnsupported).
	// Only for bytes no reader was given, and not after Complete (ErrBusy): the kernel would not ask about the hole.
	Drop(k Key, e Extent) error
	// Complete says that every byte of the object was written: from here on the kernel need not ask (fanotify removes its
	// mark). Calling it again changes nothing.
	Complete(k Key) error
	// Cull deletes the cached data of an object that is not added. ErrBusy: it is added, or in use in some mount namespace, or a predecessor
	// still reads. It returns nil when there is no data, so that it can be repeated; when it returns, a power failure does not bring
	// the data back. It waits for the kernel, which lets go of objects in its own time, for seconds at most, and holds nobody up but who adds
	// the same object. fanotify removes the domain's directory with its last object; of cachefiles the directories are the kernel's.
	Cull(ctx context.Context, k Key) error
	// Usage is how many bytes of the cache's file system an object's data takes, added or not; 0: it has none. What is shared counts for each.
	Usage(k Key) (int64, error)
	// Space is the room on the cache's file system.
	Space() (Space, error)

	// Sync makes what was written to the object's cache file survive a power failure, as far as the engine can.
	Sync(k Key) error
	// Flush begins to bring what was written of an extent to the disk, so that a Sync that comes later takes less time. It proves nothing:
	// errors of the disk are for Sync to find.
	Flush(k Key, e Extent) error

	// Lifeline is the fd whose last close would break every mount (the device or the group), and its name in the fd
	// store. The caller must not close it.
	Lifeline() (name string, f *os.File)
	// Close stops Next and closes the process's fds, the Lifeline last. Requests not answered stay pending in the kernel
	// if somebody else holds the Lifeline. Idempotent.
	Close() error
}

// AlignedBuffer returns n zeroed bytes that start on a BlockSize boundary of memory, as direct I/O wants them.
func AlignedBuffer(n int) []byte {
	if n <= 0 {
		return nil
	}
	b := make([]byte, n+BlockSize)
	skip := alignSkip(b)
	return b[skip : skip+n : skip+n]
}
