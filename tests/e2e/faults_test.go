package e2e

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/tests/registry"
)

// A fault answers a request in place of the registry, which next is.
type fault func(w http.ResponseWriter, r *http.Request, next http.Handler)

// A front is a proxy before a registry that can be told to answer wrongly.
type front struct {
	srv   *httptest.Server
	fault atomic.Pointer[fault]
	path  atomic.Pointer[string] // only requests whose path holds it meet the fault
	met   atomic.Int64           // requests that did
}

func startFront(t *testing.T, upstream string) *front {
	t.Helper()
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: upstream})
	proxy.ErrorLog = log.New(io.Discard, "", 0) // clients that hang up
	f := &front{}
	f.srv = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		do := f.fault.Load()
		if do == nil || !strings.Contains(r.URL.Path, *f.path.Load()) {
			proxy.ServeHTTP(w, r)
			return
		}
		f.met.Add(1)
		(*do)(w, r, proxy)
	}))
	t.Cleanup(func() {
		f.srv.CloseClientConnections()
		f.srv.Close()
	})
	return f
}

func (f *front) addr() string { return f.srv.Listener.Addr().String() }

// fail makes requests for paths that hold path meet do, and heal ends that.
func (f *front) fail(path string, do fault) {
	f.met.Store(0)
	f.path.Store(&path)
	f.fault.Store(&do)
}

func (f *front) heal() { f.fault.Store(nil) }

// changed answers as the registry does, but for what change makes of it.
func changed(change func(h http.Header, body []byte) []byte) fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, r)
		if rec.Body.Len() == 0 { // who asked has hung up
			w.WriteHeader(rec.Code)
			return
		}
		h := rec.Header()
		h.Del("Content-Length")
		body := change(h, rec.Body.Bytes())
		for k, v := range h {
			w.Header()[k] = v
		}
		w.WriteHeader(rec.Code)
		w.Write(body)
	}
}

// sized gives the answer the length of its body: without it, it would come in pieces that say nothing of the whole.
func sized(h http.Header, body []byte) []byte {
	h.Set("Content-Length", strconv.Itoa(len(body)))
	return body
}

func shortWithLength(h http.Header, body []byte) []byte { return sized(h, body[:len(body)/2]) }
func shortInPieces(_ http.Header, body []byte) []byte   { return body[:len(body)/2] }
func longWithLength(h http.Header, body []byte) []byte  { return sized(h, append(body, body...)) }
func longInPieces(_ http.Header, body []byte) []byte    { return append(body, body...) }
func garbageEncoding(h http.Header, body []byte) []byte {
	h.Set("Content-Encoding", "gzip")
	return sized(h, body)
}

func flippedBit(h http.Header, body []byte) []byte {
	body[len(body)/2] ^= 0x10
	return sized(h, body)
}

func wrongRange(h http.Header, body []byte) []byte {
	var first, last, size int64
	if _, err := fmt.Sscanf(h.Get("Content-Range"), "bytes %d-%d/%d", &first, &last, &size); err != nil {
		return sized(h, body[1:]) // not a range: wrong all the same
	}
	h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first+1, last+1, size))
	return sized(h, body)
}

// wholeBlob leaves the range out of the request.
func wholeBlob(w http.ResponseWriter, r *http.Request, next http.Handler) {
	r.Header.Del("Range")
	next.ServeHTTP(w, r)
}

// code answers with a status and an error document.
func code(status int, header ...string) fault {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
		io.WriteString(w, `{"errors":[{"code":"UNKNOWN","message":"a test says no"}]}`)
	}
}

// endless gives a right header and then zeros for as long as anybody takes them.
func endless(w http.ResponseWriter, r *http.Request, next http.Handler) {
	changed(func(h http.Header, _ []byte) []byte { return nil })(w, r, next)
	for {
		if _, err := w.Write(make([]byte, 64<<10)); err != nil {
			return
		}
	}
}

// stalled gives a right header and half of the body, and then nothing until the client hangs up.
func stalled(w http.ResponseWriter, r *http.Request, next http.Handler) {
	changed(shortInPieces)(w, r, next)
	w.(http.Flusher).Flush()
	<-r.Context().Done()
}

// reset breaks the connection off in the middle of the body.
func reset(w http.ResponseWriter, r *http.Request, next http.Handler) {
	changed(func(h http.Header, body []byte) []byte {
		sized(h, body)
		return body[:len(body)/2]
	})(w, r, next)
	panic(http.ErrAbortHandler)
}

