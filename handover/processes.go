package handover

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// parentOf reads who is the parent of a process, from /proc/PID/stat (proc_pid_stat(5), field 4). The name before it may contain anything.
func parentOf(pid int) (int, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 2 {
		return 0, fmt.Errorf("/proc/%d/stat: %q", pid, b)
	}
	return strconv.Atoi(string(fields[1]))
}

// maxDescent bounds the way up from a process.
const maxDescent = 64

// descends fails if the process is not a descendant of the one with the id ancestor.
func descends(pid, ancestor int) error {
	up := pid
	for range maxDescent {
		parent, err := parentOf(up)
		if err != nil {
			return err
		}
		if parent == ancestor {
			return nil
		}
		if parent <= 1 {
			break
		}
		up = parent
	}
	return fmt.Errorf("process %d is not a descendant of this one, %d", pid, ancestor)
}

// killDescendants kills every descendant of this process, and returns their ids. One may have appeared meanwhile: what calls it calls it again
// until there are none but those that cannot end.
func killDescendants() ([]int, error) {
	parents, err := allParents()
	if err != nil {
		return nil, err
	}
	var killed []int
	var errs []error
	for pid := range parents {
		if !isBelow(pid, os.Getpid(), parents) {
			continue
		}
		switch err := killDescendant(pid); {
		case err == nil:
			killed = append(killed, pid)
		case !errors.Is(err, unix.ESRCH):
			errs = append(errs, fmt.Errorf("kill process %d, left of the command: %w", pid, err))
		}
	}
	return killed, errors.Join(errs...)
}

// allParents reads the parent of every process. One that ends meanwhile is not among them, or stays.
func allParents() (map[int]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	parents := make(map[int]int)
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if parent, err := parentOf(pid); err == nil {
			parents[pid] = parent
		}
	}
	return parents, nil
}

// isBelow says whether the way up from a process comes by the one with the id ancestor.
func isBelow(pid, ancestor int, parents map[int]int) bool {
	for range maxDescent {
		pid = parents[pid]
		if pid == ancestor || pid == 0 {
			break
		}
	}
	return pid == ancestor
}

// killDescendant kills a process if it is a descendant of this one. ESRCH: it is not, or has ended and been reaped.
func killDescendant(pid int) error {
	// As in holder.follow: what is a descendant after the descriptor was opened is the process that it is of.
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if descends(pid, os.Getpid()) != nil {
		return unix.ESRCH
	}
	return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
}

const scoreFile = "/proc/self/oom_score_adj"

// guardFromOOM makes the kernel kill anything else before this process (proc_pid_oom_score_adj(5)), and returns what its score was, or ""
// if that is left as it was.
func guardFromOOM() (string, error) {
	b, err := os.ReadFile(scoreFile)
	if err != nil {
		return "", err
	}
	before := string(bytes.TrimSpace(b))
	if n, err := strconv.Atoi(before); err != nil || n <= keeperScore {
		return "", err
	}
	if err := os.WriteFile(scoreFile, []byte(strconv.Itoa(keeperScore)), 0); err != nil {
		return "", err
	}
	return before, nil
}

// keeperScore leaves -1000, which the kernel never kills, to those who must not even be killed where nothing else is left.
const keeperScore = -999

// scoreVariable tells the trampoline the score that the command is to have.
const scoreVariable = "HOLDFAST_OOM_SCORE_ADJ"

// restoreScore gives this process the score that its keeper had at first. Raising it needs no privilege.
func restoreScore() error {
	score := os.Getenv(scoreVariable)
	if err := os.Unsetenv(scoreVariable); err != nil || score == "" {
		return err
	}
	if err := os.WriteFile(scoreFile, []byte(score), 0); err != nil {
		return fmt.Errorf("restore oom_score_adj: %w", err)
	}
	return nil
}
