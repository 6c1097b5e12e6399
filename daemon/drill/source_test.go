package drill

import (
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/rafs/convert"
	"holdfast/rafs/image"
)

// served converts a little tree and serves it.
func served(t *testing.T, p pace) *registry {
	t.Helper()
	dir := t.TempDir()
	if _, err := generate(filepath.Join(dir, "tree"), 1, 1<<20); err != nil {
		t.Fatal(err)
	}
	layout := filepath.Join(dir, "image")
	if _, err := convert.Run(t.Context(), convert.Options{Source: "dir:" + filepath.Join(dir, "tree"), Dest: "oci:" + layout + ":drill", ChunkSize: madeChunk}); err != nil {
		t.Fatal(err)
	}
	r, err := startRegistry(layout, p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func TestServedImageIsRightFromEndToEnd(t *testing.T) {
	r := served(t, pace{})
	report, err := image.Check(context.Background(), r.ref(), image.Options{}, nil)
	if err != nil || report.Chunks < 16 || len(report.Damage) > 0 {
		t.Fatalf("%+v, %v", report, err)
	}
}

func TestCutSourceAnswersNothingUntilItIsBack(t *testing.T) {
	r := served(t, pace{})
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	get := func() error {
		resp, err := client.Get("http://" + r.addr + "/v2/")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		_, err = io.ReadAll(resp.Body)
		return err
	}
	if err := get(); err != nil {
		t.Fatal(err)
	}
	r.shaper.cut(true)
	for range 3 {
		if get() == nil {
			t.Error("answered while it was cut")
		}
	}
	r.shaper.cut(false)
	if err := get(); err != nil {
		t.Errorf("when it was back: %v", err)
	}
}

func TestCutReachesAnAnswerThatIsUnderWay(t *testing.T) {
	r := served(t, pace{rate: 64 << 10})
	var blob string
	entries, err := os.ReadDir(filepath.Join(r.layout, "blobs", "sha256"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if fi, err := e.Info(); err == nil && fi.Size() > 1<<19 {
			blob = e.Name()
		}
	}
	resp, err := http.Get("http://" + r.addr + "/v2/drill/blobs/sha256:" + blob)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.ReadFull(resp.Body, make([]byte, 1<<10)); err != nil {
		t.Fatal(err)
	}
	r.shaper.cut(true)
	if n, err := io.Copy(io.Discard, resp.Body); err == nil {
		t.Errorf("the answer went on for %d bytes, to its end", n)
	}
}

func TestPaceBoundsAllConnectionsTogether(t *testing.T) {
	s := newShaper(nil, pace{rate: 1 << 20})
	start := time.Now()
	done := make(chan struct{})
	for range 4 {
		go func() { // ends when its bytes are sent; waited for below
			for range 4 {
				s.take(16 << 10)
			}
			done <- struct{}{}
		}()
	}
	for range 4 {
		<-done
	}
	if took := time.Since(start); took < 240*time.Millisecond {
		t.Errorf("256 KiB at 1 MiB/s took %v", took)
	}
}

func TestOnlyTheImageIsServed(t *testing.T) {
	r := served(t, pace{})
	for _, path := range []string{"/", "/v2/other/blobs/" + r.root.Digest.String(), "/v2/drill/blobs/sha256:../../index.json", "/v2/drill/blobs/sha256:", "/v2/drill/tags/list", "/v2/drill/manifests/latest", "/v2/drill/blobs/md5:00"} {
		resp, err := http.Get("http://" + r.addr + path)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %s, %.100s", path, resp.Status, b)
		}
	}
}

func TestUnitOfADaemonIsReadFromItsCgroup(t *testing.T) {
	tests := []struct{ in, want string }{
		{"0::/system.slice/holdfast.service\n", "holdfast.service"},
		{"5:memory:/x.service\n1:name=systemd:/system.slice/hf.service\n0::/\n", "hf.service"},
		{"0::/user.slice/session-1.scope\n", ""},
		{"4:memory:/system.slice/holdfast.service\n", ""},
		{"garbage\n::\n", ""},
		{"", ""},
	}
	for _, tt := range tests {
		if got := unitOf(tt.in); got != tt.want {
			t.Errorf("%q: got %q, want %q", tt.in, got, tt.want)
		}
	}
}

func TestPlanSaysWhatCannotBeDoneAndWhy(t *testing.T) {
	d := &drill{o: Options{Faults: Kinds(), StallBound: time.Second, Hold: time.Second}, c: &collector{}, site: &site{}, notDone: map[Kind]string{}}
	d.site.status.PID, d.site.status.Root = 77, t.TempDir()
	d.wire()
	for _, s := range d.plan().Steps {
		cannot := map[Kind]string{
			Restart: "neither a keeper nor a systemd unit", SourceCut: "--self", SourceSlow: "--self", DiskFull: "--allow-disk-full",
		}[s.Kind]
		if s.Kind != OOM && (s.Cannot == "") != (cannot == "") || !strings.Contains(s.Cannot, cannot) {
			t.Errorf("%s: cannot: %q, want %q", s.Kind, s.Cannot, cannot)
		}
		if s.Kind == Kill && !strings.Contains(s.Does, "SIGKILL to process 77") {
			t.Errorf("%s: %q", s.Kind, s.Does)
		}
	}
	if kinds, text := len(d.possible()), d.plan().Print(); kinds < 5 || !strings.Contains(text, "disk-full    cannot be done: ") {
		t.Errorf("%d possible:\n%s", kinds, text)
	}
}
