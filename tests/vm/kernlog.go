package vm

import (
	"fmt"
	"os"
	"regexp"
	"strings"
)

// KernelLogError is returned by Run when the kernel complained about itself, whatever the command's exit code was.
type KernelLogError struct {
	Lines []string // the complaints
	Path  string   // the whole log
}

func (e *KernelLogError) Error() string {
	return fmt.Sprintf("the kernel log (%s) has:\n\t%s", e.Path, strings.Join(e.Lines, "\n\t"))
}

// complaint matches the first line of each kind of report: kernel/panic.c, lib/bug.c, arch/x86/mm/fault.c, arch/x86/kernel/traps.c,
// kernel/hung_task.c, lib/refcount.c, kernel/locking/lockdep.c, mm/kasan/report.c. RCU stalls and clock warnings are left out: an
// emulated CPU that the host does not schedule for a while causes them.
var complaint = regexp.MustCompile(`WARNING:|BUG:|kernel BUG at|Oops|general protection fault|Kernel panic|` +
	`INFO: task .* blocked for more than|refcount_t:|KASAN:|UBSAN:|EXT4-fs error|unable to handle`)

// complaints returns the lines of a kernel log that no healthy run has.
func complaints(log string) []string {
	var found []string
	for line := range strings.Lines(log) {
		if complaint.MatchString(line) {
			found = append(found, strings.TrimSpace(line))
		}
	}
	return found
}

// logTail returns the end of a log for an error message.
func logTail(what, path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "(no " + what + ": " + err.Error() + ")"
	}
	return fmt.Sprintf("end of %s (%s):\n%s", what, path, tail(string(b), 25))
}
