package daemon

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"go.uber.org/zap"

	"holdfast/fscache"
	"holdfast/rafs/image"
	"holdfast/state"
)

// Defaults of [Options].
const (
	DefaultReadAhead    = 1 << 20
	DefaultReadDeadline = 5 * time.Minute
	DefaultStreams      = 8
	DefaultStopTimeout  = 10 * time.Second

	DefaultSpaceDeadline = 30 * time.Second
)

// Options say what a daemon works with. Engine, Log, Root and Socket are required.
type Options struct {
	Engine       fscache.Engine // the daemon closes it
	EngineReason string         // why this engine was chosen, for the status
	Log          *zap.Logger
	Release      string // this program's release, recorded in the state
	Root         string // absolute: state.db and images/<digest>; made if missing
	Socket       string // absolute path of the API's socket; its directory is made if missing
	Image        image.Options
	Ready        func() // called once, when the kernel and the API are being served; may be nil

	// What Attach fills in. Without a Session nothing is recorded of this boot, and without a Supervisor nobody is told anything.
	Session    *state.Session // the daemon closes it
	Inbox      *state.Inbox   // the daemon closes it, after the engine
	Holder     *Holder
	Supervisor Supervisor
	Fresh      bool            // the lifeline is this process's own
	Bereft     bool            // mounts on record were made under another lifeline than this one, and are lost
	Boxes      []state.ReadBox // inboxes of dead daemons, which the engine has read
	Damaged    []string        // what was found damaged before the daemon was made

	Listener net.Listener  // of the API, which the daemon closes; nil: the daemon makes one at Socket
	Remount  Remount       // what to do about mounts of an earlier boot
	IdleExit time.Duration // end when nothing was asked for so long; 0: never
	Watchdog time.Duration // tell the supervisor so often that the daemon lives; 0: it does not ask
	Upgrade  *UpgradeOptions

	ReadAhead    int64         // bytes fetched from the start of the chunk a reader misses, in whole chunks
	ReadDeadline time.Duration // how long a reader is made to wait for its source before it gets EIO
	Streams      int           // fetches at a time that readers of one object may cause
	StopTimeout  time.Duration // how long Run waits for requests in flight once it is told to stop
	Prefetch     bool          // prefetch after mounting, where the mount does not say
	PrefetchBPS  int64         // prefetch at most so many bytes a second and mount, where the mount does not say; 0: no limit

	ScrubRate int64 // compare what is cached of complete objects with its digests, so many bytes a second; 0: not

	Limits        fscache.Limits   // how much room the cache leaves free; DefaultLimits if zero
	DomainQuota   map[string]int64 // bytes that a domain's objects may take; AllDomains: of each that is not named
	CullMounted   bool             // cull what nobody has read of mounted images too; then the kernel goes on asking about complete objects
	SpaceDeadline time.Duration    // how long a reader is made to wait for room in the cache before it gets ENOSPC (EIO where there is no other error)

	made func(*Daemon) // gets what was made of them before it is used: a test puts things of its own in place of the host's; may be nil
}

// complete fills in defaults and refuses what cannot work.
func (o *Options) complete() error {
	def := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
	}
	streams := int64(o.Streams)
	def(&o.ReadAhead, DefaultReadAhead)
	def((*int64)(&o.ReadDeadline), int64(DefaultReadDeadline))
	def((*int64)(&o.StopTimeout), int64(DefaultStopTimeout))
	def((*int64)(&o.SpaceDeadline), int64(DefaultSpaceDeadline))
	def(&streams, DefaultStreams)
	if o.Limits == (fscache.Limits{}) {
		o.Limits = fscache.DefaultLimits
	}
	o.Streams = int(streams)
	switch {
	case o.Engine == nil || o.Log == nil:
		return errors.New("daemon: no engine or no log given")
	case !filepath.IsAbs(o.Root) || !filepath.IsAbs(o.Socket):
		return fmt.Errorf("daemon: root %q and socket %q must be absolute paths", o.Root, o.Socket)
	case o.ReadAhead < 0 || o.ReadAhead > maxReadAhead:
		return fmt.Errorf("daemon: read-ahead of %d bytes: want 1 to %d", o.ReadAhead, maxReadAhead)
	case o.ReadDeadline < 0 || o.StopTimeout < 0 || o.Streams < 0 || o.Streams > maxStreams:
		return fmt.Errorf("daemon: read deadline %v, stop timeout %v and %d streams: none may be negative, nor streams over %d", o.ReadDeadline, o.StopTimeout, o.Streams, maxStreams)
	case o.ScrubRate < 0:
		return fmt.Errorf("daemon: scrub rate of %d bytes a second is negative", o.ScrubRate)
	case o.SpaceDeadline < 0:
		return fmt.Errorf("daemon: space deadline of %v is negative", o.SpaceDeadline)
	case o.CullMounted && o.Engine.AsksForBootstrap():
		return fmt.Errorf("daemon: nothing of a mounted image can be culled with the %s engine, whose kernel does not say what it reads of the cache: cull unmounted images only, or use the fanotify engine", o.Engine.Name())
	case o.PrefetchBPS < 0:
		return fmt.Errorf("daemon: prefetch limit of %d bytes a second is negative", o.PrefetchBPS)
	}
	for domain, n := range o.DomainQuota {
		if n < 0 {
			return fmt.Errorf("daemon: quota of %d bytes of domain %q is negative", n, domain)
		}
	}
	if err := o.Limits.Check(); err != nil {
		return fmt.Errorf("daemon: %w", err)
	}
	return nil
}

// Bounds of [Options]: what one image may make the daemon fetch at once that nobody asked for.
const (
	maxReadAhead = 64 << 20
	maxStreams   = 256
)
