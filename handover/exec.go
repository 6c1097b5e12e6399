package handover

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
)

// Exec turns this process into the command, after addressing the descriptors that its keeper passed to it ([KeepOptions]'s
// Trampoline says why). It returns only if that fails.
func Exec(command []string) error {
	if len(command) == 0 {
		return errors.New("no command given")
	}
	path, err := exec.LookPath(command[0])
	if err != nil {
		return err
	}
	if err := restoreScore(); err != nil {
		return err
	}
	pid := strconv.Itoa(os.Getpid())
	variables := []string{"SYSTEMD_EXEC_PID"}
	if os.Getenv("LISTEN_FDS") != "" {
		variables = append(variables, "LISTEN_PID")
	}
	if os.Getenv("WATCHDOG_USEC") != "" {
		variables = append(variables, "WATCHDOG_PID")
	}
	for _, v := range variables {
		if err := os.Setenv(v, pid); err != nil {
			return err
		}
	}
	if err := syscall.Exec(path, command, os.Environ()); err != nil {
		return fmt.Errorf("run %s: %w", path, err)
	}
	return nil
}
