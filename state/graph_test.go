package state

import (
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"
)

func everything(*Graph, Object) bool { return true }

func unneeded(g *Graph, o Object) bool { return !g.Needed(o) }

// ids are the domains and ids of objects.
func ids(list []Object) (all []string) {
	for _, o := range list {
		all = append(all, o.Domain+"/"+o.ID)
	}
	return all
}

// onRecord are the objects on record.
func onRecord(t *testing.T, db *DB) []string {
	t.Helper()
	g, err := db.Graph()
	if err != nil {
		t.Fatal(err)
	}
	return ids(g.Objects)
}

// record records a mount "m-<image>-<domain>" of an image with blobs.
func record(t *testing.T, db *DB, image, domain string, blobs ...string) Mount {
	t.Helper()
	m := Mount{ID: "m-" + image + "-" + domain, Image: image, Dir: "/" + image + domain, Domain: domain}
	i := Image{Digest: image, Blobs: []Blob{}}
	for _, b := range blobs {
		i.Blobs = append(i.Blobs, Blob{ID: b, Size: 4096})
	}
	if err := db.RecordMount(m, i); err != nil {
		t.Fatal(err)
	}
	return m
}

func open(t *testing.T) *DB { return open1(t, filepath.Join(t.TempDir(), "state.db")) }

func TestAnObjectIsKeptWhileAnImageRefersToItInItsDomain(t *testing.T) {
	db := open(t)
	a := record(t, db, "a", "d", "1", "2")
	b := record(t, db, "b", "d", "2", "3")
	elsewhere := record(t, db, "b", "e", "2", "3")
	if err := db.RecordObject(Object{Domain: "d", ID: a.ID}); err != nil { // a bootstrap
		t.Fatal(err)
	}
	if gone, err := db.RetireObjects(unneeded); len(gone) != 0 || err != nil {
		t.Errorf("all is referred to, and %v is retired, %v", ids(gone), err)
	}
	if mounts, err := db.RetireImage("a"); len(mounts) != 1 || err != nil {
		t.Errorf("a mounted image is retired: %v, %v", mounts, err)
	}
	if err := errors.Join(db.ForgetMount(a.ID), db.ForgetMount(b.ID), db.ForgetMount(elsewhere.ID)); err != nil {
		t.Fatal(err)
	}
	if gone, err := db.RetireObjects(unneeded); !slices.Equal(ids(gone), []string{"d/" + a.ID}) || err != nil {
		t.Errorf("retired %v, %v: want the bootstrap, for an unmounted image keeps its blobs", ids(gone), err)
	}
	if mounts, err := db.RetireImage("a"); len(mounts) != 0 || err != nil {
		t.Fatal(mounts, err)
	}
	gone, err := db.RetireObjects(unneeded)
	if want := []string{"d/1", "d/" + a.ID}; !slices.Equal(ids(gone), want) || err != nil {
		t.Errorf("retired %v, %v; want %v", ids(gone), err, want)
	}
	if err := errors.Join(db.ForgetObjects(gone), db.ForgetImage("a"), db.ForgetImage("b")); err != nil {
		t.Fatal(err)
	}
	if got, want := onRecord(t, db), []string{"d/2", "d/3", "e/2", "e/3"}; !slices.Equal(got, want) {
		t.Errorf("on record are %v, want %v", got, want)
	}
	if list, err := db.Images(); len(list) != 1 || list[0].Digest != "b" || err != nil {
		t.Errorf("images %v, %v: want b, which nobody retired", list, err)
	}
}

func TestWhatAMountHasIsNeverRetiredAndWhatImagesAloneReferToMayBe(t *testing.T) {
	db := open(t)
	a := record(t, db, "a", "d", "1", "2")
	b := record(t, db, "b", "d", "2", "3")
	record(t, db, "c", "e", "3")
	if gone, err := db.RetireObjects(everything); len(gone) != 0 || err != nil {
		t.Errorf("all is mounted, and %v is retired, %v", ids(gone), err)
	}
	if err := db.ForgetMount(a.ID); err != nil {
		t.Fatal(err)
	}
	gone, err := db.RetireObjects(everything)
	if !slices.Equal(ids(gone), []string{"d/1"}) || err != nil {
		t.Errorf("retired %v, %v: want what the mounted images do not have", ids(gone), err)
	}
	offline := a
	offline.ID, offline.Stage = "m-offline", StageOffline
	if err := errors.Join(db.ForgetMount(b.ID), db.RecordOffline(offline)); err != nil {
		t.Fatal(err)
	}
	if err := db.ForgetObjects(gone); err != nil {
		t.Fatal(err)
	}
	if gone, err := db.RetireObjects(everything); !slices.Equal(ids(gone), []string{"d/3"}) || err != nil {
		t.Errorf("retired %v, %v: want what is neither mounted nor mounted without a daemon", ids(gone), err)
	}
	if got, want := onRecord(t, db), []string{"d/1", "d/2", "d/3", "e/3"}; !slices.Equal(got, want) {
		t.Errorf("on record are %v, want %v", got, want)
	}
}

