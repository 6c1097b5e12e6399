package kill

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/tests/mutant"
)

// A removal is a mutation and the drill that must notice it.
type removal struct {
	mutant.Mutation
	engine string // the only one it is about; "": both
	drill  string // in drills; or a package, for its own tests
	detail string // of the drill: the case, or the tests of that package
}

var drills = map[string]func(t *testing.T, o options, detail string) error{
	"storm":   stormDrill,
	"source":  sourceDrill,
	"upgrade": upgradeDrill,
	"case":    caseDrill,
}

var removals = []removal{
	{Mutation: mutant.Mutation{Name: "no inbox", Edits: []mutant.Edit{{
		File: "state/inboxfile.go",
		Old:  "boxes, damaged = append(boxes, box), append(damaged, odd...)",
		New:  "box.Messages = nil\n\t\t\tboxes, damaged = append(boxes, box), append(damaged, odd...)",
	}}}, engine: "fanotify", drill: "storm"},
	{Mutation: mutant.Mutation{Name: "numbers not occupied", Edits: []mutant.Edit{{
		File: "fscache/fanotify/engine.go",
		Old:  "placed, err := occupy(slices.Collect(maps.Keys(orphans)))",
		New:  "placed, err := occupy(slices.Collect(maps.Keys(orphans))[:0])",
	}, { // the second line behind the first
		File: "fscache/fanotify/answer.go",
		Old:  "case ok && p.token == r.Token && o != nil:",
		New:  "case false:",
	}}}, engine: "fanotify", drill: "storm"},
	{Mutation: mutant.Mutation{Name: "slot free before the answer", Edits: []mutant.Edit{{
		File: "fscache/fanotify/answer.go",
		Old:  "\tcrash.Point(\"fanotify.answer.before-write\")\n",
		New:  "\te.free(slot)\n\tslot = -1\n\tcrash.Point(\"fanotify.answer.before-write\")\n",
	}, {
		File: "fscache/fanotify/answer.go",
		Old:  "\tcrash.Point(\"fanotify.answer.before-free\")\n\te.free(slot)\n",
		New:  "\tcrash.Point(\"fanotify.answer.before-free\")\n",
	}}}, engine: "fanotify", drill: "case", detail: "read fanotify.answer.before-write:20"},
	{Mutation: mutant.Mutation{Name: "restore before copen", Edits: []mutant.Edit{{
		File: "fscache/cachefiles/takeover.go",
		Old:  "\tcrash.Point(\"cachefiles.takeover.before-copen\")\n",
		New:  "\t_ = command(e.dev.f, \"restore\")\n\tcrash.Point(\"cachefiles.takeover.before-copen\")\n",
	}}}, engine: "cachefiles", drill: "storm"},
	{Mutation: mutant.Mutation{Name: "answer before the bytes", Edits: []mutant.Edit{{
		File: "daemon/transfer.go",
		Old:  "\tp, err := t.verified(ctx, b)\n",
		New:  "\tif t.demand != nil {\n\t\tt.demand.ready()\n\t\tt.demand = nil\n\t}\n\tp, err := t.verified(ctx, b)\n",
	}}}, drill: "storm"},
	{Mutation: mutant.Mutation{Name: "digest not checked", Edits: []mutant.Edit{{
		File: "rafs/blob/decoder.go",
		Old:  "if got := algo.Sum(dst); got != c.Digest {",
		New:  "if got := algo.Sum(dst); false && got != c.Digest {",
	}}}, drill: "source"},
	{Mutation: mutant.Mutation{Name: "old process still reading", Edits: []mutant.Edit{{
		File: "daemon/predecessor.go",
		Old:  "if err := d.pump.freeze(); err != nil {",
		New:  "if err := error(nil); err != nil {",
	}}}, drill: "upgrade"},
	{Mutation: mutant.Mutation{Name: "no barrier behind a descriptor", Edits: []mutant.Edit{{
		File: "handover/store.go",
		Old:  "\tcrash.Point(\"handover.store.before-barrier\")\n\tif err := s.barrier(b); err != nil {",
		New:  "\tcrash.Point(\"handover.store.before-barrier\")\n\tif err := error(nil); err != nil {",
	}}}, drill: "handover", detail: "Push|Store"},
}

// storms counts storm drills, none of which is like the one before.
var storms int

// stormDrill is random kills, with many requests in flight, until somebody notices.
func stormDrill(t *testing.T, o options, _ string) error {
	o.image = layout(t, large)
	storms++
	return stormy(o, slow(t, large, 20*time.Millisecond), 60, random(fmt.Sprint("storm drill", storms)), &tally{})
}

// caseDrill is one case of TestKillAtEveryPoint.
func caseDrill(t *testing.T, o options, detail string) error {
	c, err := parseCase(detail)
	if err != nil {
		return err
	}
	o.image, o.slow = layout(t, image), slow(t, image, 20*time.Millisecond)
	kills, err := c.insist(o)
	if err == nil && kills < len(c.plan) {
		t.Errorf("%v: nobody was killed", c)
	}
	return err
}

