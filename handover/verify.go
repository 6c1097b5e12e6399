package handover

import (
	"context"
	"fmt"
	"os"
	"path"
	"strings"

	"github.com/coreos/go-systemd/v22/dbus"
)

// systemdSocket is where the system's systemd takes notifications (manager_setup_notify, systemd 252).
const systemdSocket = "/run/systemd/notify"

// A verified is what the last Verify found: how many descriptors systemd held, and how many this process thought it did.
type verified struct{ theirs, ours int }

// Verify compares how many descriptors systemd says it holds with how many it should. The answer to a barrier says only that a message was worked
// off: systemd also works off by dropping, for want of room, because the sender is not whom NotifyAccess= allows, or because it has the
// same open file description already.
//
// Which of the descriptors it passed came from a socket unit, and are not in the store, is not told: the first call can only bound their number. Call it
// before the first Push and the later calls are exact.
//
// It does nothing where the supervisor is not the system's systemd. A keeper needs no second look: it is of the same release, and holds
// what it has answered for or says so in its log.
func (s *Store) Verify(ctx context.Context) error {
	if s.socket != systemdSocket {
		return nil
	}
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return fmt.Errorf("verify the supervisor's store: %w", err)
	}
	unit, err := unitOf(string(text))
	if err == nil {
		err = s.verify(func() (int, error) { return storedBySystemd(ctx, unit) })
	}
	if err != nil {
		return fmt.Errorf("verify the store of unit %q: %w", unit, err)
	}
	return nil
}

// verify compares; count is what systemd says.
func (s *Store) verify(count func() (int, error)) error {
	s.mu.Lock() // nothing is pushed meanwhile
	defer s.mu.Unlock()
	n, err := count()
	if err != nil {
		return err
	}
	least, most := 0, len(s.held)
	if v := s.verified; v != nil {
		least = v.theirs + len(s.held) - v.ours
		most = least
	}
	if n < least || n > most {
		return fmt.Errorf("it holds %d descriptors where there should be %d to %d: some were dropped (see the journal of PID 1), or others removed", n, least, most)
	}
	s.verified = &verified{n, len(s.held)}
	return nil
}

// storedBySystemd asks systemd at its private socket, which is there without a message bus, and for root only.
func storedBySystemd(ctx context.Context, unit string) (int, error) {
	conn, err := dbus.NewSystemdConnectionContext(ctx)
	if err != nil {
		return 0, fmt.Errorf("connect to systemd: %w", err)
	}
	defer conn.Close()
	p, err := conn.GetServicePropertyContext(ctx, unit, "NFileDescriptorStore")
	if err != nil {
		return 0, fmt.Errorf("ask systemd: %w", err)
	}
	n, ok := p.Value.Value().(uint32)
	if !ok {
		return 0, fmt.Errorf("systemd answered %v where a number was asked for", p.Value)
	}
	return int(n), nil
}

// unitOf finds the service in /proc/self/cgroup: the last component of the path in systemd's own hierarchy that is one.
func unitOf(cgroups string) (string, error) {
	for line := range strings.Lines(cgroups) {
		line = strings.TrimSuffix(line, "\n")
		_, rest, _ := strings.Cut(line, ":")
		controllers, dir, ok := strings.Cut(rest, ":")
		if !ok || controllers != "" && controllers != "name=systemd" {
			continue
		}
		for ; dir != "/" && dir != "." && dir != ""; dir = path.Dir(dir) {
			name := strings.TrimPrefix(path.Base(dir), "_") // cg_escape puts it before what the kernel has files called (cgroup-util.c)
			if strings.HasSuffix(name, ".service") {
				return name, nil
			}
		}
	}
	return "", fmt.Errorf("this process is in no service's control group (%q)", cgroups)
}