func TestWhatIsMountedAgainWhileItIsRemovedStaysOnRecord(t *testing.T) {
	db := open(t)
	m := record(t, db, "a", "d", "1")
	if err := db.ForgetMount(m.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := db.RetireImage("a"); err != nil {
		t.Fatal(err)
	}
	gone, err := db.RetireObjects(unneeded)
	if len(gone) != 1 || err != nil {
		t.Fatal(gone, err)
	}
	record(t, db, "a", "d", "1")
	if err := errors.Join(db.ForgetObjects(gone), db.ForgetImage("a")); err != nil {
		t.Fatal(err)
	}
	images, err := db.Images()
	if err != nil || len(images) != 1 || images[0].Removing || !slices.Equal(onRecord(t, db), []string{"d/1"}) {
		t.Errorf("after it was mounted anew there are %+v, %v and %v", images, err, onRecord(t, db))
	}
}

// schema1 makes a record of an image as the first schema has it.
func schema1(t *testing.T, db *DB, digest string) {
	t.Helper()
	if err := db.update("test", func(tx *bbolt.Tx) error { return put(tx, bucketImages, digest, Image{Digest: digest}) }); err != nil {
		t.Fatal(err)
	}
}

func TestAnImageThatIsNotDescribedRefersToEverything(t *testing.T) {
	db := open(t)
	for _, o := range []Object{{Domain: "d", ID: "1"}, {Domain: "e", ID: "1"}, {Domain: "d", ID: "2"}} {
		if err := db.RecordObject(o); err != nil {
			t.Fatal(err)
		}
	}
	schema1(t, db, "old")
	if gone, err := db.RetireObjects(unneeded); len(gone) != 0 || err != nil {
		t.Errorf("retired %v, %v", ids(gone), err)
	}
	if err := db.DescribeImage("old", []Blob{{ID: "1", Size: 4096}}); err != nil {
		t.Fatal(err)
	}
	if gone, err := db.RetireObjects(unneeded); !slices.Equal(ids(gone), []string{"d/2"}) || err != nil {
		t.Errorf("retired %v, %v: want the one that is no blob of the image", ids(gone), err)
	}
	images, err := db.Images()
	want := []Image{{Digest: "old", Blobs: []Blob{{ID: "1", Size: 4096}}, Domains: []string{"d", "e"}}}
	if diff := cmp.Diff(want, images); diff != "" || err != nil {
		t.Error(err, diff)
	}
}

// A damaged record of an image must not cost what is mounted of it.
func TestAMountWhoseImageIsNotOnRecordKeepsEverything(t *testing.T) {
	db := open(t)
	record(t, db, "a", "d", "1")
	if err := db.update("test", func(tx *bbolt.Tx) error { return tx.Bucket(bucketImages).Delete([]byte("a")) }); err != nil {
		t.Fatal(err)
	}
	if gone, err := db.RetireObjects(unneeded); len(gone) != 0 || err != nil {
		t.Errorf("retired %v, %v", ids(gone), err)
	}
}

func TestSecretIsOfOneFileAndStays(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	db := open1(t, path)
	one, err := db.Secret()
	if len(one) != secretLen || err != nil {
		t.Fatalf("%d bytes, %v", len(one), err)
	}
	db.Close()
	again, err := open1(t, path).Secret()
	if !slices.Equal(one, again) || err != nil {
		t.Errorf("after reopening it is another, %v", err)
	}
	if other, err := open(t).Secret(); slices.Equal(one, other) || err != nil {
		t.Errorf("another file has the same, %v", err)
	}
}

func TestOfflineMountKeepsItsImageAndIsRefusedOfOneThatIsBeingRemoved(t *testing.T) {
	db := open1(t, filepath.Join(t.TempDir(), "state.db"))
	fill(t, db)
	if err := db.ForgetMount(testMount.ID); err != nil {
		t.Fatal(err)
	}
	offline := testMount
	offline.ID, offline.Stage = "mount-c", StageOffline
	if err := db.RecordOffline(offline); err != nil {
		t.Fatal(err)
	}
	if mounted, err := db.RetireImage(testImage.Digest); err != nil || len(mounted) != 1 {
		t.Errorf("the image is mounted without a daemon: retired all the same, for %+v, %v", mounted, err)
	}
	if err := db.ForgetMount(offline.ID); err != nil {
		t.Fatal(err)
	}
	if mounted, err := db.RetireImage(testImage.Digest); err != nil || len(mounted) != 0 {
		t.Fatalf("%+v, %v", mounted, err)
	}
	if err := db.RecordOffline(offline); err == nil {
		t.Error("an image that is being removed was recorded as mounted without a daemon")
	}
	if g, err := db.Graph(); err != nil || len(g.Mounts) != 0 {
		t.Errorf("mounts on record: %+v, %v", g.Mounts, err)
	}
}
