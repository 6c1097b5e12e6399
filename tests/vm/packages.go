package vm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// qemuPackages are the Debian packages that running a machine needs: the emulator, and mkfs.ext4 for its disk.
var qemuPackages = []string{"qemu-system-x86", "e2fsprogs"}

// kernelPackages are the Debian packages that building a kernel of the series needs.
func kernelPackages(series string) []string {
	return []string{"linux-source-" + series, "gcc", "make", "flex", "bison", "bc", "libelf-dev", "libssl-dev", "patch", "xz-utils"}
}

// EnsurePackages makes sure that the named Debian packages are installed. As root it installs what is missing; otherwise the
// error is the command to run.
func EnsurePackages(ctx context.Context, log func(string), names []string) error {
	missing := missingPackages(ctx, names)
	if len(missing) == 0 {
		return nil
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("missing Debian packages: run `apt-get install %s` as root", strings.Join(missing, " "))
	}
	log("installing " + strings.Join(missing, " "))
	// The lists may be absent or too old to name files that still exist, so a failed install is tried once more after an update.
	if aptGet(ctx, append([]string{"install"}, missing...)) == nil {
		return nil
	}
	if err := aptGet(ctx, []string{"update"}); err != nil {
		return err
	}
	return aptGet(ctx, append([]string{"install"}, missing...))
}

func missingPackages(ctx context.Context, names []string) []string {
	var missing []string
	for _, n := range names {
		out, err := exec.CommandContext(ctx, "dpkg-query", "-W", "-f", "${db:Status-Status}", n).Output()
		if err != nil || string(out) != "installed" {
			missing = append(missing, n)
		}
	}
	return missing
}

func aptGet(ctx context.Context, args []string) error {
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-q", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=600"}, args...)...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, tail(string(out), 20))
	}
	return nil
}

// tail returns the last n lines of s.
func tail(s string, n int) string {
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
