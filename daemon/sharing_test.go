package daemon

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"holdfast/rafs/convert"
	"holdfast/rafs/dictionary"
	"holdfast/rafs/image"
)

func TestSharingCountsWhatImagesOfADomainHaveInCommon(t *testing.T) {
	d, c := serve(t)
	tree, _ := makeTree(t, 6)
	one := makeImage(t, tree, convert.Options{})
	if err := os.WriteFile(filepath.Join(tree, "more"), make([]byte, 5000), 0o600); err != nil {
		t.Fatal(err)
	}
	dict, err := dictionary.Open(t.Context(), []string{one}, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer dict.Close()
	two := makeImage(t, tree, convert.Options{Dictionary: dict.Blobs()})
	off := false
	for _, m := range []struct{ ref, domain string }{{one, ""}, {two, ""}, {two, ""}, {one, "other"}} {
		dir := t.TempDir()
		if _, err := c.Mount(t.Context(), MountRequest{Image: m.ref, Dir: dir, Domain: m.domain, Prefetch: &off}); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := c.Umount(t.Context(), dir); err != nil {
				t.Error(err)
			}
		}()
	}
	var size, more, present int64 // of the blob in common, and of the other
	for _, o := range d.objects.all() {
		switch {
		case o.key.Domain == "other":
			size = o.size()
		case o.size() == 8192:
			more = o.size()
		default:
			if err := d.fill(t.Context(), o, span{0, 3}, reader{ready: func() {}}); err != nil {
				t.Fatal(err)
			}
			present, _ = o.presentBytes()
			o.copied.Store(4096)
		}
	}
	s, err := c.Dedup(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if size == 0 || more == 0 || present == 0 {
		t.Fatalf("objects of %d and %d bytes, %d present", size, more, present)
	}
	shared := SharingSums{Images: 2, Objects: 2, Size: size + more, Shared: size, Saved: present, Copied: 4096}
	if want := (SharingSums{Images: 3, Objects: 3, Size: 2*size + more, Shared: size, Saved: present, Copied: 4096}); s.Host != want {
		t.Errorf("host %+v, want %+v", s.Host, want)
	}
	domains := []DomainSharing{{LocalDomain, shared}, {"other", SharingSums{Images: 1, Objects: 1, Size: size}}}
	if !slices.Equal(s.Domains, domains) {
		t.Errorf("domains %+v, want %+v", s.Domains, domains)
	}
	want := map[string]ImageSharing{
		one + LocalDomain: {Size: size, Shared: size, Copied: 4096},
		two + LocalDomain: {Size: size + more, Shared: size, Copied: 4096},
		one + "other":     {Size: size},
	}
	for _, i := range s.Images {
		w := want[i.Ref+i.Domain]
		if i.Size != w.Size || i.Shared != w.Shared || i.Copied != w.Copied {
			t.Errorf("%+v, want %+v", i, w)
		}
	}
	if len(s.Images) != len(want) {
		t.Errorf("%d images, want %d", len(s.Images), len(want))
	}
}
