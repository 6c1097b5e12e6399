package daemon

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"holdfast/fscache"
	"holdfast/state"
)

// A StateReport is all that is on record, and where that, the supervisor and the kernel disagree.
type StateReport struct {
	State    state.StateExport   `json:"state"`    // state.db: survives the host
	Session  state.SessionExport `json:"session"`  // session.db: this boot's
	Findings []Finding           `json:"findings"` // empty: all agree
}

// A Finding is a disagreement.
type Finding struct {
	What string `json:"what"` // of what there is one: mount, object, request, supervisor, record
	Name string `json:"name"`
	Says string `json:"says"` // who says what
	Do   string `json:"do"`   // what to do about it
}

// String returns the finding for people.
func (f Finding) String() string { return fmt.Sprintf("%s %s: %s: %s", f.What, f.Name, f.Says, f.Do) }

// report exports the state and compares it. What changes while it looks may be found to disagree: look again.
func (d *Daemon) report(ctx context.Context) (r StateReport, err error) {
	if r.State, err = d.state.Export(); err != nil {
		return r, err
	}
	if r.Session, err = d.opt.Session.Export(); err != nil {
		return r, err
	}
	points, err := d.mountPoints()
	if err != nil {
		return r, err
	}
	r.Findings = CompareMounts(r.State, d.boot, points)
	r.Findings = append(r.Findings, compareDamage(r)...)
	r.Findings = append(r.Findings, d.compareObjects(r.Session)...)
	r.Findings = append(r.Findings, d.compareRequests(r.Session)...)
	if err := d.opt.Supervisor.Verify(ctx); err != nil {
		r.Findings = append(r.Findings, Finding{"supervisor", "fd store", err.Error(),
			"restart the daemon (mounts stay): it puts the record in order by what the supervisor gives back"})
	}
	return r, nil
}

// CompareMounts compares the mounts on record with what is mounted: file system types by mount point, of the caller's mount namespace.
func CompareMounts(s state.StateExport, boot string, points map[string]string) (list []Finding) {
	for _, m := range s.Mounts {
		switch there := points[m.Dir] == fsType; {
		case m.Stage == state.StageOffline && m.Boot != boot: // it went with its boot
		case m.Stage == state.StageOffline && !there:
			list = append(list, Finding{"mount", m.Dir, "is on record as mounted without a daemon, and not mounted here",
				"none needed if another mount namespace uses it; else holdfast umount takes it off the record"})
		case m.Boot != boot && !there:
			list = append(list, Finding{"mount", m.Dir, "is on record of an earlier boot and was not made again",
				"see holdfast status for the reason; holdfast umount takes it off the record"})
		case !there:
			list = append(list, Finding{"mount", m.Dir, "is on record and not mounted here",
				"none needed if another mount namespace uses it; else it goes within seconds, with the next mount or umount, or when the daemon is restarted"})
		}
	}
	return list
}

func compareDamage(r StateReport) (list []Finding) {
	for _, d := range append(slices.Clone(r.State.Damaged), r.Session.Damaged...) {
		list = append(list, Finding{"record", d.Bucket + "/" + d.Key, "was damaged and is set aside", "report it; nothing uses it"})
	}
	return list
}

// compareObjects compares the record of held descriptors with what the engine has and what was given to the supervisor.
func (d *Daemon) compareObjects(s state.SessionExport) (list []Finding) {
	open := map[heldKey]bool{}
	for _, h := range d.engine.Holding() {
		open[heldKey{h.Object.Key, h.Handle}] = true
	}
	names := d.opt.Holder.byKey()
	recorded := map[heldKey]bool{}
	for _, o := range s.Objects {
		k := heldKey{fscache.Key{Domain: o.Domain, ID: o.ID}, o.Handle}
		recorded[k] = true
		switch {
		case names[k] != o.Name:
			list = append(list, Finding{"object", k.key.String(), fmt.Sprintf("is on record as held under %q, and was given to the supervisor as %q", o.Name, names[k]), "restart the daemon"})
		case !open[k]:
			list = append(list, Finding{"object", k.key.String(), "is held by the supervisor and the engine has it no more", "restart the daemon: it lets go of it"})
		}
	}
	for k, name := range names {
		if !recorded[k] {
			list = append(list, Finding{"object", k.key.String(), fmt.Sprintf("is held under %q and not on record", name), "restart the daemon: it lets go of it, and the kernel asks anew"})
		}
	}
	return list
}

// compareRequests finds requests on record that the engine has not, which are answered.
func (d *Daemon) compareRequests(s state.SessionExport) (list []Finding) {
	pending := map[fscache.Pending]bool{}
	for _, p := range d.engine.Pending() {
		pending[p] = true
	}
	for _, q := range s.Pending {
		if !pending[recorded(q)] {
			list = append(list, Finding{"request", fmt.Sprint(q.Number), "is on record as in flight and was answered", "none: the record follows within a moment"})
		}
	}
	return list
}

// ExportOffline reads what is on record while no daemon runs, and compares the mounts, which is all that can be compared then.
func ExportOffline(root, run string) (r StateReport, err error) {
	if r.State, err = state.ReadState(filepath.Join(root, "state.db")); err != nil {
		return r, err
	}
	if r.Session, err = state.ReadSession(filepath.Join(run, sessionFile)); err != nil {
		return r, err
	}
	boot, err := state.BootID()
	if err != nil {
		return r, err
	}
	points, err := mountPoints()
	if err != nil {
		return r, err
	}
	r.Findings = append(CompareMounts(r.State, boot, points), compareDamage(r)...)
	return r, nil
}

// Records follow what happens within a moment: what is still found after so many more looks is a disagreement.
const (
	checkLooks = 4
	checkPause = 25 * time.Millisecond
)

func (d *Daemon) getState(r *http.Request) (int, any, error) {
	if err := noQuery(r); err != nil {
		return 0, nil, err
	}
	if d.opt.Session == nil || d.opt.Supervisor == nil {
		return 0, nil, notFound("", "this daemon keeps no session")
	}
	report, err := d.report(r.Context())
	for range checkLooks {
		if err != nil || len(report.Findings) == 0 || sleep(r.Context(), checkPause) != nil {
			break
		}
		report, err = d.report(r.Context())
	}
	slices.SortFunc(report.Findings, func(a, b Finding) int {
		return cmp.Or(strings.Compare(a.What, b.What), strings.Compare(a.Name, b.Name))
	})
	if report.Findings == nil {
		report.Findings = []Finding{}
	}
	return http.StatusOK, report, err
}
