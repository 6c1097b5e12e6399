package convert

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"holdfast/rafs"
	"holdfast/rafs/oci"
	"holdfast/tests/registry"
)

func startRegistry(t *testing.T) string {
	t.Helper()
	r, err := registry.Start(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r.Addr()
}

func parseTag(t *testing.T, s string) name.Reference {
	t.Helper()
	ref, err := name.ParseReference(s)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// pull copies an image of a registry, whose layers the registry library knows nothing of, into a layout.
func pull(t *testing.T, ref name.Reference, path string) {
	t.Helper()
	d, err := remote.Get(ref)
	if err != nil {
		t.Fatal(err)
	}
	if d.MediaType.IsIndex() {
		idx, err := d.ImageIndex()
		if err != nil {
			t.Fatal(err)
		}
		ociLayout(t, path, "latest", idx)
		return
	}
	img, err := d.Image()
	if err != nil {
		t.Fatal(err)
	}
	ociLayout(t, path, "latest", img)
}

func TestRegistryToRegistryGivesWhatALayoutGets(t *testing.T) {
	tmp, host := t.TempDir(), startRegistry(t)
	img := ociImage(t, gzipped(makeTar(t, reg("a", strings.Repeat("content ", 300000)), reg("b", "b"))), zstded(makeTar(t, reg("c", "c"), reg(".wh.b", ""))))
	src := host + "/some/image:v1"
	if err := remote.Write(parseTag(t, src), img); err != nil {
		t.Fatal(err)
	}
	o := Options{ChunkSize: 64 << 10, Codec: rafs.CodecZstd}
	local := convertTo(t, tmp, "oci:"+ociLayout(t, tmp+"/in", "x", img), o)
	want := tagged(t, tmp+"/out", "latest").Digest.String()

	o.Source, o.Dest = "docker://"+src, "docker://"+host+"/other/image:rafs"
	res, err := Run(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	if res.Digest != want || res.Totals.Pushed == 0 || res.Totals.Read != res.Totals.Total {
		t.Errorf("result %+v, want digest %s", res, want)
	}
	pull(t, parseTag(t, host+"/other/image:rafs"), tmp+"/pulled")
	d := tagged(t, tmp+"/pulled", "latest")
	if d.Digest.String() != want {
		t.Errorf("the registry has %s, want %s", d.Digest, want)
	}
	diff(t, openConverted(t, tmp+"/pulled", d).files, local.files)

	// By digest, and with everything there already.
	ref := parseTag(t, src)
	desc, err := remote.Head(ref)
	if err != nil {
		t.Fatal(err)
	}
	o.Source = fmt.Sprintf("docker://%s@%s", ref.Context(), desc.Digest)
	if res, err = Run(context.Background(), o); err != nil || res.Digest != want || res.Totals.Pushed != 0 {
		t.Errorf("again: %+v, %v", res, err)
	}
}

func TestIndexGoesToARegistryWhole(t *testing.T) {
	tmp, host := t.TempDir(), startRegistry(t)
	src := "oci:" + multiPlatform(t, tmp+"/in")
	res, err := Run(context.Background(), Options{Source: src, Dest: "docker://" + host + "/multi:x"})
	if err != nil {
		t.Fatal(err)
	}
	pull(t, parseTag(t, host+"/multi:x"), tmp+"/pulled")
	root := tagged(t, tmp+"/pulled", "latest")
	if root.Digest.String() != res.Digest {
		t.Errorf("the registry has %s, want %s", root.Digest, res.Digest)
	}
	var idx ocispec.Index
	parseJSON(t, layoutBlob(t, tmp+"/pulled", root), &idx)
	for _, d := range idx.Manifests {
		if got := openConverted(t, tmp+"/pulled", d); got.files["/arch"].Content != d.Platform.Architecture {
			t.Errorf("%v holds %+v", d.Platform, got.files)
		}
	}
}

// faultyRegistry serves a registry through a proxy that breaks blobs: fault is called with how many answers with blob data
// there were before, and may change the next.
func faultyRegistry(t *testing.T, host string, fault func(n int32, resp *http.Response) error) string {
	t.Helper()
	target, err := url.Parse("http://" + host)
	if err != nil {
		t.Fatal(err)
	}
	var n atomic.Int32
	p := httputil.NewSingleHostReverseProxy(target)
	p.ModifyResponse = func(r *http.Response) error {
		if r.Request.Method == http.MethodGet && strings.Contains(r.Request.URL.Path, "/blobs/") {
			return fault(n.Add(1)-1, r)
		}
		return nil
	}
	p.ErrorLog = log.New(io.Discard, "", 0) // it reports the faults that it is there to make
	p.ErrorHandler = func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) }
	s := httptest.NewServer(p)
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

func pushTestImage(t *testing.T, host string) v1.Image {
	t.Helper()
	img := ociImage(t, makeTar(t, reg("a", strings.Repeat("content ", 500000))))
	if err := remote.Write(parseTag(t, host+"/image:x"), img); err != nil {
		t.Fatal(err)
	}
	return img
}

// A limitedBody breaks off after some bytes.
type limitedBody struct {
	io.ReadCloser
	left int
}

func (b *limitedBody) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, io.ErrUnexpectedEOF
	}
	n, err := b.ReadCloser.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}

