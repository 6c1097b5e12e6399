package fanotify

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// safeSince is the first kernel of each line that does not take a short read of a backing file for a full one: before
// commit eade54040384 (CVE-2026-31514), a reader killed while its bytes were being fetched left pages of zeros in the
// page cache, marked as good, for every later reader (fs/erofs/fileio.c). The fix is of March 2026; the stable numbers are
// the first released in April, which is the latest it can have got in. Lines without a row have pre-content events but
// never got the fix (6.14 to 6.17), or have had it from the start (7.0 on).
//
// This is the one thing decided by version: the race cannot be provoked for certain. A vendor's kernel with the fix
// under an older number is let in with Config.AllowUnsafeKernel.
var safeSince = map[[2]int]int{
	{6, 18}: 22,
	{6, 19}: 12,
}

// CheckKernel says why the running kernel is not safe for this engine, or nil. Open refuses such a kernel unless told
// to go on.
func CheckKernel() error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	return checkKernel(unix.ByteSliceToString(u.Release[:]))
}

func checkKernel(release string) error {
	var major, minor, patch int
	if n, _ := fmt.Sscanf(release, "%d.%d.%d", &major, &minor, &patch); n < 2 {
		return fmt.Errorf("cannot tell the kernel's version from %q: allow unsafe kernels if you know it has commit eade54040384", release)
	}
	if major >= 7 {
		return nil
	}
	if since, ok := safeSince[[2]int{major, minor}]; ok && patch >= since {
		return nil
	}
	return fmt.Errorf("kernel %s can leave wrong bytes in the page cache when a reader is killed (CVE-2026-31514): "+
		"use 6.18.22, 6.19.12, 7.0 or later, or allow unsafe kernels if this one has commit eade54040384", release)
}
