package daemon

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// mountPoints returns what is mounted in this process's mount namespace: the type of the topmost file system by mount point.
func mountPoints() (map[string]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	defer f.Close()
	points, err := parseMountInfo(f)
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return points, nil
}

// parseMountInfo reads the format of proc_pid_mountinfo(5): "id parent major:minor root mountpoint options
// [optional fields] - type source superoptions". Later lines are mounted over earlier ones. Lines that do not look so are skipped.
func parseMountInfo(r io.Reader) (map[string]string, error) {
	points := map[string]string{}
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20) // overlay options with many layers make long lines
	for s.Scan() {
		before, after, ok := strings.Cut(s.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if ok && len(left) >= 6 && len(right) >= 1 {
			points[unescape(left[4])] = right[0]
		}
	}
	return points, s.Err()
}

// unescape undoes the kernel's \ooo (seq_escape of space, tab, newline and backslash).
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
