package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"holdfast/rafs/blob"
	"holdfast/rafs/source"
)

// The files of a saved image.
const (
	savedIndex     = "image.json"
	savedBootstrap = "image.boot"
)

// BootstrapPath is the file that holds the bootstrap of an image saved in dir, as it is to be mounted.
func BootstrapPath(dir string) string { return filepath.Join(dir, savedBootstrap) }

// What stands in the names of directories that a save was making, after the name of the one that it was to become: Unfinished in that of the new
// one, and Replaced at the end of that of the old one. No save that is under way may be disturbed.
const (
	Unfinished = ".new-"
	Replaced   = ".old"
)

func savedMeta(n int) string { return fmt.Sprintf("blob-%03d.meta", n) }

// savedVersion is the version of the form below.
const savedVersion = 1

var errNewer = errors.New("saved by another release")

// saved is what image.json holds.
type saved struct {
	Version   int         `json:"version"`
	Ref       string      `json:"ref"`
	Digest    string      `json:"digest"`
	Bootstrap string      `json:"bootstrap"` // digest of image.boot
	Blobs     []savedBlob `json:"blobs"`
}

type savedBlob struct {
	ID   string `json:"id"`
	Size int64  `json:"size"` // of the blob file
	Meta string `json:"meta"` // digest of the blob's file of chunk information
}

// Limits on saved files; what is longer was not written by Save.
const (
	maxSavedIndex = 1 << 20
	maxSavedMeta  = 1 << 30 // a blob of 1<<24 chunks has 56 bytes for each
)

// Save writes all of the image but the blobs' data to the directory dir, for [Load]. If the same is there already nothing is touched: mounts
// depend on it. What says something else there is an error; what cannot be loaded is replaced. A crash leaves what was there,
// the new directory, or none, and possibly another one with a name that begins with dir's; never a mixture.
// Bootstrap must not have been set to nil.
func (i *Image) Save(dir string) error {
	if err := i.save(dir); err != nil {
		return fmt.Errorf("save image %s: %w", i.Ref, err)
	}
	return nil
}

func (i *Image) save(dir string) error {
	if i.Bootstrap == nil {
		return errors.New("its bootstrap is no longer in memory")
	}
	dir = filepath.Clean(dir)
	there, err := Load(dir, Options{})
	switch {
	case err == nil:
		return errors.Join(i.sameAs(there, dir), there.Close())
	case errors.Is(err, errNewer):
		return err
	}
	parent := filepath.Dir(dir)
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(parent, filepath.Base(dir)+Unfinished)
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp) // is gone by then when all went well
	if err := i.writeTo(tmp); err != nil {
		return err
	}
	if err := replace(tmp, dir); err != nil {
		return err
	}
	return syncFile(parent)
}

// sameAs says whether the image is the one that was loaded from dir.
func (i *Image) sameAs(there *Image, dir string) error {
	i.Sum = sum(i.Bootstrap)
	same := i.Digest == there.Digest && i.Sum == there.Sum && len(i.Blobs) == len(there.Blobs)
	for n := 0; same && n < len(i.Blobs); n++ {
		a, b := i.Blobs[n], there.Blobs[n]
		m, err := a.meta.MarshalBinary()
		if err != nil {
			return err
		}
		old, err := b.meta.MarshalBinary()
		if err != nil {
			return err
		}
		same = a.Info.ID == b.Info.ID && a.Source.Size() == b.Source.Size() && bytes.Equal(m, old)
	}
	if !same {
		return fmt.Errorf("%s holds image %s with other blobs, which mounts may depend on: unmount them and remove the directory", dir, there.Digest)
	}
	return nil
}

// writeTo writes and syncs the files of the image.
func (i *Image) writeTo(dir string) error {
	i.Sum = sum(i.Bootstrap)
	s := saved{Version: savedVersion, Ref: i.Ref, Digest: i.Digest, Bootstrap: i.Sum}
	files := []*os.File{}
	write := func(name string, b []byte) error {
		f, err := newFile(filepath.Join(dir, name), b)
		if err == nil {
			files = append(files, f)
		}
		return err
	}
	err := write(savedBootstrap, i.Bootstrap)
	for n, b := range i.Blobs {
		if err != nil {
			break
		}
		var m []byte
		if m, err = b.meta.MarshalBinary(); err != nil {
			break
		}
		s.Blobs = append(s.Blobs, savedBlob{ID: b.Info.ID, Size: b.Source.Size(), Meta: sum(m)})
		err = write(savedMeta(n), m)
	}
	if err == nil {
		var b []byte
		if b, err = json.MarshalIndent(s, "", "\t"); err == nil {
			err = write(savedIndex, b)
		}
	}
	return errors.Join(err, syncAll(files), syncFile(dir))
}

// syncers is how many files are synced at once.
const syncers = 32