// sourceDrill reads an image whose source has wrong bytes in it: no reader may get them.
func sourceDrill(t *testing.T, o options, _ string) error {
	dir := filepath.Join(t.TempDir(), "layout")
	if err := image.Convert(t.Context(), "oci:"+dir+":image"); err != nil {
		return err
	}
	first := image.List()[0]
	page := make([]byte, 4096)
	first.Fill(page, 0)
	if err := spoil(dir, page); err != nil {
		return err
	}
	o.image, o.serve = source{"oci:" + dir + ":image", image}, append(o.serve, "--read-deadline", "1s")
	r, err := newRig(o)
	if err != nil {
		return err
	}
	return r.end(func() error {
		m, err := r.mount("own", false)
		if err != nil {
			return err
		}
		b, err := os.ReadFile(filepath.Join(m, first.Path))
		if err == nil && !bytes.Equal(b[:len(page)], page) {
			return errors.New("O1: a reader was given bytes that are not the image's")
		}
		if err == nil {
			return errors.New("the page was not spoilt")
		}
		return nil
	}())
}

// spoil changes a byte of a page in the blob that has it.
func spoil(dir string, page []byte) error {
	blobs, err := filepath.Glob(filepath.Join(dir, "blobs", "*", "*"))
	if err != nil {
		return err
	}
	for _, path := range blobs {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if i := bytes.Index(b, page); i >= 0 {
			b[i+1000] ^= 1
			return os.WriteFile(path, b, 0o600)
		}
	}
	return fmt.Errorf("no blob below %s has the page", dir)
}

// upgradeDrill upgrades again and again under readers.
func upgradeDrill(t *testing.T, o options, _ string) error {
	o.image = layout(t, large)
	r, err := newRig(o)
	if err != nil {
		return err
	}
	return r.end(func() error {
		dir, err := r.mount("own", false)
		if err != nil {
			return err
		}
		r.read(dir, 8, 200*time.Microsecond)
		for range 20 {
			if err := r.settled(); err != nil {
				return err
			}
			if has, err := r.optional(r.bin, "upgrade"); !has || err != nil {
				return errors.Join(err, fmt.Errorf("upgrade: there is the command: %v", has))
			}
			if r.broken() {
				break
			}
		}
		return r.verify()
	}())
}

// TestMutations builds holdfast without each of its safeties, and sees that the drill which is there for it fails. The product itself must
// pass all of them.
func TestMutations(t *testing.T) {
	if os.Getenv("HOLDFAST_DRILL") == "" {
		t.Skip("builds and drills that take minutes: set HOLDFAST_DRILL=1")
	}
	o := options{bin: plainBinary(t)}
	o.engine = engine(t, o.bin)
	name, err := engineName(o)
	if err != nil {
		t.Fatal(err)
	}
	only := strings.Split(os.Getenv("HOLDFAST_CASE"), ",")
	sound := map[string]error{} // what the product itself says, by drill and detail
	for _, m := range removals {
		if m.engine != "" && m.engine != name || only[0] != "" && !slices.Contains(only, m.Name) {
			continue
		}
		t.Run(m.Name, func(t *testing.T) {
			if run := drills[m.drill]; run != nil {
				if _, known := sound[m.drill+m.detail]; !known {
					whole := o
					if m.drill == "case" {
						whole.bin = pointsBinary(t)
					}
					sound[m.drill+m.detail] = run(t, whole, m.detail)
				}
				if err := sound[m.drill+m.detail]; err != nil {
					t.Fatalf("the product itself fails in drill %s: %v", m.drill, err)
				}
			}
			m.mustBeNoticed(t, o)
		})
	}
}

// noticing is how long a drill may take to notice.
const noticing = 2 * time.Minute

func (m removal) mustBeNoticed(t *testing.T, o options) {
	dir := t.TempDir()
	overlay, err := m.Overlay(root(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if drills[m.drill] == nil {
		out, err := exec.Command("go", "test", "-overlay", overlay, "-run", m.detail, "holdfast/"+m.drill).CombinedOutput()
		if err == nil || !bytes.Contains(out, []byte("--- FAIL")) {
			t.Errorf("the tests of %s did not notice: %v\n%s", m.drill, err, out)
		}
		return
	}
	if o.bin, err = build(filepath.Join(dir, "holdfast"), "-overlay", overlay, "-tags=crashpoints"); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	for time.Since(start) < noticing {
		if err := drills[m.drill](t, o, m.detail); err != nil {
			first, _, _ := strings.Cut(err.Error(), "\n")
			t.Logf("noticed after %v: %s", time.Since(start).Round(time.Millisecond), first)
			return
		}
	}
	t.Errorf("nobody noticed within %v, with seed %d", noticing, seed)
}
