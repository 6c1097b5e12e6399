package daemon

import (
	"errors"
	"strings"
	"testing"

	"holdfast/fscache/simkernel"
	"holdfast/rafs/convert"
)

const identity = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestDerivedDomainsAreNamesThatMayBeGiven(t *testing.T) {
	for registry, want := range map[string]string{
		"registry.example":          "registry.example-",
		"127.0.0.1:5000":            "127.0.0.1-5000-",
		"[::1]:5000":                "1--5000-",
		"REGISTRY.example":          "registry.example-",
		"...":                       "registry-",
		"../../etc":                 "etc-",
		strings.Repeat("long.", 20): strings.Repeat("long.", 20)[:domainRegistry] + "-",
		"bücher.example":            "b-cher.example-",
	} {
		got := domainName(registry, identity)
		if err := checkDomain(got); err != nil || got != want+identity[:domainIdentity] {
			t.Errorf("domain of %q is %q (%v), want %q and the identity", registry, got, err, want)
		}
	}
}

func TestDomainNamesAreRefusedThatAreNoPlainNames(t *testing.T) {
	for _, name := range []string{"", ".", "..", "/", "a/b", "../a", ".a", "-a", "_a", "a\x00", "a,b", "a b", "A", "ä", "a\n", strings.Repeat("a", 65)} {
		var e *Error
		if err := checkDomain(name); !errors.As(err, &e) || e.Code != CodeInvalid || e.Hint == "" {
			t.Errorf("domain %q: %v, want refused with what to do", name, err)
		}
	}
	for _, name := range []string{"a", "0", "a..b", "a-", LocalDomain, strings.Repeat("a", 64)} {
		if err := checkDomain(name); err != nil {
			t.Errorf("domain %q: %v", name, err)
		}
	}
}

func TestAMountThatNamesNoDomainIsInTheLocalOneAndSaysSo(t *testing.T) {
	d, _ := newTestDaemon(t, simkernel.New(simkernel.Fanotify), t.TempDir(), nil)
	d.pump.start()
	defer d.close()
	tree, _ := makeTree(t, 1)
	ref, dir := makeImage(t, tree, convert.Options{}), t.TempDir()
	for want, given := range map[string]string{LocalDomain: "", "chosen": "chosen"} {
		m, err := d.mount(t.Context(), MountRequest{Image: ref, Dir: dir, Domain: given})
		if err != nil || m.info().Domain != want {
			t.Fatalf("domain %q: %+v, %v", want, m, err)
		}
		if err := d.unmount(t.Context(), dir); err != nil {
			t.Fatal(err)
		}
	}
	images, err := d.images()
	if err != nil || len(images) != 1 || strings.Join(images[0].Domains, " ") != "chosen local" {
		t.Errorf("images %+v, %v: want both domains", images, err)
	}
}