// A flippedBody has one wrong byte.
type flippedBody struct {
	io.ReadCloser
	at int
}

func (b *flippedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.at >= 0 && b.at < n {
		p[b.at] ^= 1
	}
	b.at -= n
	return n, err
}

func TestBrokenOffDownloadIsResumed(t *testing.T) {
	tmp, host := t.TempDir(), startRegistry(t)
	img := pushTestImage(t, host)
	var answers atomic.Int32
	proxy := faultyRegistry(t, host, func(n int32, r *http.Response) error {
		answers.Add(1)
		if r.ContentLength > 1<<20 && n < 3 { // the layer
			r.Body = &limitedBody{r.Body, 1 << 20}
		}
		return nil
	})
	want := convertTo(t, tmp, "oci:"+ociLayout(t, tmp+"/in", "x", img), Options{})
	got := convertTo(t, t.TempDir(), "docker://"+proxy+"/image:x", Options{})
	diff(t, got.files, want.files)
	if answers.Load() < 4 {
		t.Errorf("%d answers: nothing was resumed", answers.Load())
	}
}

func TestWrongBytesFromARegistryAreRefused(t *testing.T) {
	tmp, host := t.TempDir(), startRegistry(t)
	pushTestImage(t, host)
	proxy := faultyRegistry(t, host, func(_ int32, r *http.Response) error {
		if r.ContentLength > 1<<20 {
			r.Body = &flippedBody{r.Body, 5000}
		}
		return nil
	})
	_, err := Run(context.Background(), Options{Source: "docker://" + proxy + "/image:x", Dest: "oci:" + tmp + "/out:x"})
	if err == nil {
		t.Fatal("damaged bytes were converted")
	}
	wantError(t, err, oci.ErrFormat, "layer 1")
	if _, err := os.Stat(tmp + "/out"); err == nil {
		t.Error("the layout is there")
	}
}

func TestRegistryThatSaysNoIsNotAskedForEver(t *testing.T) {
	tmp, host := t.TempDir(), startRegistry(t)
	pushTestImage(t, host)
	var answers atomic.Int32
	proxy := faultyRegistry(t, host, func(_ int32, r *http.Response) error {
		answers.Add(1)
		r.StatusCode, r.Status = http.StatusNotFound, "404 Not Found"
		return nil
	})
	for _, src := range []string{proxy + "/image:x", host + "/image:gone", host + "/none:x"} {
		_, err := Run(context.Background(), Options{Source: "docker://" + src, Dest: "oci:" + tmp + "/out:x"})
		if err == nil {
			t.Fatalf("%s was converted", src)
		}
		wantError(t, err, nil, "404", strings.Split(src, "/")[1][:4])
	}
	if answers.Load() != 1 {
		t.Errorf("the blob was asked for %d times", answers.Load())
	}
}

func TestPushToARegistryThatIsNotThereFails(t *testing.T) {
	tmp := t.TempDir()
	s := httptest.NewServer(http.NotFoundHandler())
	addr := strings.TrimPrefix(s.URL, "http://")
	s.Close()
	t.Setenv("TMPDIR", tmp)
	x := writeFile(t, tmp+"/x.tar", makeTar(t, reg("a", "a")))
	_, err := Run(context.Background(), Options{Source: "tar:" + x, Dest: "docker://" + addr + "/image:x"})
	if err == nil {
		t.Fatal("pushed")
	}
	wantError(t, err, nil, addr, "push")
	if entries, _ := os.ReadDir(tmp); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}
