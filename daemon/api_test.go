package daemon

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/fscache/simkernel"
	"holdfast/rafs/convert"
)

// serve runs a daemon with its API on a simulated kernel, until the test ends.
func serve(t *testing.T) (*Daemon, *Client) {
	t.Helper()
	d, _ := newTestDaemon(t, simkernel.New(simkernel.Fanotify), t.TempDir(), func(o *Options) { o.Socket = filepath.Join(o.Root, "run", "api.sock") })
	ready := make(chan struct{})
	d.opt.Ready = func() { close(ready) }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	c := NewClient(d.opt.Socket)
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		c.Close()
	})
	select {
	case <-ready:
	case err := <-done:
		done <- nil
		t.Fatal(err)
	}
	return d, c
}

func TestBadRequestsAreRefusedByName(t *testing.T) {
	d, c := serve(t)
	file := filepath.Join(t.TempDir(), "file")
	dir := filepath.Dir(file)
	link := filepath.Join(dir, "link")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	for _, r := range []struct {
		name, method, path, body string
		status                   int
		code, says               string
	}{
		{"unknown path", "GET", "/v2/status", "", 404, CodeNotFound, "/v1/status"},
		{"root", "GET", "/", "", 404, CodeNotFound, "/v1/status"},
		{"method", "PUT", "/v1/mounts", "", 405, CodeMethod, "DELETE, GET, POST"},
		{"method of status", "POST", "/v1/status", "{}", 405, CodeMethod, "GET"},
		{"unknown parameter", "GET", "/v1/status?verbose=1", "", 400, CodeInvalid, "verbose"},
		{"unknown parameter of images", "GET", "/v1/images?all", "", 400, CodeInvalid, "all"},
		{"unknown field", "POST", "/v1/mounts", `{"image":"oci:/x","dir":"/y","colour":1}`, 400, CodeInvalid, "colour"},
		{"wrong type", "POST", "/v1/mounts", `{"image":7}`, 400, CodeInvalid, "image"},
		{"not JSON", "POST", "/v1/mounts", `image=x`, 400, CodeInvalid, "byte"},
		{"nothing", "POST", "/v1/mounts", ``, 400, CodeInvalid, "EOF"},
		{"two values", "POST", "/v1/mounts", `{"image":"oci:/x"} {}`, 400, CodeInvalid, "after its end"},
		{"large body", "POST", "/v1/mounts", `{"image":"` + strings.Repeat("x", maxBody) + `"}`, 413, CodeTooLarge, "65536"},
		{"no image", "POST", "/v1/mounts", `{"dir":"/y"}`, 400, CodeInvalid, "image"},
		{"relative directory", "POST", "/v1/mounts", `{"image":"oci:/x","dir":"y"}`, 400, CodeInvalid, "absolute"},
		{"unclean directory", "POST", "/v1/mounts", `{"image":"oci:/x","dir":"/tmp/../tmp"}`, 400, CodeInvalid, "clean"},
		{"missing directory", "POST", "/v1/mounts", `{"image":"oci:/x","dir":"` + dir + `/none"}`, 404, CodeNotFound, "make the directory"},
		{"file", "POST", "/v1/mounts", `{"image":"oci:/x","dir":"` + file + `"}`, 400, CodeInvalid, "not a directory"},
		{"symbolic link", "POST", "/v1/mounts", `{"image":"oci:/x","dir":"` + link + `"}`, 400, CodeInvalid, "symbolic link"},
		{"prefetch of nothing", "POST", "/v1/prefetch", `{}`, 400, CodeInvalid, "one of image and dir"},
		{"prefetch of two things", "POST", "/v1/prefetch", `{"image":"oci:/x","dir":"/y"}`, 400, CodeInvalid, "one of image and dir"},
		{"prefetch of what is not mounted", "POST", "/v1/prefetch", `{"image":"oci:/x:y"}`, 404, CodeNotFound, "mount it first"},
		{"prefetch of no mount", "GET", "/v1/prefetch?dir=/y", "", 404, CodeNotFound, "mount it first"},
		{"prefetch named twice", "GET", "/v1/prefetch?dir=/y&dir=/z", "", 400, CodeInvalid, "2 times"},
		{"prefetch with a parameter too many", "GET", "/v1/prefetch?dir=/y&all=1", "", 400, CodeInvalid, "all"},
		{"busy directory", "POST", "/v1/mounts", `{"image":"oci:/x","dir":"/proc"}`, 409, CodeConflict, "proc"},
		{"domain with a slash", "POST", "/v1/mounts", `{"image":"oci:/x","dir":"` + dir + `","domain":"a/b"}`, 400, CodeInvalid, "a/b"},
		{"domain of dots", "POST", "/v1/mounts", `{"image":"oci:/x","dir":"` + dir + `","domain":".."}`, 400, CodeInvalid, "domain"},
		{"long domain", "POST", "/v1/mounts", `{"image":"oci:/x","dir":"` + dir + `","domain":"` + strings.Repeat("a", 65) + `"}`, 400, CodeInvalid, "65"},
		{"negative limit", "POST", "/v1/mounts", `{"image":"oci:/x","dir":"` + dir + `","prefetch_bps":-1}`, 400, CodeInvalid, "negative"},
		{"image that is not there", "POST", "/v1/mounts", `{"image":"oci:` + dir + `/none:x","dir":"` + dir + `"}`, 422, CodeImage, "none"},
		{"image of no kind", "POST", "/v1/mounts", `{"image":"ftp:x","dir":"` + dir + `"}`, 422, CodeImage, "ftp"},
		{"the daemon's root", "POST", "/v1/mounts", `{"image":"oci:/x","dir":"` + d.opt.Root + `"}`, 400, CodeInvalid, "own directory"},
		{"the directory of the daemon's socket", "POST", "/v1/mounts", `{"image":"oci:/x","dir":"` + filepath.Dir(d.opt.Socket) + `"}`, 400, CodeInvalid, "own directory"},
		{"a directory above the daemon's root", "POST", "/v1/mounts", `{"image":"oci:/x","dir":"` + filepath.Dir(d.opt.Root) + `"}`, 400, CodeInvalid, "own directory"},
		{"NUL in the image", "POST", "/v1/mounts", `{"image":"oci:/x\u0000y","dir":"` + dir + `"}`, 422, CodeImage, "invalid argument"},
		{"NUL in the directory", "POST", "/v1/mounts", `{"image":"oci:/x","dir":"/tmp\u0000"}`, 400, CodeInvalid, "invalid argument"},
		{"NUL in the domain", "POST", "/v1/mounts", `{"image":"oci:/x","dir":"` + dir + `","domain":"a\u0000"}`, 400, CodeInvalid, `a\x00`},
		{"line break in the domain", "POST", "/v1/mounts", `{"image":"oci:/x","dir":"` + dir + `","domain":"a\n"}`, 400, CodeInvalid, `a\n`},
		{"field in other case", "POST", "/v1/mounts", `{"image":"oci:/x","Dir":"y"}`, 400, CodeInvalid, "absolute"},
		{"registry that is not there", "POST", "/v1/mounts", `{"image":"docker://127.0.0.1:1/x:1","dir":"` + dir + `"}`, 502, CodeSource, "try again later"},
		{"no directory to unmount", "DELETE", "/v1/mounts", "", 400, CodeInvalid, "dir"},
		{"two directories to unmount", "DELETE", "/v1/mounts?dir=/a&dir=/b", "", 400, CodeInvalid, "2"},
		{"parameter of unmount", "DELETE", "/v1/mounts?dir=/a&force=1", "", 400, CodeInvalid, "force"},
		{"nothing mounted", "DELETE", "/v1/mounts?dir=" + dir, "", 404, CodeNotFound, dir},
	} {
		req, err := http.NewRequest(r.method, "http://holdfast"+r.path, strings.NewReader(r.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.http.Do(req)
		if err != nil {
			t.Fatalf("%s: %v", r.name, err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		var e Error
		if err := json.Unmarshal(b, &e); err != nil {
			t.Errorf("%s: the answer is not JSON: %q", r.name, b)
			continue
		}
		if resp.StatusCode != r.status || e.Code != r.code || !strings.Contains(e.Error(), r.says) {
			t.Errorf("%s: %d %s %q, want %d %s and %q in it", r.name, resp.StatusCode, e.Code, e.Error(), r.status, r.code, r.says)
		}
	}
}

func TestFailedMountLeavesNothing(t *testing.T) {
	d, c := serve(t)
	tree, _ := makeTree(t, 6)
	ref := makeImage(t, tree, convert.Options{})
	dir := t.TempDir()
	d.engine.(*engine).mountError = unix.EUCLEAN
	_, err := c.Mount(t.Context(), MountRequest{Image: ref, Dir: dir})
	wantCode(t, err, CodeInternal, "structure needs cleaning")
	records, err := d.state.Mounts()
	if err != nil || len(records) != 0 || !d.mounts.empty() || len(d.objects.all()) != 0 {
		t.Errorf("left: %d records (%v), %d objects", len(records), err, len(d.objects.all()))
	}
	d.engine.(*engine).mountError = nil
	if _, err := c.Mount(t.Context(), MountRequest{Image: ref, Dir: dir}); err != nil {
		t.Errorf("mount after a failed one: %v", err)
	}
	_, err = c.Mount(t.Context(), MountRequest{Image: ref, Dir: dir})
	wantCode(t, err, CodeConflict, "is mounted there")
	if err := c.Umount(t.Context(), dir); err != nil {
		t.Error(err)
	}
}

// TestFailedMountThatTheKernelHasNotLetGoHarmsNoLaterOne is about the moment in which the kernel still has the objects of a mount
// that it refused: they stay with a source that works, and go when they can.
func TestFailedMountThatTheKernelHasNotLetGoHarmsNoLaterOne(t *testing.T) {
	d, c := serve(t)
	tree, _ := makeTree(t, 6)
	ref := makeImage(t, tree, convert.Options{})
	e := d.engine.(*engine)
	e.mountError, e.busy = unix.EUCLEAN, true
	dir := t.TempDir()
	_, err := c.Mount(t.Context(), MountRequest{Image: ref, Dir: dir})
	wantCode(t, err, CodeInternal, "structure needs cleaning")
	e.mountError = nil
	off := false
	if _, err := c.Mount(t.Context(), MountRequest{Image: ref, Dir: dir, Prefetch: &off}); err != nil {
		t.Fatal(err)
	}
	for _, o := range d.objects.all() {
		if err := d.fill(t.Context(), o, span{0, 1}, reader{ready: func() {}}); err != nil {
			t.Errorf("read of %s after a failed mount of the same image: %v", o.key, err)
		}
	}
	e.busy = false
	if err := c.Umount(t.Context(), dir); err != nil {
		t.Error(err)
	}
	if !d.mounts.empty() || len(d.objects.all()) != 0 {
		t.Errorf("%d objects are left", len(d.objects.all()))
	}
}

func TestSocketIsTheOwnersOnly(t *testing.T) {
	d, _ := serve(t)
	fi, err := os.Stat(d.opt.Socket)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: mode %v, %v, want 0600", fi.Mode(), err)
	}
}

func TestSocketOfALiveDaemonIsNotTaken(t *testing.T) {
	d, _ := serve(t)
	if _, err := Listen(t.Context(), d.opt.Socket); err == nil || !strings.Contains(err.Error(), "another daemon") {
		t.Errorf("listening on a live daemon's socket: %v", err)
	}
}

func TestStaleSocketIsReplacedAndAFileIsNot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	l, err := Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(t.Context(), path); err == nil {
		t.Error("a file was taken for a stale socket")
	}
	if b, err := os.ReadFile(path); string(b) != "precious" {
		t.Errorf("the file was changed: %q, %v", b, err)
	}
}

func TestClientSaysThatNoDaemonAnswers(t *testing.T) {
	c := NewClient(filepath.Join(t.TempDir(), "none"))
	defer c.Close()
	if _, err := c.Status(t.Context()); err == nil || !strings.Contains(err.Error(), "holdfast serve") {
		t.Errorf("no daemon: %v", err)
	}
}

func TestMountInfoIsReadAsTheKernelWritesIt(t *testing.T) {
	points, err := parseMountInfo(strings.NewReader(`22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
36 22 0:31 / /mnt/with\040space\134x ro,relatime master:1 shared:2 - erofs /a/b ro
37 22 0:32 / /mnt/over rw - tmpfs tmpfs rw
38 37 0:33 / /mnt/over ro - erofs none ro,fsid=x
short line
39 22 0:34 / /mnt/bad\777 rw - proc proc rw
`))
	if err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]string{"/": "ext4", `/mnt/with space\x`: "erofs", "/mnt/over": "erofs", `/mnt/bad\777`: "proc"} {
		if points[dir] != want {
			t.Errorf("%q: %q, want %q (all: %v)", dir, points[dir], want, points)
		}
	}
}

func FuzzParseMountInfo(f *testing.F) {
	f.Add("36 22 0:31 / /mnt/with\\040space ro,relatime master:1 - erofs /a/b ro\n")
	f.Add("1 - x\n\\1\\\\")
	f.Fuzz(func(t *testing.T, s string) {
		points, err := parseMountInfo(strings.NewReader(s))
		if err != nil && len(s) < 1<<20 {
			t.Errorf("%q: %v", s, err)
		}
		for dir := range points {
			if len(dir) > len(s) {
				t.Errorf("%q: grew", dir)
			}
		}
	})
}

func FuzzDecodeBody(f *testing.F) {
	f.Add([]byte(`{"image":"oci:/x","dir":"/y","prefetch":true,"prefetch_bps":5}`))
	f.Add([]byte(`{"image":"x"} trailing`))
	f.Add([]byte(`[[[[`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := http.NewRequest(http.MethodPost, "/v1/mounts", strings.NewReader(string(b)))
		if err != nil {
			t.Fatal(err)
		}
		var m MountRequest
		if err := decodeBody(r, &m); err != nil {
			return
		}
		again, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		r.Body = io.NopCloser(strings.NewReader(string(again)))
		var m2 MountRequest
		if err := decodeBody(r, &m2); err != nil {
			t.Errorf("%q was understood, %q not: %v", b, again, err)
		}
	})
}