// rangeFaults are wrong answers to a request for a range, what a reader gets meanwhile, and what the log says of it.
var rangeFaults = []struct {
	name string
	do   fault
	eio  bool   // else the right bytes, after another try perhaps
	says string // of what is EIO
}{
	{"short, with its length", changed(shortWithLength), true, "the answer has 32768 bytes"},
	{"short, in pieces", changed(shortInPieces), true, "bytes early"},
	{"too long, with its length", changed(longWithLength), true, "the answer has"},
	{"too long, in pieces", changed(longInPieces), false, ""}, // cut where the range ends
	{"wrong range", changed(wrongRange), true, "the answer is for"},
	{"encoded", changed(garbageEncoding), true, "the answer is encoded"},
	{"whole blob", wholeBlob, true, "use another registry"},
	{"flipped bit", changed(flippedBit), true, "digest mismatch"},
	{"401", code(401, "WWW-Authenticate", `Basic realm="x"`), true, "log in"},
	{"404", code(404), true, "is it still there"},
	{"429", code(429, "Retry-After", "3600"), true, "it asks to wait 1h"},
	{"500", code(500), true, "500 Internal Server Error"},
	{"503", code(503), true, "a test says no"},
	{"endless", endless, true, "digest mismatch"},
	{"stalled", stalled, true, "read deadline"},
	{"reset", reset, true, "fetch failed"},
}

// faultChunk is the size of the chunks and files below.
const faultChunk = 64 << 10

// chunkFiles is a tree of n files f0, f1, ... of one chunk each, which does not compress.
func chunkFiles(n int) model {
	r := rand.New(rand.NewPCG(11, 11))
	m := model{".": {hdr: header(r, ".", tar.TypeDir), links: 1}}
	for i := range n {
		name := fmt.Sprintf("f%d", i)
		f := &file{hdr: header(r, name, tar.TypeReg), links: 1, content: randomBytes(r, faultChunk, 8)}
		f.hdr.Size = faultChunk
		m[name] = f
	}
	return m
}

// A faulty is a host, and an image in a registry behind a front.
type faulty struct {
	*testHost
	*front
	image  string
	tree   model
	object []byte // what the cache object of its blob must be
	blob   string // its id
}

// newFaulty converts n files of one chunk each and pushes them to a registry behind a front.
func newFaulty(t *testing.T, n int, serve ...string) *faulty {
	t.Helper()
	h := newHost(t, serve...)
	reg, err := registry.Start(filepath.Join(h.Dir, "registry"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { reg.Close() })
	f := &faulty{testHost: h, front: startFront(t, reg.Addr()), tree: chunkFiles(n)}
	f.image = "docker://" + f.addr() + "/faulty:1"
	tarball, layout := filepath.Join(h.Dir, "faulty.tar"), filepath.Join(h.Dir, "layout")
	f.tree.writeTar(t, tarball)
	for _, dest := range []string{"docker://" + reg.Addr() + "/faulty:1", "oci:" + layout + ":1"} {
		h.must("convert", "--chunk-size", strconv.Itoa(faultChunk), "--compression", "none", "tar:"+tarball, dest)
	}
	// Chunks that are a multiple of 4 KiB and not compressed lie in the blob as they do in the object.
	f.blob, f.object = largest(t, filepath.Join(layout, "blobs/sha256"))
	f.object = f.object[:n*faultChunk]
	return f
}

// largest returns the largest file of a directory.
func largest(t *testing.T, dir string) (name string, content []byte) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > len(content) {
			name, content = e.Name(), b
		}
	}
	return name, content
}

// read reads a file of the image, and fails the test if it gives bytes that are not its.
func (f *faulty) read(mnt, name string) error {
	got, err := readFile(filepath.Join(mnt, name))
	want := f.tree[name].content
	switch {
	case err == nil && !bytes.Equal(got, want):
		f.t.Errorf("%s: %d wrong bytes, the first at %d", name, len(got), difference(got, want))
	case err != nil && (!strings.Contains(err.Error(), "input/output error") || !bytes.HasPrefix(want, got)):
		f.t.Errorf("%s: %d bytes, %v, want EIO and none that are wrong", name, len(got), err)
	}
	return err
}

