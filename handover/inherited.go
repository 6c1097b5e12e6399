package handover

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"holdfast/state/crash"
)

// firstInherited is the number of the first descriptor a supervisor passes (SD_LISTEN_FDS_START in sd-daemon.h).
const firstInherited = 3

// maxInherited bounds LISTEN_FDS: fs.nr_open's default, which no process passes.
const maxInherited = 1 << 20

// MovedBase is where the descriptors that a supervisor passes are moved to, or above: see Inherited.
const MovedBase = 16384

// passed are the names that Inherited found. The environment that says them is read once, and OpenStore has to know too.
var passed struct {
	mu    sync.Mutex
	names []string
}

// Inherited returns the descriptors that the supervisor passed to this process, by name, close-on-exec, and takes the variables
// that announce them out of the environment. The map is empty if there are none for this process. Call it once, at start, before
// anything starts a process, and before OpenStore.
//
// The descriptors are moved to numbers from MovedBase on, or from half of RLIMIT_NOFILE on where that is less. Low numbers are then free for
// an engine to occupy that has to answer for a dead process's numbers, and what is closed later was never one of them. If RLIMIT_NOFILE
// leaves no room for all of them there, the last ones keep their numbers.
//
// The environment is refused with an error, and nothing closed, if it does not match what is there, or if two descriptors have one
// name: whoever guessed which to use might let go of the one that mounts depend on. It holds for all names: each is pushed once, and
// systemd drops what it is sent twice of the same open file description, so two of a name are two different things.
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
	crash.Point("handover.inherited.before-move")
	moved, err := moveUp(list)
	if err != nil {
		return nil, fmt.Errorf("inherit file descriptors: %w", err)
	}
	crash.Point("handover.inherited.after-move")
	files := make(map[string]*os.File, len(list))
	for i, name := range list {
		files[name] = os.NewFile(uintptr(moved[i]), name)
	}
	passed.mu.Lock()
	defer passed.mu.Unlock()
	passed.names = list
	return files, nil
}

// moveUp moves the inherited descriptors and returns their numbers, in their order. One after the other: there need not be room for all of them
// twice. Those for which there is none above stay where they are. If one is not there, none is touched.
func moveUp(names []string) (moved []int, err error) {
	base, err := Base()
	if err != nil {
		return nil, err
	}
	for i, name := range names {
		if _, err := unix.FcntlInt(uintptr(firstInherited+i), unix.F_GETFD, 0); err != nil {
			return nil, fmt.Errorf("descriptor %d (%q): %w", firstInherited+i, name, err)
		}
	}
	for i, name := range names {
		from := firstInherited + i
		to, err := unix.FcntlInt(uintptr(from), unix.F_DUPFD_CLOEXEC, base)
		switch {
		case errors.Is(err, unix.EMFILE):
			unix.CloseOnExec(from)
			to = from
		case err != nil:
			return nil, fmt.Errorf("descriptor %d (%q): %w", from, name, err)
		default:
			_ = unix.Close(from) // its copy is open: nothing is lost
		}
		moved = append(moved, to)
	}
	return moved, nil
}

// Base is where this process's inherited descriptors are moved to: MovedBase, or half of RLIMIT_NOFILE where that is less.
func Base() (int, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("ask for the limit of open files: %w", err)
	}
	return int(min(MovedBase, limit.Cur/2)), nil
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
func checkName[T string | []byte](name T) error {
	if len(name) == 0 || len(name) > maxName {
		return fmt.Errorf("a descriptor's name has 1 to %d bytes, not %d", maxName, len(name))
	}
	for i := range len(name) {
		if c := name[i]; c < ' ' || c > '~' || c == ':' {
			return fmt.Errorf("descriptor name %q has a character that is not printable ASCII, or a colon", name)
		}
	}
	return nil
}
