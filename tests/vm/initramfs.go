package vm

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
)

// guestProgram builds PID 1 once per process. Building it from source each time, rather than keeping a copy, is what keeps host
// and guest ends of the conversation the same version; Go's build cache makes it half a second.
var guestProgram = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "holdfast-vm-guest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	bin := filepath.Join(dir, "init")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin, "holdfast/tests/vm/guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building PID 1 of the guest (run from within the module): %w\n%s", err, out)
	}
	return os.ReadFile(bin)
})

// writeInitramfs writes an archive with PID 1 as its only file.
func writeInitramfs(ctx context.Context, path string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	prog, err := guestProgram()
	if err != nil {
		return err
	}
	var b bytes.Buffer
	cpioEntry(&b, "init", 0o100755, prog)
	cpioEntry(&b, "TRAILER!!!", 0, nil)
	return os.WriteFile(path, b.Bytes(), 0o600)
}

// cpioEntry appends one entry of a cpio archive in the "newc" format: Documentation/driver-api/early-userspace/buffer-format.rst.
func cpioEntry(b *bytes.Buffer, name string, mode uint32, data []byte) {
	fields := [13]uint32{
		1: mode, 4: 1, // one link
		6:  uint32(len(data)),
		11: uint32(len(name) + 1),
	}
	b.WriteString("070701")
	for _, f := range fields {
		fmt.Fprintf(b, "%08X", f)
	}
	b.WriteString(name)
	b.WriteByte(0)
	pad4(b)
	b.Write(data)
	pad4(b)
}

func pad4(b *bytes.Buffer) {
	for b.Len()%4 != 0 {
		b.WriteByte(0)
	}
}
