package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/tests/host"
)

// exportDir makes a directory to export to, with an image of a random tree and some larger files beside it. No daemon runs.
func exportDir(t *testing.T) (dir, image string, m model) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root, and this is not root")
	}
	dir, err := host.WorkDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	m = randomTree(seeds(t, 1)[0])
	for name, f := range bigFiles(2) {
		if name != "." {
			m[name] = f
		}
	}
	tarball := filepath.Join(dir, "tree.tar")
	m.writeTar(t, tarball)
	image = "oci:" + filepath.Join(dir, "image") + ":x"
	run(t, bin, "convert", "tar:"+tarball, image)
	return dir, image, m
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).Output()
	if err != nil {
		stderr := ""
		if e, ok := err.(*exec.ExitError); ok {
			stderr = string(e.Stderr)
		}
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, stderr)
	}
	return string(out)
}

// exported is what `export --json` prints.
type exported struct {
	Bootstrap string
	Devices   []string
	Mount     string
}

func TestExportedImageIsMountedByTheKernelAlone(t *testing.T) {
	dir, image, m := exportDir(t)
	out, mnt := filepath.Join(dir, "out"), filepath.Join(dir, "mnt")
	var x exported
	if err := json.Unmarshal([]byte(run(t, bin, "export", "--json", image, out)), &x); err != nil {
		t.Fatal(err)
	}
	sums := exec.Command("sha256sum", "--check", "--strict", "SHA256SUMS")
	sums.Dir = out
	if got, err := sums.CombinedOutput(); err != nil || strings.Count(string(got), ": OK\n") != 1+len(x.Devices) {
		t.Errorf("sha256sum: %v: %s", err, got)
	}
	// The image is not needed any more.
	if err := os.RemoveAll(filepath.Join(dir, "image")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(mnt, 0o755); err != nil {
		t.Fatal(err)
	}
	options := make([]string, 0, len(x.Devices))
	for _, d := range x.Devices {
		options = append(options, "device="+d)
	}
	if !strings.Contains(x.Mount, "ro,"+strings.Join(options, ",")+" "+x.Bootstrap) {
		t.Errorf("the command line %q has not the options %v", x.Mount, options)
	}
	if err := unix.Mount(x.Bootstrap, mnt, "erofs", unix.MS_RDONLY, strings.Join(options, ",")); err != nil {
		t.Skipf("this kernel does not mount EROFS from files, as it says itself: %v", err)
	}
	dropCaches(t)
	m.compare(t, mnt)
	if err := unix.Unmount(mnt, 0); err != nil {
		t.Error(err)
	}
}

func TestExportRefusesADamagedBlobAndLeavesNothing(t *testing.T) {
	dir, image, _ := exportDir(t)
	blob, content := largest(t, filepath.Join(dir, "image", "blobs/sha256"))
	content[len(content)/2] ^= 1
	if err := os.WriteFile(filepath.Join(dir, "image", "blobs/sha256", blob), content, 0o600); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "out")
	got, err := exec.Command(bin, "export", image, out).CombinedOutput()
	if err == nil || !strings.Contains(string(got), "damaged") || !strings.Contains(string(got), blob) {
		t.Errorf("exported, or the error does not say what is damaged: %v, %s", err, got)
	}
	left, err := filepath.Glob(out + "*")
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestExportGoesToNoDirectoryWithSomethingInIt(t *testing.T) {
	dir, image, _ := exportDir(t)
	out := filepath.Join(dir, "out")
	if err := os.Mkdir(out, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, bin, "export", image, out) // empty: it is taken
	before := run(t, "ls", "-i", out)
	if got, err := exec.Command(bin, "export", image, out).CombinedOutput(); err == nil || !strings.Contains(string(got), "not empty") {
		t.Errorf("exported over an image: %v, %s", err, got)
	}
	if after := run(t, "ls", "-i", out); after != before {
		t.Errorf("what was there is now\n%s, and was\n%s", after, before)
	}
}

func TestSealedExportSaysHowOrRefuses(t *testing.T) {
	dir, image, _ := exportDir(t)
	out := filepath.Join(dir, "out")
	got, err := exec.Command(bin, "export", "--verity", image, out).CombinedOutput()
	if err != nil {
		if left, _ := filepath.Glob(out + "*"); len(left) > 0 || !strings.Contains(string(got), "leave --verity out") {
			t.Errorf("%v: %s; left behind: %v", err, got, left)
		}
		return
	}
	seals, err := os.ReadFile(filepath.Join(out, "VERITY"))
	if err != nil || strings.Count(string(seals), "-verity sha256:") != 2 {
		t.Fatalf("VERITY: %v: %s", err, seals)
	}
	if !strings.Contains(string(seals), "dm-verity") {
		return // fs-verity: the kernel refuses whoever writes to it, and needs nobody to open it
	}
	for line := range strings.Lines(string(seals)) {
		root, name, _ := strings.Cut(strings.TrimSpace(strings.TrimPrefix(line, "dm-verity sha256:")), "  ")
		file := filepath.Join(out, name)
		run(t, "veritysetup", "verify", file, file+".verity", root)
		edit := func() { editMiddle(t, file, flip) }
		edit()
		if got, err := exec.Command("veritysetup", "verify", file, file+".verity", root).CombinedOutput(); err == nil {
			t.Errorf("a changed %s passes: %s", name, got)
		}
		edit()
	}
}
