package power

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// logSize bounds what is written to the disk in one load.
const logSize = 512 << 20

func TestPowerIsCutFromADeviceThatLogs(t *testing.T) {
	e := engine(t)
	if _, err := run("dmsetup", "targets"); err != nil && !inVM() {
		t.Skipf("this kernel has no device mapper: %v", err)
	}
	for _, fs := range fileSystems() {
		t.Run(fs.name, func(t *testing.T) {
			read, kept := newSources(t)
			s, err := newSite(e, read, kept)
			if err != nil {
				t.Fatal(err)
			}
			d, err := newLogged(fs, s)
			if err != nil {
				t.Fatal(err)
			}
			defer d.remove()
			sum, err := d.cuts(rounds(t), random(fs.name))
			if err != nil {
				t.Fatalf("HOLDFAST_SEED=%d: %v", seed, err)
			}
			sum.print(t, read)
		})
	}
}

// A logged is a disk all of whose writes are on record, from one life of the site on.
type logged struct {
	fs         fileSystem
	site       *site
	base, disk string // the disk as it was made, and as it is; files
	path       string // of the log
	log        *writeLog
}

// newLogged has a site live on a disk.
func newLogged(fs fileSystem, s *site) (*logged, error) {
	d := &logged{fs: fs, site: s, base: ram("base"), disk: ram("disk"), path: ram("log")}
	if err := fs.newDisk(d.base); err != nil {
		return nil, err
	}
	if _, err := run("cp", "--sparse=always", d.base, d.disk); err != nil {
		return nil, err
	}
	if err := errors.Join(os.WriteFile(d.path, nil, 0o600), os.Truncate(d.path, logSize)); err != nil {
		return nil, err
	}
	if err := d.live(); err != nil {
		return nil, errors.Join(err, d.remove())
	}
	var err error
	d.log, err = readLog(d.path)
	return d, err
}

func (d *logged) remove() (err error) {
	for _, f := range []string{d.base, d.disk, d.path} {
		err = errors.Join(err, os.Remove(f))
	}
	if d.log != nil {
		err = errors.Join(err, d.log.f.Close())
	}
	return err
}

// live is the life of the site that is logged.
func (d *logged) live() (err error) {
	disk, err := loop(d.disk)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, detach(disk)) }()
	log, err := loop(d.path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, detach(log)) }()
	name := "holdfast-" + strconv.Itoa(os.Getpid())
	// There is no udev in the test machine to make a name below /dev/mapper.
	if _, err := run("dmsetup", "create", "--noudevsync", "--noudevrules", name, "--table", fmt.Sprintf("0 %d log-writes %s %s", diskSize/512, disk, log)); err != nil {
		return err
	}
	// Everything is in the log when this has returned.
	defer func() {
		err = errors.Join(err, until("remove the device", func() error { _, err := run("dmsetup", "remove", "--noudevsync", "--noudevrules", name); return err }))
	}()
	minor, err := run("dmsetup", "info", "--columns", "--noheadings", "-o", "minor", name)
	if err != nil {
		return err
	}
	if err := d.fs.mount("/dev/dm-"+minor, d.site.root()); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unmount(d.site.root())) }()
	err = d.site.live(context.Background(), 3*span, func(what string) error {
		_, err := run("dmsetup", "message", name, "0", "mark", d.site.marked(what))
		return err
	})
	if d.site.host == nil {
		return err
	}
	if readers := d.site.readers.Load(); readers != nil {
		err = errors.Join(err, readers.Err())
	}
	return errors.Join(err, d.site.kill(), d.site.clear())
}

// cuts cuts the power so many times.
func (d *logged) cuts(n int, random *rand.Rand) (sum figure, err error) {
	end := slices.IndexFunc(d.log.entries, func(e entry) bool { return strings.HasPrefix(e.mark, markEnd+"=") })
	synced := slices.IndexFunc(d.log.entries, func(e entry) bool { return strings.HasPrefix(e.mark, markSynced+"=") })
	if end < 0 || synced < 0 {
		return sum, fmt.Errorf("the log of %d entries has no end: it holds %d bytes", len(d.log.entries), logSize)
	}
	for i := range n {
		var lose *rand.Rand
		at := random.IntN(end)
		switch {
		case i == 0:
			at = synced + 1 // what is known from then on must be there from then on
		case i%2 == 1:
			lose = random
		}
		k, l, err := d.cut(at, lose)
		if err != nil {
			return sum, fmt.Errorf("cut %d, at entry %d of %d: %w", i, at, end, err)
		}
		sum.add(d.site.read, k, l)
	}
	return sum, nil
}

// cut cuts it once.
func (d *logged) cut(at int, lose *rand.Rand) (k known, l loss, err error) {
	left := ram("left")
	marks, err := d.log.cut(d.base, left, at, lose)
	if err != nil {
		return k, l, err
	}
	defer os.Remove(left)
	for _, m := range marks {
		if err := k.add(m); err != nil {
			return k, l, err
		}
	}
	device, err := loop(left)
	if err != nil {
		return k, l, err
	}
	defer func() { err = errors.Join(err, detach(device)) }()
	if err := d.fs.mount(device, d.site.root()); err != nil {
		return k, l, err
	}
	defer func() { err = errors.Join(err, unmount(d.site.root())) }()
	l, err = d.site.recover(k)
	return k, l, err
}

// span is how long images are read for.
const span = 2 * time.Second
