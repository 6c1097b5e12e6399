package systemd

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"holdfast/tests/vm"
)

// container is a machine with a service that has two files of an image open, and reads them when it is told to stop: the first not at
// once, so that whatever else is stopped has been stopped by then, the second when the daemon was killed. Nobody has read them before.
const container = `set -e
ln -s "$BIN" /usr/bin/holdfast
cp "$UNITS"/* /usr/lib/systemd/system
mkdir -p /etc/holdfast /cache/tree /cache/mnt
printf 'root = "/cache/holdfast"\nengine = "cachefiles"\nprefetch = "off"\n' >/etc/holdfast/config.toml
head -c 1M /dev/urandom >/cache/tree/a
head -c 1M /dev/urandom >/cache/tree/b
cat /cache/tree/a /cache/tree/b | sha256sum >"$SHARE/want"
tar -C /cache/tree -cf /cache/image.tar a b
holdfast convert tar:/cache/image.tar oci:/cache/image:1
systemctl daemon-reload
systemctl start holdfast.socket holdfast-cachefiles.socket holdfast.service
holdfast mount oci:/cache/image:1 /cache/mnt
cat >/cache/container <<'EOF'
exec 3</cache/mnt/a 4</cache/mnt/b
stop() {
	sleep 3
	cat <&3
	systemctl kill --kill-whom=main --signal=KILL holdfast.service
	cat <&4
}
trap 'stop 2>&1 | sha256sum >"$SHARE/got"; exit 0' TERM
: >/run/container-is-ready
while :; do sleep 0.1; done
EOF
systemd-run --quiet --unit=container --property=Type=exec --property=RequiresMountsFor="$SHARE" --setenv=SHARE sh /cache/container
until [ -e /run/container-is-ready ]; do sleep 0.1; done
systemctl poweroff
sleep 1000
`

func TestContainersReadTheirImagesUntilTheyAreGoneAtShutdown(t *testing.T) {
	if os.Getenv("HOLDFAST_VM") != "" {
		t.Skip("this is the test machine, and the test starts one (HOLDFAST_VM is set)")
	}
	if _, err := os.Stat("/lib/systemd/systemd"); err != nil {
		t.Skipf("this host has no systemd that the machine could boot: %v", err)
	}
	bin := os.Getenv("HOLDFAST_BIN")
	if bin == "" {
		bin = filepath.Join(t.TempDir(), "holdfast")
		build := exec.Command("go", "build", "-o", bin, "holdfast/cmd/holdfast")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build holdfast: %v: %s", err, out)
		}
	}
	share, units, journal := t.TempDir(), t.TempDir(), filepath.Join(t.TempDir(), "journal")
	if err := copyUnits(units); err != nil { // here, so that go test knows a result by the units that made it
		t.Fatal(err)
	}
	code, err := vm.Run(t.Context(), vm.Config{
		Systemd: true, Journal: journal, Shares: []string{share}, Timeout: 5 * time.Minute,
		Command: "sh", Args: []string{"-c", container}, Stdout: t.Output(), Stderr: t.Output(),
		Env: append(os.Environ(), "HOLDFAST_VM=1", "BIN="+bin, "UNITS="+units, "SHARE="+share),
	})
	if err == nil {
		t.Fatalf("the machine was not shut down: exit code %d", code)
	}
	want, wantErr := os.ReadFile(filepath.Join(share, "want"))
	got, gotErr := os.ReadFile(filepath.Join(share, "got"))
	if wantErr != nil || gotErr != nil || string(want) != string(got) || len(want) == 0 {
		log, _ := os.ReadFile(journal)
		t.Errorf("the container read %q (%v), want %q (%v)\nthe machine: %v\n%s", got, gotErr, want, wantErr, err, log)
	}
}
