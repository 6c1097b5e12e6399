package handover

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// firstInherited is the number of the first descriptor a supervisor passes (SD_LISTEN_FDS_START in sd-daemon.h).
const firstInherited = 3

// maxInherited bounds LISTEN_FDS: fs.nr_open's default, which no process passes.
const maxInherited = 1 << 20

// Inherited returns the descriptors that the supervisor passed to this process, by name, close-on-exec, and takes the variables
// that announce them out of the environment. The map is empty if there are none for this process. Call it once, at start, before
// anything starts a process.
//
// The environment is refused with an error, and nothing closed, if it does not match what is there, or if two descriptors have one
// name: whoever guessed which to use might let go of the one that mounts depend on.
func Inherited() (map[string]*os.File, error) {
	pid, count, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES")
	for _, v := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"} {
		if err := os.Unsetenv(v); err != nil {
			return nil, fmt.Errorf("take %s out of the environment: %w", v, err)
		}
	}
	if pid != strconv.Itoa(os.Getpid()) {
		return nil, nil
	}
	list, err := inheritedNames(count, names)
	if err != nil {
		return nil, fmt.Errorf("inherit file descriptors: %w", err)
	}
	for i, name := range list {
		if _, err := unix.FcntlInt(uintptr(firstInherited+i), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return nil, fmt.Errorf("inherit file descriptor %d (%q): %w", firstInherited+i, name, err)
		}
	}
	files := make(map[string]*os.File, len(list))
	for i, name := range list {
		files[name] = os.NewFile(uintptr(firstInherited+i), name)
	}
	return files, nil
}

// inheritedNames parses LISTEN_FDS and LISTEN_FDNAMES into one name per descriptor.
func inheritedNames(count, names string) ([]string, error) {
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 || n > maxInherited {
		return nil, fmt.Errorf("LISTEN_FDS=%q is not a number of descriptors", count)
	}
	if n == 0 {
		return nil, nil
	}
	list := strings.Split(names, ":")
	if len(list) != n {
		return nil, fmt.Errorf("LISTEN_FDNAMES has %d names for LISTEN_FDS=%d descriptors", len(list), n)
	}
	seen := make(map[string]bool, n)
	for _, name := range list {
		if err := checkName(name); err != nil {
			return nil, fmt.Errorf("LISTEN_FDNAMES: %w", err)
		}
		if seen[name] {
			return nil, fmt.Errorf("two descriptors are named %q, and which to use cannot be told", name)
		}
		seen[name] = true
	}
	return list, nil
}

// maxName is the longest name of a descriptor in bytes (FDNAME_MAX in systemd's fd-util.h).
const maxName = 255

// checkName says whether systemd would take name for a stored descriptor: printable ASCII without a colon
// (fdname_is_valid in systemd's fd-util.c).
func checkName(name string) error {
	if name == "" || len(name) > maxName {
		return fmt.Errorf("a descriptor's name has 1 to %d bytes, not %d", maxName, len(name))
	}
	for _, c := range []byte(name) {
		if c < ' ' || c > '~' || c == ':' {
			return fmt.Errorf("descriptor name %q has a character that is not printable ASCII, or a colon", name)
		}
	}
	return nil
}