// readAgain reads a file until that works, which it must within 20 s.
func (f *faulty) readAgain(mnt, name string) {
	f.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for err := f.read(mnt, name); err != nil; err = f.read(mnt, name) {
		if time.Now().After(deadline) {
			f.t.Errorf("%s: still %v", name, err)
			return
		}
	}
}

// counts are the counters of `holdfast status --json`.
type counts struct{ Mismatches, Refused, PID int }

func (h *testHost) counts() (c counts) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(h.must("status", "--json")), &c); err != nil {
		h.t.Fatal(err)
	}
	return c
}

// logged is what keeper and daemon logged from an offset on.
func (h *testHost) logged(from int) string {
	h.t.Helper()
	b, err := os.ReadFile(filepath.Join(h.Dir, "serve.log"))
	if err != nil {
		h.t.Fatal(err)
	}
	return string(b[from:])
}

// checkCache compares what the cache holds of the blob with what it must be: each block is a hole, or right. That is looked at
// when the image is not mounted: while it is, whoever reads the file is a reader to the engine, and gets it mended.
func (f *faulty) checkCache() {
	f.t.Helper()
	right := 0
	err := filepath.WalkDir(filepath.Join(f.Dir, "root", "cache"), func(p string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(p)
		if err != nil || len(b) <= faultChunk {
			return err // the bootstrap's file
		}
		for off := 0; off < len(b); off += 4096 {
			block := b[off:min(off+4096, len(b))]
			switch {
			case off < len(f.object) && bytes.Equal(block, f.object[off:off+len(block)]):
				right++
			case !bytes.Equal(block, make([]byte, len(block))):
				f.t.Errorf("%s: the block at %d is neither a hole nor right", p, off)
			}
		}
		return nil
	})
	if err != nil {
		f.t.Fatal(err)
	}
	if right == 0 {
		f.t.Error("no cache file holds anything of the blob: this looked at the wrong files")
	}
}

func TestWrongAnswersOfARegistryGiveEIOOrTheRightBytesAndNeverReachTheCache(t *testing.T) {
	f := newFaulty(t, 2*len(rangeFaults), "--read-deadline", "600ms", "--read-ahead", "4KiB")
	mnt := f.mount(f.image, "--prefetch=off")
	for i, tt := range rangeFaults {
		t.Run(tt.name, func(t *testing.T) {
			before, log := f.counts(), len(f.logged(0))
			f.fail("/blobs/"+"sha256:"+f.blob, tt.do)
			// The first is read again when all is well; what the fault made of the second stays.
			var wg sync.WaitGroup
			for j := range 2 {
				name := "f" + strconv.Itoa(2*i+j)
				wg.Go(func() {
					if !tt.eio {
						f.readAgain(mnt, name)
					} else if f.read(mnt, name) == nil {
						t.Errorf("%s was read, want EIO", name)
					}
				})
			}
			wg.Wait()
			f.heal()
			if f.met.Load() == 0 {
				t.Fatal("nobody asked the registry: the test shows nothing")
			}
			after, said := f.counts(), f.logged(log)
			if tt.eio && after.Refused == before.Refused {
				t.Errorf("%d readers got an error, and before %d", after.Refused, before.Refused)
			}
			if wrong := strings.Contains(tt.says, "digest"); wrong != (after.Mismatches > before.Mismatches) {
				t.Errorf("%d mismatches, and before %d", after.Mismatches, before.Mismatches)
			}
			if tt.eio && (!strings.Contains(said, tt.says) || !strings.Contains(said, f.blob) || !strings.Contains(said, `"offset"`)) {
				t.Errorf("the log does not say %q, the blob and the offset:\n%.2000s", tt.says, said)
			}
			f.readAgain(mnt, "f"+strconv.Itoa(2*i))
		})
	}
	if peak := peakMemory(t, f.counts().PID); peak > 192<<20 {
		t.Errorf("the daemon took %d bytes of memory at its peak", peak)
	}
	f.must("umount", mnt)
	f.checkCache()
}

// peakMemory is the largest resident size of a process so far, in bytes.
func peakMemory(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "VmHWM:")
	var kib int
	if _, err := fmt.Sscan(rest, &kib); err != nil || kib == 0 {
		t.Fatalf("VmHWM of process %d: %v", pid, err)
	}
	return kib << 10
}
