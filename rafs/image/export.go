package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// The files of an exported image, beside its blobs, which have their ids for names.
const (
	exportedBootstrap = "image.erofs"
	exportedVerity    = "VERITY"
	exportedSums      = "SHA256SUMS"
)

// ExportOptions are those of [Export].
type ExportOptions struct {
	Options
	Progress func(Progress)                    // called from one goroutine at a time; may be nil
	Seal     func(path string) (string, error) // has the kernel check a file from now on; what it returns is noted in the file VERITY; nil: no
}

// An Exported image is a directory that any EROFS host can mount.
type Exported struct {
	Ref       string   `json:"ref"`
	Digest    string   `json:"digest"`
	Dir       string   `json:"dir"`       // absolute
	Bootstrap string   `json:"bootstrap"` // path of the file to mount
	Devices   []string `json:"devices"`   // paths, in the order in which they are to be given to mount(8)
	Size      int64    `json:"size"`      // of all files, in bytes, as if they had no holes
	Verity    []string `json:"verity,omitempty"`
}

// Export writes an image to the directory dir as what the kernel mounts by itself: the bootstrap, each blob as the plain device it is to
// EROFS, and SHA256SUMS of all, which sha256sum --check reads. The image is checked as [Check] does, and what is written is what was checked;
// an error that wraps [ErrDamaged] leaves nothing. dir appears when all of it is there and would outlive a power failure; it must not
// exist, or be empty. A crash leaves a directory whose name begins with dir's and goes on with ".partial-".
//
// Where an image has zeros that its blob does not store, the devices have holes: zeros is what these are here.
func Export(ctx context.Context, ref, dir string, o ExportOptions) (*Exported, error) {
	img, err := Open(ctx, ref, o.Options)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	x, err := img.export(ctx, dir, o)
	if err != nil {
		return nil, fmt.Errorf("export image %s to %s: %w", img.Ref, dir, err)
	}
	return x, nil
}

func (i *Image) export(ctx context.Context, dir string, o ExportOptions) (*Exported, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if strings.ContainsAny(dir, ",:\n") {
		return nil, errors.New("mount(8) takes no path with a comma, a colon or a line break in it as a device: choose another directory")
	}
	if err := admissible(dir); err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), filepath.Base(dir)+".partial-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp) // is gone by then when all went well
	x := &Exported{Ref: i.Ref, Digest: i.Digest, Dir: dir, Bootstrap: filepath.Join(dir, exportedBootstrap), Devices: []string{}}
	if err := i.exportTo(ctx, tmp, o, x); err != nil {
		return nil, err
	}
	if err := errors.Join(os.Chmod(tmp, 0o755), syncFile(tmp)); err != nil {
		return nil, err
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) { // an empty directory is replaced, and no other
		return nil, err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return nil, err
	}
	return x, syncFile(filepath.Dir(dir))
}

// admissible refuses directories with something in them before anything is fetched.
func admissible(dir string) error {
	there, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case len(there) > 0:
		return errors.New("the directory is not empty: give one that does not exist")
	}
	return nil
}

// exportTo writes, syncs and seals the files of the image.
func (i *Image) exportTo(ctx context.Context, dir string, o ExportOptions, x *Exported) (err error) {
	if err := exportFile(filepath.Join(dir, exportedBootstrap), i.Bootstrap); err != nil {
		return err
	}
	if err := x.seal(dir, exportedBootstrap, o); err != nil { // before anything is fetched: it may be that nothing can be sealed here
		return err
	}
	var files []*os.File
	defer func() {
		for _, f := range files {
			if e := f.Close(); !errors.Is(e, os.ErrClosed) {
				err = errors.Join(err, e)
			}
		}
	}()
	for _, b := range i.Blobs {
		f, err := os.OpenFile(filepath.Join(dir, b.Info.ID), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
		if err != nil {
			return err
		}
		files = append(files, f)
		x.Devices = append(x.Devices, filepath.Join(x.Dir, b.Info.ID))
		if err := f.Truncate(int64(b.Table.Size())); err != nil {
			return err
		}
	}
	c := newChecker(i, o.Progress)
	c.keep = func(blob int, off uint64, data []byte) error {
		_, err := files[blob].WriteAt(data, int64(off))
		return err
	}
	if err := c.run(ctx); err != nil {
		return err
	}
	for n, f := range files {
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return err
		}
		if err := x.seal(dir, i.Blobs[n].Info.ID, o); err != nil {
			return err
		}
	}
	if x.Verity != nil {
		if err := exportFile(filepath.Join(dir, exportedVerity), []byte(strings.Join(x.Verity, "\n")+"\n")); err != nil {
			return err
		}
	}
	return sumAll(ctx, dir, x)
}

func exportFile(path string, b []byte) error {
	if err := writeFile(path, b); err != nil {
		return err
	}
	return os.Chmod(path, 0o644)
}

// seal has a file sealed, if that is asked for, and notes how.
func (x *Exported) seal(dir, name string, o ExportOptions) error {
	if o.Seal == nil {
		return nil
	}
	how, err := o.Seal(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	x.Verity = append(x.Verity, how+"  "+name)
	return nil
}

// sumAll writes the digests of all files in dir: of what a reader of them gets, not of what was meant to be written.
func sumAll(ctx context.Context, dir string, x *Exported) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var lines []string
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		h := sha256.New()
		f, err := os.Open(filepath.Join(dir, e.Name()))
		if err != nil {
			return err
		}
		n, err := io.Copy(h, f)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
		x.Size += n
		lines = append(lines, hex.EncodeToString(h.Sum(nil))+"  "+e.Name()+"\n")
	}
	slices.Sort(lines)
	return exportFile(filepath.Join(dir, exportedSums), []byte(strings.Join(lines, "")))
}
