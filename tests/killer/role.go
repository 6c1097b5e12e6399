package killer

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
)

// word is the first argument of a process that has a role.
const word = "killer"

// Role takes the part that the arguments of this process name, and does not return; it returns where they name none.
func Role() {
	if len(os.Args) < 3 || os.Args[1] != word {
		return
	}
	code, err := 2, fmt.Errorf("unknown role %q", os.Args[2])
	switch os.Args[2] {
	case "trace":
		code, err = traceRole(os.Args[3:])
	case "filter":
		err = filterRole(os.Args[3:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "killer:", err)
		os.Exit(2)
	}
	os.Exit(code)
}

// Trace is the command line of the tracer, to which the keeper's is to be appended. self is a binary whose main calls Role. Kills are
// for one life of the daemon each, in the order in which they begin; daemon is the path of its binary. Report is where the tracer
// writes, for [ReadReport].
func Trace(self, daemon, report string, kills ...Kill) []string {
	return []string{self, word, "trace", "-daemon", daemon, "-report", report, "-kill", formatKills(kills), "--"}
}

// Filter is what to put before the daemon's command line.
func Filter(self string) []string { return []string{self, word, "filter", "--"} }

func traceRole(args []string) (int, error) {
	flags := flag.NewFlagSet("trace", flag.ContinueOnError)
	report, kills, daemon := flags.String("report", "", ""), flags.String("kill", "", ""), flags.String("daemon", "", "")
	if err := flags.Parse(args); err != nil {
		return 2, err
	}
	list, err := parseKills(*kills)
	if err != nil {
		return 2, err
	}
	out, err := os.OpenFile(*report, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return 2, err
	}
	defer out.Close()
	t := &tracer{kills: list, daemon: *daemon, out: out, threads: map[int]*thread{}, lives: map[int]*life{}}
	return t.run(flags.Args())
}

func filterRole(args []string) error {
	if len(args) < 2 || args[0] != "--" {
		return errors.New("no command given")
	}
	path, err := exec.LookPath(args[1])
	if err != nil {
		return err
	}
	if err := installFilter(); err != nil {
		return fmt.Errorf("install the seccomp filter: %w", err)
	}
	return fmt.Errorf("run %s: %w", path, syscall.Exec(path, args[1:], os.Environ()))
}

// isDaemon says whether a process with this binary and these arguments is the daemon, rather than the keeper, or what is about
// to become the daemon.
func isDaemon(exe string, args []string, daemon string) bool {
	if exe != daemon {
		return false
	}
	i := slices.IndexFunc(args, func(a string) bool { return slices.Contains([]string{"keep", "keep-exec", word, "serve"}, a) })
	return i >= 0 && args[i] == "serve"
}

func formatKills(kills []Kill) string {
	var s []string
	for _, k := range kills {
		s = append(s, k.String())
	}
	return strings.Join(s, ",")
}

func parseKills(s string) (kills []Kill, err error) {
	if s == "" {
		return nil, nil
	}
	for part := range strings.SplitSeq(s, ",") {
		k, err := ParseKill(part)
		if err != nil {
			return nil, err
		}
		kills = append(kills, k)
	}
	return kills, nil
}