// syncAll syncs and closes files, all at once: the disk is then asked to write once for many, where it would be for each.
func syncAll(files []*os.File) error {
	var g errgroup.Group
	g.SetLimit(syncers)
	for _, f := range files {
		g.Go(func() error { return errors.Join(f.Sync(), f.Close()) })
	}
	return g.Wait()
}

// replace renames tmp to dir, which may exist.
func replace(tmp, dir string) error {
	err := os.Rename(tmp, dir)
	if err == nil || !errors.Is(err, os.ErrExist) {
		return err
	}
	old := tmp + Replaced
	if err := os.Rename(dir, old); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return errors.Join(err, os.Rename(old, dir))
	}
	return os.RemoveAll(old)
}

func writeFile(path string, b []byte) error {
	f, err := newFile(path, b)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// newFile makes a file and writes it; it is not synced.
func newFile(path string, b []byte) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if _, err := f.Write(b); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Load opens an image that [Image.Save] wrote to dir, with its blobs where it was opened from when it was saved; see [Image.At]. Nothing but
// dir is read: registries and blob files are opened when a source is first read. Errors name the file, and wrap [ErrFormat] if its content is not what Save wrote: delete the directory
// and open the image anew.
func Load(dir string, o Options) (*Image, error) {
	b, err := readFile(filepath.Join(dir, savedIndex), maxSavedIndex)
	if err != nil {
		return nil, fmt.Errorf("load image: %w", err)
	}
	var s saved
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("load image: %w", bad("%s: %w", filepath.Join(dir, savedIndex), err))
	}
	if s.Version != savedVersion {
		return nil, fmt.Errorf("load image: %w: %w", errNewer, bad("%s has version %d, this release knows %d: run the release that wrote it, or delete %s and mount the image anew", filepath.Join(dir, savedIndex), s.Version, savedVersion, dir))
	}
	r, err := ParseReference(s.Ref)
	if err != nil {
		return nil, fmt.Errorf("load image from %s: %w", dir, err)
	}
	img := &Image{Ref: r.String(), Digest: s.Digest, store: openStore(r, o)}
	if err := img.load(dir, s); err != nil {
		img.Close()
		return nil, fmt.Errorf("load image %s from %s: %w", s.Ref, dir, err)
	}
	return img, nil
}

// At returns the same image with its blobs where ref says. It shares all but the sources with i, and reads nothing. Two mounts of one image
// may have it from two places, and what one of them was given is not for the other (I8).
func (i *Image) At(ref string, o Options) (*Image, error) {
	r, err := ParseReference(ref)
	if err != nil {
		return nil, err
	}
	at := *i
	at.Ref, at.store, at.Blobs = r.String(), openStore(r, o), make([]*Blob, len(i.Blobs))
	for n, b := range i.Blobs {
		moved := *b
		moved.Source = at.store.Blob(b.Info.ID, b.Source.Size())
		at.Blobs[n] = &moved
	}
	return &at, nil
}

func (i *Image) load(dir string, s saved) error {
	var err error
	if i.Bootstrap, err = readSaved(dir, savedBootstrap, s.Bootstrap, maxBootstrap); err != nil {
		return err
	}
	i.Sum = s.Bootstrap
	sb, err := i.readBootstrap()
	if err != nil {
		return err
	}
	if len(sb.Blobs) != len(s.Blobs) {
		return bad("%s lists %d blobs, %s %d", savedIndex, len(s.Blobs), savedBootstrap, len(sb.Blobs))
	}
	for n, info := range sb.Blobs {
		saved := s.Blobs[n]
		if saved.ID != info.ID || !idPattern.MatchString(saved.ID) || saved.Size < 0 {
			return bad("%s: blob %d is %.80q with %d bytes, want %q", savedIndex, n, saved.ID, saved.Size, info.ID)
		}
		raw, err := readSaved(dir, savedMeta(n), saved.Meta, maxSavedMeta)
		if err != nil {
			return err
		}
		m, err := blob.ParseMeta(raw)
		if err != nil {
			return source.Permanent(fmt.Errorf("%s: %w", savedMeta(n), err))
		}
		if m.Info().ID != info.ID {
			return bad("%s is of blob %s, want %s", savedMeta(n), m.Info().ID, info.ID)
		}
		b := &Blob{Source: i.store.Blob(info.ID, saved.Size)}
		i.Blobs = append(i.Blobs, b)
		if err := b.setMeta(m, sb, n); err != nil {
			return err
		}
	}
	return nil
}

// readSaved reads a file of a saved image and checks its digest.
func readSaved(dir, file, want string, limit int64) ([]byte, error) {
	b, err := readFile(filepath.Join(dir, file), limit)
	if err != nil {
		return nil, err
	}
	if got := sum(b); got != want {
		return nil, bad("%s has digest %s, %s says %.80q", file, got, savedIndex, want)
	}
	return b, nil
}
