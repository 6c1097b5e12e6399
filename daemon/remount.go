package daemon

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"holdfast/state"
)

// A Remount says what becomes of mounts that are on record of an earlier boot.
type Remount string

// The ways to treat them. RemountYes is the default.
const (
	RemountYes    Remount = "yes"    // made again before the daemon is ready
	RemountNo     Remount = "no"     // taken off the record
	RemountReport Remount = "report" // left on record, and shown in the status
)

// ParseRemount reads one of the above.
func ParseRemount(s string) (Remount, error) {
	switch r := Remount(s); r {
	case RemountYes, RemountNo, RemountReport:
		return r, nil
	}
	return "", fmt.Errorf("%q: want yes, no or report", s)
}

var errReported = errors.New("it was mounted before the host was started anew, and --remount=report leaves it so: " +
	"holdfast umount takes it off the record, holdfast mount mounts it anew")

// remount treats the mounts of an earlier boot. The kernel is being served: mounting may need that. A mount that cannot be made stays on
// record, with the reason, and is tried again at the next start.
func (d *Daemon) remount(ctx context.Context) {
	records := d.earlier
	d.earlier = nil
	for _, r := range records {
		if d.opt.Remount == RemountNo {
			d.log.Info("mount of an earlier boot is taken off the record", zap.String("image", r.Ref), zap.String("dir", r.Dir))
			if err := d.state.ForgetMount(r.ID); err != nil {
				d.log.Error("forget a mount", zap.String("dir", r.Dir), zap.Error(err))
			}
			continue
		}
		m := &mount{record: r}
		if err := d.mounts.reserve(m); err != nil {
			d.log.Error("mount of an earlier boot", zap.String("dir", r.Dir), zap.Error(err))
			continue
		}
		err := errReported
		if d.opt.Remount != RemountReport {
			err = d.mountAgain(ctx, m)
		}
		if err != nil {
			m.broken = err.Error()
			d.log.Error("mount of an earlier boot is not there", zap.String("image", r.Ref), zap.String("dir", r.Dir), zap.Error(err))
		}
		d.mounts.give(m)
		if m.broken == "" {
			d.startPrefetch(m)
			d.log.Info("mounted again after a boot", zap.String("image", r.Ref), zap.String("dir", r.Dir))
		}
	}
}

// mountAgain mounts what was mounted before the host was started anew. What is cached of it is checked by digest (settle). A process that died
// while it did the same may have begun a mount that is only made now: it is the same one.
// ORDER: on record as of this boot before it is mounted, as in attach.
func (d *Daemon) mountAgain(ctx context.Context, m *mount) error {
	r := m.record
	if err := d.admissible(MountRequest{Image: r.Ref, Dir: r.Dir}, r.Domain); err != nil && !(r.Stage == state.StageAgain && d.seen(r.Dir)) {
		return err
	}
	boot, err := d.load(ctx, m)
	if err != nil {
		return err
	}
	m.record.Boot, m.record.Created, m.record.Stage = d.boot, time.Now().UTC(), state.StageAgain
	err = d.state.UpdateMount(m.record)
	if err == nil && !d.seen(r.Dir) {
		err = mountFailed(d.engine.Mount(ctx, d.engineMount(m, boot)))
	}
	if err != nil && !d.seen(r.Dir) {
		m.record = r
		return d.back(m, errors.Join(err, d.state.UpdateMount(r)))
	}
	return d.stage(m, "")
}

// seen reports whether an image is mounted on dir.
func (d *Daemon) seen(dir string) bool {
	points, err := d.mountPoints()
	return err == nil && points[dir] == fsType
}

// back undoes load.
func (d *Daemon) back(m *mount, err error) error {
	e := d.letGo(m)
	if m.image != nil {
		e = errors.Join(e, m.image.Close())
	}
	m.image, m.bootstrap, m.blobs = nil, nil, nil
	return errors.Join(err, e)
}
